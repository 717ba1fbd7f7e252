"""Flash attention over a cache: programs of (query rows of a KV head, columns of values, split).

A program takes a block of the query rows of a KV head of a sequence, a row being a token and a
query head of the group, and an n-th of the tiles of positions that any of its tokens sees, n being
the number of splits:

    s_j  = scale q . k_j            -inf where the token does not see position j
    m'   = max(m, max_j s_j)
    l_j' = l_j exp(m - m') + exp(s_j - m')
    acc' = acc exp(m - m') + sum_j exp(s_j - m') v_j

which leaves o = acc / l and log_sum = m + log l, l being the sum of all l_j. The scores of one tile
exist at a time. Position p lies in slot p mod C of the sequence's pages, so contiguous, ring and
paged caches are read by one rule. Of what no token sees the kernel reads keys alone, of separate
caches without a window, and makes nothing of them: the rest of the last tile, page 0 for a hole in
a page table, one tile where a program has none.

Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning"
(2023); Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.layout import UNPLACED
from g4attn_jax.ops.flash_attention.launch import Launch
from g4attn_jax.ops.flash_attention.tiles import (
    KEY_SCALES,
    load_rows,
    operands,
    pages,
    slots,
    store_rows,
)
from g4attn_jax.ops.head_norm.triton import iota, load
from g4attn_jax.ops.matmul_tiles.triton import dot, pad

LOG2_E = 1.4426950408889634
# Below every score, and finite: of a row that has seen nothing yet exp(-inf - m) is 0.
NO_SCORE = float(jnp.finfo(jnp.float32).min)


def flash_attention(
    q, cache, page_table, positions, *, sliding_window, scale, launch: Launch, name, interpret
) -> tuple[jax.Array, jax.Array | None]:
    """One launch for arguments of `g4attn_jax.ops.decode_attention`.

    Returns:
        With one split o [B, T, Nq, D] in q's dtype and None. With more their parts, float32
        [splits, B, T, Nq, D], and log2 of the sum of exp of their scores, [splits, B, T, Nq].
    """
    inputs, shape = operands(q, cache, page_table, positions)
    splits, rows = launch.num_splits, q.shape[0] * shape.num_q_heads * shape.tokens
    outputs = [
        jax.ShapeDtypeStruct(
            (splits * rows, shape.head_dim), jnp.float32 if splits > 1 else q.dtype
        )
    ]
    if splits > 1:
        outputs.append(jax.ShapeDtypeStruct((splits * rows,), jnp.float32))
    blocks = pl.cdiv(shape.tokens * shape.group, launch.block_rows)
    o, *log_sum = pl.pallas_call(
        functools.partial(
            _attend,
            shape=shape,
            sliding_window=sliding_window,
            softmax_scale=scale,
            key_scales=KEY_SCALES[type(cache)],
            launch=launch,
        ),
        name=name,
        out_shape=outputs,
        grid=(q.shape[0] * shape.num_kv_heads * blocks * launch.value_blocks, splits),
        in_specs=(jax.tree.map(lambda _: pl.no_block_spec, inputs),),
        out_specs=[pl.no_block_spec] * len(outputs),
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        interpret=interpret,
    )(inputs)
    if splits == 1:
        return o.reshape(*q.shape[:-1], shape.head_dim), None
    return o.reshape(splits, *q.shape[:-1], shape.head_dim), log_sum[0].reshape(-1, *q.shape[:-1])


def _attend(inputs, *outputs, shape, sliding_window, softmax_scale, key_scales, launch):
    value_block, block, head, sequence = _program(inputs, shape, launch)
    row_position, q_row, row_mask = _rows(inputs, shape, launch, block, head, sequence)
    newest, oldest = jnp.max(row_position), jnp.int32(0)
    if sliding_window is not None:
        first = jnp.min(jnp.where(row_position >= 0, row_position, newest))
        oldest = jnp.maximum(first - (sliding_window - 1), 0)
    # Without pages, tiles of a window begin at its oldest key. All others begin at multiples of
    # their size, so that one lies in one page, or in whole pages.
    aligned = sliding_window is None or inputs.page_table is not None
    start = oldest - lax.rem(oldest, jnp.int32(launch.block_keys)) if aligned else oldest
    tiles = _tiles(inputs, start, newest, launch)
    dtype = inputs.q.dtype
    value_width = shape.head_dim // launch.value_blocks
    value_column = 0 if launch.value_blocks == 1 else value_block * value_width
    parts = _key_parts(inputs, key_scales)
    q_parts = [load_rows(inputs.q, q_row, row_mask, part.begin, part.width) for part in parts]
    factors = [softmax_scale * LOG2_E] * len(parts)
    if inputs.scale is not None:
        factors = [softmax_scale * LOG2_E * inputs.scale[part.scale] for part in parts]

    def page_at(first):
        return pages(inputs, shape, sequence, first, launch.block_keys)

    # A page is looked up a tile ahead: what waits for the table would keep the products waiting.
    # Keys may be anything where no token sees them: their scores are not used. A weight of 0 does
    # not undo a NaN among values.
    def tile(index, carry):
        m, totals, acc, page = carry
        first = tiles.begin + index * tiles.step
        next_page = page_at(first + tiles.step)
        position = first + iota(launch.block_keys)
        exists = (position >= oldest) & (position <= newest)
        slot, exists = slots(
            shape, sequence, page, first, launch.block_keys, exists, aligned=aligned
        )
        cache_row = slot * shape.num_kv_heads + head
        needed = exists if inputs.v is None or sliding_window is not None else None
        keys = [load_rows(part.array, cache_row, needed, 0, part.width) for part in parts]
        v = keys[0]
        if inputs.v is not None:
            v = load_rows(inputs.v, cache_row, exists, value_column, value_width)
        products = [
            dot(q, k.astype(dtype), trans_b=True) for q, k in zip(q_parts, keys, strict=True)
        ]

        def softmax():
            visible = exists[None, :] & (position[None, :] <= row_position[:, None])
            if sliding_window is not None:
                visible &= position[None, :] > row_position[:, None] - sliding_window
            scaled = [x * factor for x, factor in zip(products, factors, strict=True)]
            scores = jnp.where(visible, functools.reduce(operator.add, scaled), -jnp.inf)
            new_m = jnp.maximum(m, jnp.max(scores, axis=1))
            alpha, weights = jnp.exp2(m - new_m), jnp.exp2(scores - new_m[:, None])
            sums = _partial_sums(weights, launch)
            sums += totals * (alpha if totals.ndim == 1 else alpha[:, None])
            return new_m, sums, alpha, weights.astype(dtype)

        def unseen():
            return m, totals, jnp.ones_like(m), jnp.zeros(products[0].shape, dtype)

        # Where one product feeds another, Triton gives each warp rows of its own, and warps for
        # which there are no rows repeat the work of others. It does not look through a branch.
        if launch.warps_share_rows:
            new_m, totals, alpha, weights = lax.cond(first <= newest, softmax, unseen)
        else:
            new_m, totals, alpha, weights = softmax()
        acc = acc * alpha[:, None] + dot(weights, v.astype(dtype))
        return new_m, totals, acc, next_page

    nothing = jnp.zeros((launch.block_rows, launch.block_keys), jnp.float32)
    # Without tiles one that no token sees: were there a way around the loop, on which something
    # else sets the accumulators, ptxas would have each product of 8 warps end before the next
    # (C7515), and have each thread of 4 work out where its operands are.
    count = jnp.maximum(tiles.count, 1) if launch.block_rows >= 64 else tiles.count
    m, totals, acc, _ = lax.fori_loop(
        0,
        count,
        tile,
        (
            jnp.full((launch.block_rows,), NO_SCORE, jnp.float32),
            _partial_sums(nothing, launch),
            jnp.zeros((launch.block_rows, pad(value_width)), jnp.float32),
            page_at(tiles.begin),
        ),
    )
    total = totals if totals.ndim == 1 else jnp.sum(totals, axis=1)
    divisor = jnp.where(total > 0, total, 1.0)  # padding sees nothing: 0
    o = acc / divisor[:, None]
    if inputs.scale is not None:
        o *= inputs.scale[1]
    o = jnp.where((row_position == UNPLACED)[:, None], jnp.nan, o)
    out_row = pl.program_id(1) * inputs.q.shape[0] + q_row
    store_rows(outputs[0], out_row, row_mask, o, value_column, value_width)
    if launch.num_splits > 1:
        log_sum = jnp.where(total > 0, m + jnp.log2(divisor), -jnp.inf)
        if launch.value_blocks > 1:
            row_mask &= value_block == 0  # another block's is the same
        plgpu.store(outputs[1].at[out_row], log_sum, mask=row_mask)


def _partial_sums(weights, launch):
    """Sums of rows, or what is summed in the end where that saves a round between the warps."""
    is_row_in_warp = launch.block_rows >= 64 and not launch.warps_share_rows
    return jnp.sum(weights, axis=1) if is_row_in_warp else weights


class _KeyPart(NamedTuple):
    """An array that queries are multiplied with."""

    array: jax.Array
    scale: int  # which of the cache's
    begin: int  # of its columns in q
    width: int


def _key_parts(inputs, key_scales):
    """What makes the scores; what is a value too comes first."""
    parts, begin = [], 0
    for array, scale in zip(inputs.keys, key_scales, strict=True):
        parts.append(_KeyPart(array, scale, begin, array.shape[-1]))
        begin += array.shape[-1]
    return parts


def _program(inputs, shape, launch):
    """Which block of values of which block of query rows of which KV head of which sequence.

    Those that read the same keys and values are next to each other, to find them in the L2. The
    last block of rows comes first: it has the most keys to go through, and what starts last should
    be short.
    """
    heads = inputs.q.shape[0] // (shape.tokens * shape.group)  # of all sequences
    blocks = pl.cdiv(shape.tokens * shape.group, launch.block_rows)
    program, indices = pl.program_id(0), []
    for size in (launch.value_blocks, shape.num_kv_heads, heads // shape.num_kv_heads):
        indices.append(lax.rem(program, jnp.int32(size)))
        program = lax.div(program, jnp.int32(size))
    value_block, head, sequence = indices
    return value_block, blocks - 1 - program, head, sequence


def _rows(inputs, shape, launch, block, head, sequence):
    """Positions of the query rows, where in q they are, and which of them exist."""
    row, group = block * launch.block_rows + iota(launch.block_rows), jnp.int32(shape.group)
    mask = row < shape.tokens * shape.group
    token = sequence * shape.tokens + lax.div(row, group)
    position = load(inputs.positions.at[token], mask, row.shape, other=-1)
    q_row = token * shape.num_q_heads + head * shape.group + lax.rem(row, group)
    return position, q_row, mask


class _Tiles(NamedTuple):
    """The tiles of a split: how many, the first position of the first, and from one to the next."""

    count: jax.Array
    begin: jax.Array
    step: int


def _tiles(inputs, start, newest, launch):
    """Those of this split of all from `start` to `newest`; at most one more than another has.

    The programs of a sequence read neighbouring tiles at a time. But pages lie anywhere: of them a
    program has its tiles side by side, as their pages are in the page table.
    """
    keys, splits, split = launch.block_keys, jnp.int32(launch.num_splits), pl.program_id(1)
    count = jnp.where(newest >= start, lax.div(newest - start, jnp.int32(keys)) + 1, 0)
    share, left = lax.div(count, splits), lax.rem(count, splits)
    own = share + (split < left)
    if inputs.page_table is None:
        return _Tiles(own, start + split * keys, launch.num_splits * keys)
    return _Tiles(own, start + (split * share + jnp.minimum(split, left)) * keys, keys)
