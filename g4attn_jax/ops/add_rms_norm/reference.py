"""Reference of `add_rms_norm`, in `jnp`."""

import jax.numpy as jnp

from g4attn_jax.ops.head_norm.reference import rms_norm


def add_rms_norm(x, y, scale, next_scales, factor, *, eps):
    """Reference of `g4attn_jax.ops.add_rms_norm`."""
    y = y.astype(jnp.float32)
    if y.ndim > x.ndim:
        y = y.sum(axis=0)
    total = x.astype(jnp.float32) + rms_norm(y, scale, eps=eps)
    if factor is not None:
        total *= factor.astype(jnp.float32)
    total = total.astype(x.dtype)
    return total, tuple(rms_norm(total, next_scale, eps=eps) for next_scale in next_scales)
