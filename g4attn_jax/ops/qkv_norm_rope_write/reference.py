"""Reference of `qkv_norm_rope_write`, in `jnp`."""

from g4attn_jax.ops.qkv_norm_rope import reference as qkv_norm_rope


def qkv_norm_rope_write(qkv, q_norm, k_norm, cos, sin, slots, cache, *, mode, eps):
    """Reference of `g4attn_jax.ops.qkv_norm_rope_write`."""
    q, k, v = qkv_norm_rope.unrounded(qkv, q_norm, k_norm, cos, sin, mode=mode, eps=eps)
    q = cache.query(q, k_norm, 2 * cos.shape[-1])
    return q.astype(qkv.dtype), cache.write(slots, k, v)


def query(qkv, q_norm, k_norm, cos, sin, *, form, mode, eps):
    """Query of a Q_ONLY layer for a cache of the given form."""
    q, _, _ = qkv_norm_rope.unrounded(qkv, q_norm, None, cos, sin, mode=mode, eps=eps)
    return form.query(q, k_norm, 2 * cos.shape[-1]).astype(qkv.dtype)
