"""Reference of `qkv_norm_rope`, in `jnp`."""

import jax
import jax.numpy as jnp

from g4attn_jax.ops.qkv_rms_norm import reference as qkv_norm
from g4attn_jax.rope import apply_rope


def qkv_norm_rope(qkv, q_norm, k_norm, cos, sin, *, mode, eps, dtype):
    """Reference of `g4attn_jax.ops.qkv_norm_rope`."""
    heads = unrounded(qkv, q_norm, k_norm, cos, sin, mode=mode, eps=eps, dtype=dtype)
    return jax.tree.map(lambda x: x.astype(dtype or qkv.dtype), heads)


def unrounded(qkv, q_norm, k_norm, cos, sin, *, mode, eps, dtype):
    """Heads of `qkv_norm_rope`, still in float32; `dtype` says that `qkv` has partial sums."""
    qkv = qkv.astype(jnp.float32)
    q, k, v = qkv_norm.qkv_rms_norm(
        qkv if dtype is None else qkv.sum(axis=0),
        q_norm,
        k_norm,
        None,
        mode=mode,
        eps=eps,
        scale_offset=0.0,
    )
    return apply_rope(q, cos, sin), None if k is None else apply_rope(k, cos, sin), v
