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
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch
from g4attn_jax.ops.flash_attention.operands import (
    LOG2_E,
    NO_SCORE,
    AttentionShape,
    operands,
)
from g4attn_jax.ops.flash_attention.triton_rows import load_rows, pages, slots, store_rows
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.triton_tiles import dot, first_program_id, iota, load, may_start_next


def flash_attention(
    q,
    cache,
    page_table,
    positions,
    *,
    sliding_window,
    scale,
    launch: AttentionLaunch,
    name,
    interpret,
) -> tuple[jax.Array, jax.Array | None]:
    """Launches the kernel for arguments of `g4attn_jax.ops.decode_attention`.

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
    static = _Static(shape, launch, sliding_window, scale, may_start_next(interpret))
    o, *log_sum = pl.pallas_call(
        functools.partial(_attend, static=static),
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


class _Static(NamedTuple):
    """Constants of a launch."""

    shape: AttentionShape
    launch: AttentionLaunch
    sliding_window: int | None
    softmax_scale: float
    starts_next: bool

    @property
    def value_width(self):
        """Columns of the values of a program."""
        return self.shape.head_dim // self.launch.value_blocks


def _attend(inputs, *outputs, static):
    """Runs a program: its query rows over its tiles."""
    value_block, block, head, sequence = _program(inputs, static)
    rows = _Rows.of(inputs, static, block, head, sequence)
    value_column = 0 if static.launch.value_blocks == 1 else value_block * static.value_width
    accumulators = _over_tiles(inputs, static, rows, head, sequence, value_column)
    _store(inputs, outputs, static, rows, value_block, value_column, accumulators)


def _over_tiles(inputs, static, rows, head, sequence, value_column):
    """On-line softmax over the tiles of this split."""
    launch = static.launch
    newest, oldest = rows.limits(static)
    # Without pages, tiles of a window begin at its oldest key. All others begin at multiples of
    # their size, so that one lies in one page, or in whole pages.
    aligned = static.sliding_window is None or inputs.page_table is not None
    start = oldest - lax.rem(oldest, jnp.int32(launch.block_keys)) if aligned else oldest
    tiles = _Tiles.of_split(inputs, start, newest, launch)
    queries = _Queries.of(inputs, static, rows)

    def page_at(first):
        return pages(inputs, static.shape, sequence, first, launch.block_keys)

    # A page is looked up a tile ahead: what waits for the table would keep the products waiting.
    def tile(index, carry):
        accumulators, page = carry
        first = tiles.begin + index * tiles.step
        next_page = page_at(first + tiles.step)
        position = first + iota(launch.block_keys)
        exists = (position >= oldest) & (position <= newest)
        slot, exists = slots(
            static.shape, sequence, page, first, launch.block_keys, exists, aligned=aligned
        )
        cache_row = slot * static.shape.num_kv_heads + head
        keys, v = _load_tile(inputs, static, cache_row, exists, value_column)
        products = queries.products(keys)

        def scores():
            return queries.scores(products, position, exists)

        is_seen = first <= newest if launch.warps_share_rows else None
        return accumulators.with_tile(scores, v, launch, inputs.q.dtype, is_seen), next_page

    # Without tiles one that no token sees: were there a way around the loop, on which something
    # else sets the accumulators, ptxas would have each product of 8 warps end before the next
    # (C7515), and have each thread of 4 work out where its operands are.
    count = jnp.maximum(tiles.count, 1) if launch.block_rows >= 64 else tiles.count
    carry = _Accumulators.empty(static), page_at(tiles.begin)
    return lax.fori_loop(0, count, tile, carry)[0]


class _Accumulators(NamedTuple):
    """Sums of the on-line softmax of a program's rows."""

    m: jax.Array  # [rows], the largest score
    totals: jax.Array  # sums of weights, as `_row_sums` leaves them
    acc: jax.Array  # [rows, columns of values], weighted values

    @classmethod
    def empty(cls, static):
        """Accumulators before the first tile."""
        launch = static.launch
        nothing = jnp.zeros((launch.block_rows, launch.block_keys), jnp.float32)
        return cls(
            jnp.full((launch.block_rows,), NO_SCORE, jnp.float32),
            _row_sums(nothing, launch),
            jnp.zeros((launch.block_rows, pad(static.value_width)), jnp.float32),
        )

    def with_tile(self, scores, v, launch, dtype, is_seen):
        """Accumulators after one more tile.

        Args:
            scores: function without arguments that returns the scores of the tile.
            v: values of the tile.
            launch: of the kernel.
            dtype: of products with v.
            is_seen: whether a token sees the tile, where warps share rows; else None.
        """

        def softmax():
            return self._softmax(scores(), launch, dtype)

        def unseen():
            shape = launch.block_rows, launch.block_keys
            return self.m, self.totals, jnp.ones_like(self.m), jnp.zeros(shape, dtype)

        # Where one product feeds another, Triton gives each warp rows of its own, and warps for
        # which there are no rows repeat the work of others. It does not look through a branch.
        if launch.warps_share_rows:
            m, totals, alpha, weights = lax.cond(is_seen, softmax, unseen)
        else:
            m, totals, alpha, weights = softmax()
        acc = self.acc * alpha[:, None] + dot(weights, v.astype(dtype))
        return _Accumulators(m, totals, acc)

    def _softmax(self, scores, launch, dtype):
        """New m and totals, the factor of what was accumulated, and weights of a tile."""
        m = jnp.maximum(self.m, jnp.max(scores, axis=1))
        alpha, weights = jnp.exp2(self.m - m), jnp.exp2(scores - m[:, None])
        totals = _row_sums(weights, launch)
        totals += self.totals * (alpha if self.totals.ndim == 1 else alpha[:, None])
        return m, totals, alpha, weights.astype(dtype)


