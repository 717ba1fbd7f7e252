"""Reference of `qkv_norm_rope_write`, in `jnp`."""

from g4attn_jax.ops.qkv_norm_rope import reference as qkv_norm_rope


def qkv_norm_rope_write(qkv, q_norm, k_norm, cos, sin, slots, cache, *, mode, eps, dtype):
    """Reference of `g4attn_jax.ops.qkv_norm_rope_write`."""
    constants = {"mode": mode, "eps": eps, "dtype": dtype}
    q, k, v = qkv_norm_rope.unrounded(qkv, q_norm, k_norm, cos, sin, **constants)
    q = cache.query(q, k_norm, 2 * cos.shape[-1])
    return q.astype(dtype or qkv.dtype), cache.write(slots, k, v)


def query(qkv, q_norm, k_norm, cos, sin, *, form, mode, eps, dtype):
    """Query of a Q_ONLY layer for a cache of the given form."""
    constants = {"mode": mode, "eps": eps, "dtype": dtype}
    q, _, _ = qkv_norm_rope.unrounded(qkv, q_norm, None, cos, sin, **constants)
    return form.query(q, k_norm, 2 * cos.shape[-1]).astype(dtype or qkv.dtype)
