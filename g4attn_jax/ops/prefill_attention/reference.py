"""Reference of `prefill_attention`, in `jnp`: on-line softmax over blocks of queries and keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from g4attn_jax.layout import Paged, key_positions, read_layout, where_token

# Scores exist for a block of tokens by a block of slots: [B, Nkv, G, 128, 512] in float32.
_BLOCK_TOKENS = 128
_BLOCK_SLOTS = 512


def prefill_attention(q, cache, page_table, positions, segment_ids=None, *, sliding_window, scale):
    """Reference of `g4attn_jax.ops.prefill_attention`.

    What no token sees may be anything. For a derivative nothing is kept of a block of tokens but
    its arguments; the accumulators after each block of slots are, while it is differentiated.
    """
    tokens = q.shape[1]
    layout = read_layout(page_table, *cache.v.shape[:2])
    attend = functools.partial(
        _attend,
        cache=cache,
        layout=layout,
        held=key_positions(positions, layout),
        key_ids=None if segment_ids is None else segment_ids.key,
        sliding_window=sliding_window,
        scale=scale,
    )
    query_ids = None if segment_ids is None else _blocks(segment_ids.query, 0)
    blocks = _blocks(q, 0), _blocks(positions, -1), query_ids
    o = lax.map(jax.checkpoint(lambda block: attend(*block)), blocks)
    return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :tokens]


def _blocks(x, padding):
    """x [B, T, ...] as [blocks, B, up to 128, ...]."""
    size = min(x.shape[1], _BLOCK_TOKENS)
    widths = [(0, -x.shape[1] % size) if axis == 1 else (0, 0) for axis in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _attend(q, positions, query_ids, *, cache, layout, held, key_ids, sliding_window, scale):
    """Attention of a block of tokens over the whole cache.

    Args:
        query_ids: [B, T], the segments of the tokens; None: a row has one.
        held: [B, C], the positions in the slots.
        key_ids: [B, C], the segments in the slots; None: a row has one.
    """
    batch, tokens, num_q_heads, width = q.shape
    num_kv_heads, head_dim = cache.v.shape[2:]
    q = q.reshape(batch, tokens, num_kv_heads, -1, width)
    size = _block_slots(layout)

    @jax.checkpoint
    def step(carry, block):
        first = jnp.minimum(block * size, layout.capacity - size)
        key = lax.dynamic_slice_in_dim(held, first, size, axis=1)
        # The last block may begin within the one before.
        key = jnp.where(first + jnp.arange(size) >= block * size, key, -1)
        visible = _visible(key, positions, sliding_window)
        if key_ids is not None:
            key_id = lax.dynamic_slice_in_dim(key_ids, first, size, axis=1)
            visible &= query_ids[..., None] == key_id[:, None]
        add = functools.partial(_add_block, q, cache, layout, first, visible, scale)
        return lax.cond(visible.any(), add, lambda carry: carry, carry), None

    rows = (batch, num_kv_heads, num_q_heads // num_kv_heads, tokens)
    carry = (
        # Finite: exp(-inf - m) is 0 also for a token that has seen nothing yet.
        jnp.full(rows, jnp.finfo(jnp.float32).min),
        jnp.zeros(rows),
        jnp.zeros((*rows, head_dim)),
    )
    (_, total, acc), _ = lax.scan(step, carry, jnp.arange(-(-layout.capacity // size)))
    o = acc / jnp.where(total > 0, total, 1)[..., None]  # padding sees nothing: 0
    o = jnp.moveaxis(o, 3, 1).reshape(batch, tokens, num_q_heads, head_dim)
    return where_token(positions, o).astype(q.dtype)


def _visible(key, positions, sliding_window):
    """Mask [B, T, S] of which tokens see which of the keys, at positions `key` [B, S]."""
    key, query = key[:, None], positions[..., None]
    visible = (key >= 0) & (key <= query)
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return visible


def _add_block(q, cache, layout, first, visible, scale, carry):
    """On-line softmax with the slots from `first` on: (largest scores, totals, weighted values)."""
    m, total, acc = carry
    size = visible.shape[-1]
    # A weight of 0 does not undo a NaN, nor does a mask in the derivative.
    seen = visible.any(axis=1)[..., None, None]
    scores = 0.0
    for keys in cache.key_parts:
        k = jnp.where(seen, _slots_from(first, size, keys.array, layout), 0).astype(q.dtype)
        products = _einsum("btkgw,bskw->bkgts", q[..., keys.columns], k)
        scores += _scaled(products, keys.scale)
    scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
    # The result does not depend on m, so neither does its derivative.
    new_m = lax.stop_gradient(jnp.maximum(m, scores.max(axis=-1)))
    alpha, weights = jnp.exp(m - new_m), jnp.exp(scores - new_m[..., None])
    values = cache.value_part
    v = jnp.where(seen, _slots_from(first, size, values.array, layout), 0).astype(q.dtype)
    o = _scaled(_einsum("bkgts,bskd->bkgtd", weights.astype(q.dtype), v), values.scale)
    return new_m, total * alpha + weights.sum(axis=-1), acc * alpha[..., None] + o


def _scaled(x, scale):
    return x if scale is None else x * scale


def _einsum(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _block_slots(layout):
    """Slots of a block: whole pages."""
    if isinstance(layout, Paged):
        columns = layout.page_table.shape[1]
        return min(columns, _BLOCK_SLOTS // layout.page_size) * layout.page_size
    return min(layout.capacity, _BLOCK_SLOTS)


def _slots_from(first, size, array, layout):
    """Slots `first` to `first + size - 1` of each sequence: [B, size, ...]."""
    if not isinstance(layout, Paged):
        return lax.dynamic_slice_in_dim(array, first, size, axis=1)
    pages = lax.dynamic_slice_in_dim(
        layout.page_table, first // layout.page_size, size // layout.page_size, axis=1
    )
    return dataclasses.replace(layout, page_table=pages).sequences(array)