def _load_tile(inputs, static, cache_row, exists, value_column):
    """Keys, one array a part, and values of a tile.

    Keys may be anything where no token sees them: their scores are not used. A weight of 0 does not
    undo a NaN among values.
    """
    needed = exists if inputs.v is None or static.sliding_window is not None else None
    parts = zip(inputs.keys, static.shape.key_parts, strict=True)
    keys = [load_rows(array, cache_row, needed, 0, part.width) for array, part in parts]
    if inputs.v is None:
        return keys, keys[0]
    return keys, load_rows(inputs.v, cache_row, exists, value_column, static.value_width)


def _store(inputs, outputs, static, rows, value_block, value_column, accumulators):
    """Stores o, and with several splits log2 of the sum of exp of the scores."""
    m, totals, acc = accumulators
    total = totals if totals.ndim == 1 else jnp.sum(totals, axis=1)
    divisor = jnp.where(total > 0, total, 1.0)  # padding sees nothing: 0
    o = acc / divisor[:, None]
    if inputs.scale is not None:
        o *= inputs.scale[static.shape.value_scale_index]
    o = jnp.where((rows.position == UNPLACED)[:, None], jnp.nan, o)
    out_row = pl.program_id(1) * inputs.q.shape[0] + rows.q_row
    store_rows(outputs[0], out_row, rows.mask, o, value_column, static.value_width)
    if static.launch.num_splits > 1:
        log_sum, mask = jnp.where(total > 0, m + jnp.log2(divisor), -jnp.inf), rows.mask
        if static.launch.value_blocks > 1:
            mask &= value_block == 0  # another block's is the same
        plgpu.store(outputs[1].at[out_row], log_sum, mask=mask)


def _row_sums(weights, launch):
    """Sums of rows, or what is summed in the end where that saves a round between the warps."""
    is_row_in_warp = launch.block_rows >= 64 and not launch.warps_share_rows
    return jnp.sum(weights, axis=1) if is_row_in_warp else weights


