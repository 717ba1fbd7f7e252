"""Flash-decoding over a cache: one launch over (sequence, KV head, split), one to combine splits.

A program takes the G query heads of a KV head for the T tokens of a sequence, and a part of the
positions that any of them sees. It goes through them in tiles with an on-line softmax:

    s_j  = scale q . k_j            -inf where the token does not see position j
    m'   = max(m, max_j s_j)
    l'   = l exp(m - m') + sum_j exp(s_j - m')
    acc' = acc exp(m - m') + sum_j exp(s_j - m') v_j

and leaves acc / l and m + log l, which the second launch weighs against those of the other splits.
With one split there is no second launch. Position p lies in slot p mod C of the sequence's pages,
so contiguous, ring and paged caches are read by one rule; positions that no token sees are never
read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.ops.head_norm.triton import iota, load
from g4attn_jax.ops.implementation import apart_if_float8

_LOG2_E = 1.4426950408889634
# Multiprocessors of an H200. This and the sizes in `choose_launch` are from a prototype's runs on
# one; there is no committed sweep yet.
_NUM_SMS = 132


class Launch(NamedTuple):
    """The shape of the main launch."""

    block_rows: int  # query rows of a program: tokens x query heads of a KV head
    block_keys: int  # keys of a tile
    num_splits: int  # programs that share the keys of a sequence and KV head
    num_warps: int
    num_stages: int


class _Inputs(NamedTuple):
    """What the main launch reads; None is not there."""

    q: jax.Array  # [B * T * Nq, width]
    keys: tuple[jax.Array, ...]  # [slots * Nkv, part of width]
    v: jax.Array | None  # [slots * Nkv, D]; None: the first of keys
    page_table: jax.Array | None  # int32 [B * pages]; None: sequence b has page b
    positions: jax.Array  # int32 [B * T]
    scale: jax.Array | None  # float32 [2], of K and of V


class _Shape(NamedTuple):
    """Sizes that the kernel knows when it is compiled."""

    tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_pages: int
    page_size: int
    columns: int  # of the page table

    @property
    def num_q_heads(self):
        return self.num_kv_heads * self.group


# Of `scale`, which are the keys' in order; the values' is the second.
_KEY_SCALES = {KVCache: (0,), CompactKVCache: (1, 0)}


def choose_launch(
    *,
    batch: int,
    num_kv_heads: int,
    rows: int,
    key_bytes: int,
    q_row_bytes: int,
    max_keys: int,
    num_splits: int | None = None,
) -> Launch:
    """The launch for a step.

    Tiles of up to 64 KiB of keys and values keep enough of them on their way from memory with two
    or three stages, within the shared memory of compute capability 8.0. There are as many programs
    as fit on the multiprocessors at once, one or two each: more wait, fewer leave some idle.

    Args:
        batch: sequences.
        num_kv_heads: Nkv.
        rows: query rows of a KV head: T * G.
        key_bytes: of a key and its value.
        q_row_bytes: of a query row.
        max_keys: the most keys that a sequence may have.
        num_splits: overrides the number of splits.
    """
    block_rows = min(max(16, pl.next_power_of_2(rows)), 32)
    block_keys = 16
    while block_keys < 64 and 2 * block_keys * key_bytes <= 2**16:
        block_keys *= 2
    num_stages = 3 if block_rows == 16 and block_keys == 32 else 2
    programs = batch * num_kv_heads * pl.cdiv(rows, block_rows)
    per_sm = 2 if num_stages * block_keys * key_bytes + block_rows * q_row_bytes < 2**17 else 1
    if num_splits is None:
        num_splits = max(1, round(per_sm * _NUM_SMS / programs))
        num_splits = min(num_splits, pl.cdiv(max_keys, 2 * block_keys))
    return Launch(block_rows, block_keys, num_splits, 4 if block_rows == 16 else 8, num_stages)


def decode_attention(
    q,
    cache,
    page_table,
    positions,
    *,
    sliding_window,
    scale,
    num_splits,
    interpret=False,
    launch=None,
):
    """See `g4attn_jax.ops.decode_attention`; `launch` overrides the heuristics, for tuning."""
    batch, tokens, num_q_heads, width = q.shape
    num_pages, page_size, num_kv_heads, head_dim = cache.v.shape
    if 0 in (batch, tokens):
        return jnp.zeros((*q.shape[:-1], head_dim), q.dtype)
    keys = [part.array for part in cache.key_parts]
    v_is_key = any(array is cache.v for array in keys)
    shape = _Shape(
        tokens=tokens,
        num_kv_heads=num_kv_heads,
        group=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        columns=1 if page_table is None else page_table.shape[1],
    )
    capacity = shape.columns * page_size
    if launch is None:
        itemsize = cache.v.dtype.itemsize
        launch = choose_launch(
            batch=batch,
            num_kv_heads=num_kv_heads,
            rows=tokens * shape.group,
            key_bytes=sum(pl.next_power_of_2(a.shape[-1]) for a in cache[:2]) * itemsize,
            q_row_bytes=width * q.dtype.itemsize,
            max_keys=capacity if sliding_window is None else min(capacity, sliding_window + tokens),
            num_splits=num_splits,
        )
    inputs = _Inputs(
        q=q.reshape(-1, width),
        keys=tuple(array.reshape(-1, array.shape[-1]) for array in keys),
        v=None if v_is_key else cache.v.reshape(-1, head_dim),
        page_table=None if page_table is None else page_table.reshape(-1),
        positions=positions.reshape(-1),
        scale=cache.scale,
    )
    rows, splits = batch * tokens * num_q_heads, launch.num_splits
    outputs = [
        jax.ShapeDtypeStruct((splits * rows, head_dim), jnp.float32 if splits > 1 else q.dtype)
    ]
    if splits > 1:
        outputs.append(jax.ShapeDtypeStruct((splits * rows,), jnp.float32))

    def run(inputs):
        parts = pl.pallas_call(
            functools.partial(
                _attend,
                shape=shape,
                sliding_window=sliding_window,
                softmax_scale=scale,
                key_scales=_KEY_SCALES[type(cache)],
                launch=launch,
            ),
            name="decode_attention",
            out_shape=outputs,
            grid=(batch * num_kv_heads * pl.cdiv(tokens * shape.group, launch.block_rows), splits),
            in_specs=(jax.tree.map(lambda _: pl.no_block_spec, inputs),),
            out_specs=[pl.no_block_spec] * len(outputs),
            compiler_params=plgpu.CompilerParams(
                num_warps=launch.num_warps, num_stages=launch.num_stages
            ),
            interpret=interpret,
        )(inputs)
        return parts[0] if splits == 1 else _combine(*parts, splits, q.dtype, interpret)

    return apart_if_float8(run, cache)(inputs).reshape(*q.shape[:-1], head_dim)


def _attend(inputs, *outputs, shape, sliding_window, softmax_scale, key_scales, launch):
    block, head, sequence = _program(shape, launch)
    positions, row_position, q_row, row_mask = _rows(inputs, shape, launch, block, head, sequence)
    newest = jnp.max(positions)
    oldest = jnp.int32(0)
    if sliding_window is not None:
        first = jnp.min(jnp.where(positions >= 0, positions, jnp.int32(2**31 - 1)))
        oldest = jnp.maximum(first - (sliding_window - 1), 0)
    start, stop = _tiles(oldest, newest, launch)
    dtype = inputs.q.dtype
    q_parts, begin = [], 0
    for ref in inputs.keys:
        q_parts.append(_load_rows(inputs.q, q_row, row_mask, begin, ref.shape[-1]))
        begin += ref.shape[-1]

    def tile(index, carry):
        m, total, acc = carry
        position = index * launch.block_keys + iota(launch.block_keys)
        exists = (position >= oldest) & (position <= newest)
        slot, exists = _slots(inputs, shape, sequence, position, exists)
        cache_row = slot * shape.num_kv_heads + head
        keys = [_load_rows(ref, cache_row, exists, 0, ref.shape[-1]) for ref in inputs.keys]
        v = keys[0]
        if inputs.v is not None:
            v = _load_rows(inputs.v, cache_row, exists, 0, shape.head_dim)
        scores = jnp.zeros((launch.block_rows, launch.block_keys), jnp.float32)
        for q, k, scale in zip(q_parts, keys, key_scales, strict=True):
            part = _dot(q, k.astype(dtype), trans_b=True)
            scores += part if inputs.scale is None else part * inputs.scale[scale]
        visible = exists[None, :] & (position[None, :] <= row_position[:, None])
        if sliding_window is not None:
            visible &= position[None, :] > row_position[:, None] - sliding_window
        scores = jnp.where(visible, scores * (softmax_scale * _LOG2_E), -jnp.inf)
        new_m = jnp.maximum(m, jnp.max(scores, axis=1))
        shift = jnp.where(new_m == -jnp.inf, 0.0, new_m)  # a row that has seen nothing yet
        alpha, weights = jnp.exp2(m - shift), jnp.exp2(scores - shift[:, None])
        total = total * alpha + jnp.sum(weights, axis=1)
        acc = acc * alpha[:, None] + _dot(weights.astype(dtype), v.astype(dtype))
        return new_m, total, acc

    m, total, acc = lax.fori_loop(
        start,
        stop,
        tile,
        (
            jnp.full((launch.block_rows,), -jnp.inf, jnp.float32),
            jnp.zeros((launch.block_rows,), jnp.float32),
            jnp.zeros((launch.block_rows, pl.next_power_of_2(shape.head_dim)), jnp.float32),
        ),
    )
    divisor = jnp.where(total > 0, total, 1.0)  # padding sees nothing: 0
    o = acc / divisor[:, None]
    if inputs.scale is not None:
        o *= inputs.scale[1]
    out_row = pl.program_id(1) * inputs.q.shape[0] + q_row
    _store_rows(outputs[0], out_row, row_mask, o, shape.head_dim)
    if launch.num_splits > 1:
        log_sum = jnp.where(total > 0, m + jnp.log2(divisor), -jnp.inf)
        plgpu.store(outputs[1].at[out_row], log_sum, mask=row_mask)


def _program(shape, launch):
    """Which block of query rows of which KV head of which sequence."""
    blocks = jnp.int32(pl.cdiv(shape.tokens * shape.group, launch.block_rows))
    program = pl.program_id(0)
    rest = lax.div(program, blocks)
    heads = jnp.int32(shape.num_kv_heads)
    return lax.rem(program, blocks), lax.rem(rest, heads), lax.div(rest, heads)


def _rows(inputs, shape, launch, block, head, sequence):
    """Positions of the sequence's tokens; of each query row; the rows of q; which of them exist."""
    first = sequence * shape.tokens
    token = iota(pl.next_power_of_2(shape.tokens))
    token_mask = None if token.size == shape.tokens else token < shape.tokens
    positions = load(inputs.positions.at[first + token], token_mask, token.shape, other=-1)
    row = block * launch.block_rows + iota(launch.block_rows)
    mask = row < shape.tokens * shape.group
    token, in_group = lax.div(row, jnp.int32(shape.group)), lax.rem(row, jnp.int32(shape.group))
    row_position = load(inputs.positions.at[first + token], mask, row.shape, other=-1)
    q_row = (first + token) * shape.num_q_heads + head * shape.group + in_group
    return positions, row_position, q_row, mask


