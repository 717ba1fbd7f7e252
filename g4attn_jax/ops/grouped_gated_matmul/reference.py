"""`grouped_gated_matmul` in `jnp`."""

import jax
import jax.numpy as jnp

from g4attn_jax.ops.grouped_matmul.reference import grouped_matmul_float32


def grouped_gated_matmul(x, w, group_sizes, rows):
    """See `g4attn_jax.ops.grouped_gated_matmul`."""
    x = x if rows is None else x[jnp.clip(rows, 0, x.shape[0] - 1)]
    y = grouped_matmul_float32(x, w.reshape(*w.shape[:2], -1), group_sizes)
    gate, up = y.reshape(-1, *w.shape[2:]).swapaxes(0, 1)
    return gelu_gate(gate, up).astype(x.dtype)


def gelu_gate(gate, up):
    """gelu(gate) * up of float32."""
    return jax.nn.gelu(gate, approximate=True) * up