class _Queries(NamedTuple):
    """Query rows of a program, ready for products with keys."""

    q_parts: list[jax.Array]  # [rows, width of a part]
    factors: list[jax.Array | float]  # of each part's products
    row_position: jax.Array
    sliding_window: int | None

    @classmethod
    def of(cls, inputs, static, rows):
        """Loads the query rows."""
        parts = static.shape.key_parts
        q_parts = [
            load_rows(inputs.q, rows.q_row, rows.mask, part.begin, part.width) for part in parts
        ]
        factors = [static.softmax_scale * LOG2_E] * len(parts)
        if inputs.scale is not None:
            factors = [
                static.softmax_scale * LOG2_E * inputs.scale[part.scale_index] for part in parts
            ]
        return cls(q_parts, factors, rows.position, static.sliding_window)

    def products(self, keys):
        """Queries times keys, one product a part."""
        pairs = zip(self.q_parts, keys, strict=True)
        return [dot(q, k.astype(q.dtype), trans_b=True) for q, k in pairs]

    def scores(self, products, position, exists):
        """Scores for exp2, -inf where a token does not see a position."""
        row_position = self.row_position
        visible = exists[None, :] & (position[None, :] <= row_position[:, None])
        if self.sliding_window is not None:
            visible &= position[None, :] > row_position[:, None] - self.sliding_window
        scaled = [x * factor for x, factor in zip(products, self.factors, strict=True)]
        return jnp.where(visible, functools.reduce(operator.add, scaled), -jnp.inf)


def _program(inputs, static):
    """Block of values, block of query rows, KV head and sequence of this program.

    Those that read the same keys and values are next to each other, to find them in the L2. The
    last block of rows comes first: it has the most keys to go through, and what starts last should
    be short.
    """
    shape, launch = static.shape, static.launch
    heads = inputs.q.shape[0] // (shape.tokens * shape.group)  # of all sequences
    blocks = pl.cdiv(shape.tokens * shape.group, launch.block_rows)
    program, indices = first_program_id(static.starts_next), []
    for size in (launch.value_blocks, shape.num_kv_heads, heads // shape.num_kv_heads):
        indices.append(lax.rem(program, jnp.int32(size)))
        program = lax.div(program, jnp.int32(size))
    value_block, head, sequence = indices
    return value_block, blocks - 1 - program, head, sequence


class _Rows(NamedTuple):
    """Query rows of a program."""

    position: jax.Array
    q_row: jax.Array  # where in q they are
    mask: jax.Array  # which of them exist

    @classmethod
    def of(cls, inputs, static, block, head, sequence):
        """Rows of a block of a KV head of a sequence."""
        shape, block_rows = static.shape, static.launch.block_rows
        row, group = block * block_rows + iota(block_rows), jnp.int32(shape.group)
        mask = row < shape.tokens * shape.group
        token = sequence * shape.tokens + lax.div(row, group)
        position = load(inputs.positions.at[token], mask, row.shape, other=-1)
        q_row = token * shape.num_q_heads + head * shape.group + lax.rem(row, group)
        return cls(position, q_row, mask)

    def limits(self, static):
        """Newest and oldest position that any of the rows sees."""
        newest, oldest = jnp.max(self.position), jnp.int32(0)
        if static.sliding_window is not None:
            first = jnp.min(jnp.where(self.position >= 0, self.position, newest))
            oldest = jnp.maximum(first - (static.sliding_window - 1), 0)
        return newest, oldest


class _Tiles(NamedTuple):
    """Tiles of a split."""

    count: jax.Array
    begin: jax.Array  # first position of the first
    step: int  # from one to the next

    @classmethod
    def of_split(cls, inputs, start, newest, launch):
        """Tiles of this split of all from `start` to `newest`; at most one more than another has.

        The programs of a sequence read neighbouring tiles at a time. But pages lie anywhere: of
        them a program has its tiles side by side, as their pages are in the page table.
        """
        keys, splits, split = launch.block_keys, jnp.int32(launch.num_splits), pl.program_id(1)
        count = jnp.where(newest >= start, lax.div(newest - start, jnp.int32(keys)) + 1, 0)
        share, left = lax.div(count, splits), lax.rem(count, splits)
        own = share + (split < left)
        if inputs.page_table is None:
            return cls(own, start + split * keys, launch.num_splits * keys)
        return cls(own, start + (split * share + jnp.minimum(split, left)) * keys, keys)