def _tiles(oldest, newest, launch):
    """The tiles of positions of this split: the first and the one after the last."""
    keys, splits = jnp.int32(launch.block_keys), jnp.int32(launch.num_splits)
    first = lax.div(oldest, keys)
    count = jnp.where(newest >= 0, lax.div(newest, keys) + 1 - first, 0)
    share = lax.div(count + splits - 1, splits)
    start = pl.program_id(1) * share
    return first + start, first + jnp.minimum(start + share, count)


def _slots(inputs, shape, sequence, position, exists):
    """Slots of positions, and which of them exist: page by page, whatever the layout."""
    place = lax.rem(position, jnp.int32(shape.columns * shape.page_size))
    if inputs.page_table is None:
        return sequence * shape.page_size + place, exists
    page_size = jnp.int32(shape.page_size)
    entry = sequence * shape.columns + lax.div(place, page_size)
    page = load(inputs.page_table.at[entry], exists, entry.shape, other=-1)
    exists &= (page >= 0) & (page < shape.num_pages)
    return jnp.where(exists, page, 0) * page_size + lax.rem(place, page_size), exists


def _dot(a, b, trans_b=False):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision).astype(jnp.float32)


def _load_rows(ref, row, mask, begin, width):
    """Columns `begin` to `begin + width - 1` of some rows, zero where masked and past the width."""
    padded = pl.next_power_of_2(width)
    column, mask = begin + iota(padded)[None, :], mask[:, None]
    if padded != width:
        mask = mask & (column < begin + width)
    rows, shape = ref.at[row[:, None], column], (row.size, padded)
    if ref.dtype.itemsize > 1:
        return load(rows, mask, shape)
    # Triton has no float8 zero to load instead.
    mask = jnp.broadcast_to(mask, shape)
    return jnp.where(mask, plgpu.load(rows, mask=mask).astype(jnp.float32), 0)


