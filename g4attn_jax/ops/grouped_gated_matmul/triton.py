"""`grouped_gated_matmul`: two matrices a group, the gate where their products are."""

from g4attn_jax.ops.grouped_matmul.triton import combined_grouped_matmul
from g4attn_jax.ops.linear.reference import gelu_gate


def grouped_gated_matmul(x, w, group_sizes, rows, *, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.grouped_gated_matmul`; `launch` is for tuning."""
    return combined_grouped_matmul(
        x,
        rows,
        w,
        group_sizes,
        combine=gelu_gate,
        name="grouped_gated_matmul",
        interpret=interpret,
        launch=launch,
    )
