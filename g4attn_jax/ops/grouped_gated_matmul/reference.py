"""Reference of `grouped_gated_matmul`, in `jnp`."""

import jax.numpy as jnp

from g4attn_jax.ops.grouped_matmul.reference import grouped_matmul_float32
from g4attn_jax.ops.linear.reference import gelu_gate


def grouped_gated_matmul(x, w, group_sizes, rows):
    """Reference of `g4attn_jax.ops.grouped_gated_matmul`."""
    x = x if rows is None else x[jnp.clip(rows, 0, x.shape[0] - 1)]
    y = grouped_matmul_float32(x, w.reshape(*w.shape[:2], -1), group_sizes)
    gate, up = y.reshape(-1, *w.shape[2:]).swapaxes(0, 1)
    return gelu_gate(gate, up).astype(x.dtype)