def _store_rows(ref, row, mask, x, width):
    column, mask = iota(x.shape[1])[None, :], mask[:, None]
    if x.shape[1] != width:
        mask = mask & (column < width)
    plgpu.store(
        ref.at[row[:, None], column], x.astype(ref.dtype), mask=jnp.broadcast_to(mask, x.shape)
    )


def _combine(o, log_sum, splits, dtype, interpret):
    """sum_i 2^log_sum_i o_i / sum_i 2^log_sum_i over the splits i of each row."""
    rows, head_dim = o.shape[0] // splits, o.shape[1]

    def body(o_ref, log_sum_ref, out_ref):
        split = iota(pl.next_power_of_2(splits))
        exists = split < splits
        part = split * rows + pl.program_id(0)
        x = load(log_sum_ref.at[part], exists, split.shape, other=-jnp.inf)
        largest = jnp.max(x)
        weight = jnp.exp2(x - jnp.where(largest == -jnp.inf, 0.0, largest))
        total = jnp.sum(weight)
        parts = _load_rows(o_ref, part, exists, 0, head_dim)
        combined = jnp.sum(parts * weight[:, None], axis=0) / jnp.where(total > 0, total, 1.0)
        row = jnp.full((1,), pl.program_id(0), jnp.int32)
        _store_rows(out_ref, row, row >= 0, combined[None, :], head_dim)

    return pl.pallas_call(
        body,
        name="combine_splits",
        out_shape=jax.ShapeDtypeStruct((rows, head_dim), dtype),
        grid=(rows,),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(o, log_sum)
