"""Reference of `decode_attention`, in `jnp`, with a score for every slot of the cache."""

import jax
import jax.numpy as jnp

from g4attn_jax.layout import key_positions, read_layout, where_token


def decode_attention(q, cache, page_table, positions, *, sliding_window, scale, num_splits):
    """Reference of `g4attn_jax.ops.decode_attention`; `num_splits` is the kernels'.

    What no token sees may be anything; its values anything finite on CUDA, where a contiguous or
    ring cache is read as it lies, and in a derivative.
    """
    layout = read_layout(page_table, *cache.v.shape[:2])
    scores = 0.0
    for keys in cache.key_parts:
        k = layout.sequences(keys.array).astype(q.dtype)
        part = _multiply(q[..., keys.columns], k)
        scores += _scaled(part, keys.scale)
    visible = _visible(positions, layout, sliding_window)
    scores = scores if scale == 1 else scores * scale
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    values = cache.value_part
    v = layout.sequences(values.array)
    seen = visible.any(axis=1)[..., None, None]
    combine = _combine_seen if v is not values.array else _combine_as_it_lies
    o = _scaled(combine(weights, v, seen), values.scale)
    return where_token(positions, o).astype(q.dtype)


def _scaled(x, scale):
    return x if scale is None else x * scale


def _visible(positions, layout, sliding_window):
    """[B, T, C], whether a token sees a slot."""
    key, query = key_positions(positions, layout)[:, None, :], positions[..., None]
    visible = (key >= 0) & (key <= query)
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return visible


# The cache is read as it lies. With a batch axis for KV heads, XLA transposes the whole cache for
# its matrix products, in every step. Here a cache row is one vector of all KV heads, and a query is
# zero outside its own: more multiplications, no copy.


def _own_heads(num_q_heads, num_kv_heads):
    """bool [Nq, Nkv, 1]: whether a KV head is the one of a query head."""
    own = jax.nn.one_hot(jnp.arange(num_q_heads) * num_kv_heads // num_q_heads, num_kv_heads)
    return own[:, :, None] > 0


def _multiply(q, k):
    """q [B, T, Nq, width] by k [B, C, Nkv, width]: float32 [B, T, Nq, C]."""
    batch, tokens, num_q_heads, _ = q.shape
    own = _own_heads(num_q_heads, k.shape[2])
    q = jnp.where(own, q[..., None, :], 0).reshape(batch, tokens * num_q_heads, -1)
    k = k.reshape(*k.shape[:2], -1)
    scores = jnp.einsum("brw,bsw->brs", q, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, tokens, num_q_heads, -1)


def _combine_seen(weights, v, seen):
    """`_combine` of the values that are seen: a weight of 0 does not undo a NaN."""
    return _combine(weights, jnp.where(seen, v, 0))


def _combine_as_it_lies(weights, v, seen):
    """`_combine_seen` that copies no cache (but has memory for it) unless there is such a NaN.

    Not on CUDA, where what the branch costs a step has not been measured.
    """

    def checked(weights, v, seen):
        o = _combine(weights, v)
        return jax.lax.cond(
            jnp.isfinite(o).all(), lambda: o, lambda: _combine_seen(weights, v, seen)
        )

    def unchecked(weights, v, seen):
        return _combine(weights, v)

    return jax.lax.platform_dependent(weights, v, seen, cuda=unchecked, default=checked)


def _combine(weights, v):
    """weights [B, T, Nq, C] of v [B, C, Nkv, D]: float32 [B, T, Nq, D]."""
    batch, tokens, num_q_heads, capacity = weights.shape
    own = _own_heads(num_q_heads, v.shape[2])
    rows = weights.reshape(batch, tokens * num_q_heads, capacity)
    v_rows = v.astype(weights.dtype).reshape(*v.shape[:2], -1)
    o = jnp.einsum("brs,bsw->brw", rows, v_rows, preferred_element_type=jnp.float32)
    o = o.reshape(batch, tokens, num_q_heads, *v.shape[2:])
    return jnp.where(own, o, 0).sum(axis=-2)
