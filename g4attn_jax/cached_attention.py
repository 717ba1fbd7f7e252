"""Softmax attention over a cache of any form and layout, in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.layout import Layout, key_positions

# Up to this many tokens a sequence a step decodes (16 is the most that speculative decoding
# verifies at once) and is bound by reading the cache; above, it is a prefill, bound by arithmetic.
MAX_DECODE_TOKENS = 16


def cached_attention(
    q: Float[Array, "B T Nq width"],
    cache: Cache,
    positions: Int[Array, "B T"],
    layout: Layout,
    *,
    sliding_window: int | None,
    scale: float = 1.0,
) -> Float[Array, "B T Nq D"]:
    """softmax(scale q k^T + mask) v, float32 inside.

    A token at position p sees the keys at positions 0 .. p, in a sliding layer the last
    `sliding_window` of them.

    Args:
        q: [B, T, Nq, D], or D + R numbers for a compact cache: what `cache.key_parts` are
            multiplied with.
        cache: with the new tokens already in it. What no token sees may be anything; in a
            contiguous or ring cache that is decoded from, anything finite.
        positions: int32 [B, T], each with a slot, -1 for padding.
        layout: of the cache.
        sliding_window: keys that a token sees, its own included; None: all.
        scale: of the scores.

    Returns:
        [B, T, Nq, D] in q's dtype; zeros for padding.
    """
    few = q.shape[1] <= MAX_DECODE_TOKENS
    if few:
        multiply, combine = _multiply_few, _combine_few
    else:
        multiply, combine = _multiply, _combine
    scores, start = 0.0, 0
    for array, array_scale in cache.key_parts:
        stop = start + array.shape[-1]
        k = layout.sequences(array).astype(q.dtype)
        part = multiply(q[..., start:stop], k)
        scores += part if array_scale is None else part * array_scale
        start = stop
    visible = _visible(positions, layout, sliding_window)
    scores = scores if scale == 1 else scores * scale
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    array, array_scale = cache.value_part
    v = layout.sequences(array)
    if not few or v is not array:
        # What nobody sees may be anything, and a weight of 0 does not undo a NaN. Decoding from a
        # cache that is read as it lies, this would copy it in every step.
        v = jnp.where(visible.any(axis=1)[..., None, None], v, 0)
    o = combine(weights, v.astype(q.dtype))
    if array_scale is not None:
        o *= array_scale
    return jnp.where((positions >= 0)[..., None, None], o, 0).astype(q.dtype)


def _visible(positions, layout, sliding_window):
    """[B, T, C], whether a token sees a slot."""
    key, query = key_positions(positions, layout)[:, None, :], positions[..., None]
    visible = (key >= 0) & (key <= query)
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return visible


def _multiply(q, k):
    """q [B, T, Nq, width] by k [B, C, Nkv, width]: float32 [B, T, Nq, C]."""
    batch, tokens, num_q_heads, width = q.shape
    q = q.reshape(batch, tokens, k.shape[2], -1, width)
    scores = jnp.einsum("btkgw,bskw->btkgs", q, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, tokens, num_q_heads, -1)


def _combine(weights, v):
    """weights [B, T, Nq, C] of v [B, C, Nkv, D]: float32 [B, T, Nq, D]."""
    batch, tokens, num_q_heads, capacity = weights.shape
    weights = weights.reshape(batch, tokens, v.shape[2], -1, capacity)
    o = jnp.einsum("btkgs,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return o.reshape(batch, tokens, num_q_heads, -1)


# The same for few tokens, reading the cache as it lies. With a batch axis for KV heads, XLA
# transposes the whole cache for its matrix products, in every step. Here a cache row is one vector
# of all KV heads, and a query is zero outside its own: more multiplications, no copy.


def _own_heads(num_q_heads, num_kv_heads):
    """bool [Nq, Nkv, 1]: whether a KV head is the one of a query head."""
    own = jax.nn.one_hot(jnp.arange(num_q_heads) * num_kv_heads // num_q_heads, num_kv_heads)
    return own[:, :, None] > 0


def _multiply_few(q, k):
    batch, tokens, num_q_heads, _ = q.shape
    own = _own_heads(num_q_heads, k.shape[2])
    q = jnp.where(own, q[..., None, :], 0).reshape(batch, tokens * num_q_heads, -1)
    k = k.reshape(*k.shape[:2], -1)
    scores = jnp.einsum("brw,bsw->brs", q, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, tokens, num_q_heads, -1)


def _combine_few(weights, v):
    batch, tokens, num_q_heads, capacity = weights.shape
    own = _own_heads(num_q_heads, v.shape[2])
    rows = weights.reshape(batch, tokens * num_q_heads, capacity)
    v_rows = v.reshape(*v.shape[:2], -1)
    o = jnp.einsum("brs,bsw->brw", rows, v_rows, preferred_element_type=jnp.float32)
    o = o.reshape(batch, tokens, num_q_heads, *v.shape[2:])
    return jnp.where(own, o, 0).sum(axis=-2)
