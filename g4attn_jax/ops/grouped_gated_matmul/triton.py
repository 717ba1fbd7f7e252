"""`grouped_gated_matmul`: two parts of a grouped matmul, the gate where their sums are."""

from g4attn_jax.ops.grouped_matmul.triton import grouped_parts_matmul
from g4attn_jax.ops.linear.reference import gelu_gate


def grouped_gated_matmul(x, w, group_sizes, rows, *, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.grouped_gated_matmul`; `launch` is for tuning."""
    return grouped_parts_matmul(
        x,
        rows,
        w,
        group_sizes,
        combine=gelu_gate,
        name="grouped_gated_matmul",
        interpret=interpret,
        launch=launch,
    )
