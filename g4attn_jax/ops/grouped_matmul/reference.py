"""Reference of `grouped_matmul`, in `jnp`."""

import jax
import jax.numpy as jnp


def grouped_matmul(x, w, group_sizes):
    """Reference of `g4attn_jax.ops.grouped_matmul`."""
    return grouped_matmul_float32(x, w, group_sizes).astype(x.dtype)


def grouped_matmul_float32(x, w, group_sizes):
    """Grouped matmul that is not rounded."""
    return jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
