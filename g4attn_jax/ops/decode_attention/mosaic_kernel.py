"""What a program of `mosaic.py` does.

One warpgroup asks for tiles of 64 keys, in chunks of 128 numbers a key, as soon as a ring of them
has room. Two others multiply: each makes the scores of half of a tile's keys, they tell each other
the largest of a row and the weights, and each sums half of the values' columns, for which its
registers suffice.

The arithmetic is that of `g4attn_jax.ops.flash_attention.triton`, whose sources apply.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from g4attn_jax.layout import UNPLACED
from g4attn_jax.ops.flash_attention.tiles import Shape
from g4attn_jax.ops.flash_attention.triton import NO_SCORE

KEYS = 64  # of a tile
ROWS = 64  # of a program; those past T * G see nothing and are not stored
CHUNK = 128  # numbers of each key
LINE = 64  # numbers of 2 bytes in a line of shared memory that is swizzled
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 40, 232
_TILE = mg.Layout.WGMMA  # of [64, n] in registers
_OF_ROWS = _TILE.reduce(1)  # of [64]


class Sizes(NamedTuple):
    """What the kernel knows when it is compiled."""

    shape: Shape
    rotary_dim: int | None  # of a compact cache; None: keys and values are separate
    splits: int
    stages: int  # chunks in the ring

    @property
    def array_widths(self):
        """Of the cache's arrays, in the order in which a tile of them is loaded."""
        return (
            self.shape.head_dim,
            self.shape.head_dim if self.rotary_dim is None else self.rotary_dim,
        )

    @property
    def key_chunks(self):
        """Of a tile, its first; of a compact cache the first of them are the values'."""
        return (self.shape.head_dim + (self.rotary_dim or 0)) // CHUNK

    @property
    def value_chunks(self):
        """Of a tile."""
        return self.shape.head_dim // CHUNK

    @property
    def first_value(self):
        """Which chunk of a tile is the first of the values."""
        return self.key_chunks if self.rotary_dim is None else 0

    @property
    def chunks(self):
        """Of a tile."""
        return sum(self.array_widths) // CHUNK


class Inputs(NamedTuple):
    """What the kernel reads."""

    q: jax.Array  # [B, T, Nq, width]
    arrays: tuple[jax.Array, jax.Array]  # of the cache, [slots, Nkv * width]
    page_table: jax.Array | None  # int32 [B, pages]; None: sequence b has page b
    positions: jax.Array  # int32 [B, T]


class Shared(NamedTuple):
    """Shared memory of a program, and the barriers of what is in it."""

    q: Any  # [width / LINE, ROWS, LINE]
    ring_or_out: Any  # [stages, 2, KEYS, LINE], or [2, ROWS, LINE] of what is written in the end
    weights: Any  # [ROWS, KEYS]
    of_rows: Any  # [2, ROWS], from one multiplying warpgroup to the other
    loaded: Any  # a chunk
    used: Any  # a chunk, by both
    q_loaded: Any
    met: Any  # both multiplying warpgroups


def attend(inputs, o, log_sum, shared, *, sizes: Sizes, factor: float, interpret: bool):
    """A program.

    Args:
        factor: takes scores to those of exp2.
        interpret: whether JAX's interpreter runs it, which knows neither products of registers nor
            accumulators that hold something.
    """
    program, split = lax.axis_index("program"), lax.axis_index("split")
    heads = jnp.int32(sizes.shape.num_kv_heads)
    sequence, head = lax.div(program, heads), lax.rem(program, heads)
    positions = [inputs.positions[sequence, token] for token in range(sizes.shape.tokens)]
    newest = functools.reduce(jnp.maximum, positions)
    tiles = _Tiles.of_split(split, newest, sizes)

    def page_at(index):
        """The page of a tile of this split, or of its last one."""
        if inputs.page_table is None:
            return sequence
        index = jnp.maximum(jnp.minimum(index, tiles.count - 1), 0)
        place = lax.rem(tiles.first(index), jnp.int32(sizes.shape.columns * sizes.shape.page_size))
        return inputs.page_table[sequence, lax.div(place, jnp.int32(sizes.shape.page_size))]

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def _():
        mg.set_max_registers(_LOADER_REGISTERS, action="decrease")
        _load(inputs, shared, sizes, tiles, page_at, sequence, head)

    @pl.when(warpgroup < 2)
    def _():
        mg.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
        limit = _limits(positions, sizes)
        m, total, acc = _multiply(
            shared, sizes, tiles, page_at, warpgroup, limit, newest, factor, interpret
        )
        _store(o, log_sum, shared, sizes, sequence, head, split, warpgroup, limit, m, total, acc)


class _Tiles(NamedTuple):
    """The tiles of a split: how many, and which is the first."""

    count: jax.Array
    begin: jax.Array

    @classmethod
    def of_split(cls, split, newest, sizes):
        """Neighbouring ones, at most one more than another split has."""
        splits = jnp.int32(sizes.splits)
        count = jnp.where(newest >= 0, lax.div(newest, jnp.int32(KEYS)) + 1, 0)
        share, left = lax.div(count, splits), lax.rem(count, splits)
        return cls(share + (split < left), split * share + jnp.minimum(split, left))

    def first(self, index):
        """The first position of a tile."""
        return (self.begin + index) * KEYS


def _is_page(page, sizes):
    return (page >= 0) & (page < sizes.shape.num_pages)


def _load(inputs, shared, sizes, tiles, page_at, sequence, head):
    """Queries, then tile after tile, each chunk where one was that has been used."""
    ring, _ = shared.ring_or_out
    for line in range(shared.q.shape[0]):
        for token in range(sizes.shape.tokens):
            mg.copy_gmem_to_smem(
                inputs.q.at[
                    sequence,
                    token,
                    pl.ds(head * sizes.shape.group, sizes.shape.group),
                    pl.ds(line * LINE, LINE),
                ],
                shared.q.at[line, pl.ds(token * sizes.shape.group, sizes.shape.group)],
                shared.q_loaded,
            )

    def tile(index, page):
        page = jnp.where(_is_page(page, sizes), page, 0)
        place = lax.rem(tiles.first(index), jnp.int32(sizes.shape.page_size))
        slots = pl.ds(pl.multiple_of(page * sizes.shape.page_size + place, KEYS), KEYS)
        chunk = index * sizes.chunks
        for array, width in zip(inputs.arrays, sizes.array_widths, strict=True):
            for begin in range(0, width, CHUNK):
                stage = lax.rem(chunk, jnp.int32(sizes.stages))

                @pl.when(chunk >= sizes.stages)
                def _(stage=stage):
                    mg.barrier_wait(shared.used.at[stage])

                for half in range(CHUNK // LINE):
                    column = pl.multiple_of(head * width + begin + half * LINE, LINE)
                    mg.copy_gmem_to_smem(
                        array.at[slots, pl.ds(column, LINE)],
                        ring.at[stage, half],
                        shared.loaded.at[stage],
                    )
                chunk += 1
        return page_at(index + 1)

    lax.fori_loop(0, tiles.count, tile, page_at(0))
    count = tiles.count * sizes.chunks

    # JAX's interpreter wants the loader to see every phase of a barrier that it has waited for.
    def wait(chunk, _):
        mg.barrier_wait(shared.used.at[lax.rem(chunk, jnp.int32(sizes.stages))])

    lax.fori_loop(jnp.maximum(count - sizes.stages, 0), count, wait, None)


def _limits(positions, sizes):
    """The last position that a row sees, [ROWS]: less than 0 of padding."""
    row = mg.broadcasted_iota(jnp.int32, (ROWS, 8), 0, layout=_TILE)
    limit = mg.layout_cast(jnp.full((ROWS, 8), -1, jnp.int32), _TILE)
    for token, position in enumerate(positions):
        begin = token * sizes.shape.group
        limit = jnp.where((row >= begin) & (row < begin + sizes.shape.group), position, limit)
    return jnp.max(limit, axis=1)


def _multiply(shared, sizes, tiles, page_at, warpgroup, limit, newest, factor, interpret):
    """(m, sums of weights, sums of weighted values) of a split, the last of D / 2 columns."""
    ring, _ = shared.ring_or_out
    own_keys = KEYS // 2
    own_values = sizes.value_chunks // 2
    offset = warpgroup * own_keys + mg.broadcasted_iota(
        jnp.int32, (ROWS, own_keys), 1, layout=_TILE
    )
    key = mg.broadcasted_iota(jnp.int32, (KEYS, LINE), 0, layout=_TILE)
    mg.barrier_wait(shared.q_loaded)

    def tile(index, carry):
        m, total, page, *acc = carry
        first, exists = tiles.first(index), _is_page(page, sizes)
        next_page = page_at(index + 1)

        def stage(chunk):
            return lax.rem(index * sizes.chunks + chunk, jnp.int32(sizes.stages))

        def release(chunk):
            mg.barrier_arrive(shared.used.at[stage(chunk)])

        def scores(products):
            # None is released before all are there: the ring must hold the keys of a tile.
            for chunk in range(sizes.key_chunks):
                mg.barrier_wait(shared.loaded.at[stage(chunk)])
                for half in range(CHUNK // LINE):
                    keys = ring.at[stage(chunk), half, pl.ds(warpgroup * own_keys, own_keys)]
                    line = chunk * (CHUNK // LINE) + half
                    mg.wgmma(products, shared.q.at[line], keys.transpose((1, 0)))
            return products[...]

        x = pl.run_scoped(scores, mg.ACC((ROWS, own_keys), jnp.float32))
        # Values that are keys too are kept by the warpgroup that sums them.
        first_own = sizes.first_value + warpgroup * own_values
        for chunk in range(sizes.key_chunks):
            if sizes.first_value <= chunk < sizes.first_value + sizes.value_chunks:
                is_kept = (first_own <= chunk) & (chunk < first_own + own_values)
                pl.when(jnp.logical_not(is_kept))(functools.partial(release, chunk))
            else:
                release(chunk)

        visible = exists & (first + offset <= _along_rows(limit, x))
        x = jnp.where(visible, x * factor, NO_SCORE)
        largest = jnp.maximum(m, jnp.max(x, axis=1))
        new_m = jnp.maximum(largest, _of_other(shared, warpgroup, largest))
        alpha = jnp.exp2(m - new_m)
        weights = jnp.where(visible, jnp.exp2(x - _along_rows(new_m, x)), 0.0)
        total = total * alpha + jnp.sum(weights, axis=1)
        own = pl.ds(pl.multiple_of(warpgroup * own_keys, own_keys), own_keys)
        shared.weights.at[:, own][...] = weights.astype(shared.weights.dtype)

        for chunk in range(sizes.key_chunks, sizes.chunks):  # of values that are not keys
            mg.barrier_wait(shared.loaded.at[stage(chunk)])

        # A weight of 0 does not undo a NaN among values that no token sees.
        @pl.when(jnp.logical_not(exists) | (first + (KEYS - 1) > newest))
        def _():
            for chunk in range(own_values):
                for half in range(CHUNK // LINE):
                    lines = ring.at[stage(first_own + chunk), half]
                    values = mg.load(lines, layout=_TILE)
                    seen = exists & (first + key <= newest)
                    lines[...] = jnp.where(seen, values, jnp.zeros_like(values))

        mg.commit_smem()
        acc = [part * _along_rows(alpha, part) for part in acc]
        _meet(shared)
        weights = shared.weights
        if not interpret:
            weights = mg.load(weights, layout=_TILE, optimized=False)

        def add(sums):
            for i, part in enumerate(sums):
                chunk, half = divmod(i, CHUNK // LINE)
                mg.wgmma(part, weights, ring.at[stage(first_own + chunk), half])

        acc = _accumulate(acc, add, interpret)
        for chunk in range(own_values):
            release(first_own + chunk)
        if sizes.rotary_dim is None:  # the other warpgroup's values, which this one does not read
            for chunk in range(own_values):
                release(sizes.first_value + (1 - warpgroup) * own_values + chunk)
        return new_m, total, next_page, *acc

    m = mg.layout_cast(jnp.full(ROWS, NO_SCORE, jnp.float32), _OF_ROWS)
    total = mg.layout_cast(jnp.zeros(ROWS, jnp.float32), _OF_ROWS)
    zero = mg.layout_cast(jnp.zeros((ROWS, LINE), jnp.float32), _TILE)
    acc = [zero] * (sizes.shape.head_dim // 2 // LINE)
    m, total, _, *acc = lax.fori_loop(0, tiles.count, tile, (m, total, page_at(0), *acc))
    return m, total + _of_other(shared, warpgroup, total), acc


def _accumulate(parts, add, interpret):
    """What `add` adds to accumulators that hold some parts."""
    if not interpret:
        return pl.run_state(add)([mg.ACC.init(part) for part in parts])

    def products(*sums):
        add(sums)
        return [x[...] for x in sums]

    empty = [mg.ACC(part.shape, part.dtype) for part in parts]
    return [a + b for a, b in zip(parts, pl.run_scoped(products, *empty), strict=True)]


def _store(o, log_sum, shared, sizes, sequence, head, split, warpgroup, limit, m, total, acc):
    """What each split leaves: its part of the output, and log2 of the sum of exp of its scores."""
    _, out = shared.ring_or_out
    heads = pl.ds(head * sizes.shape.group, sizes.shape.group)
    divisor = jnp.where(total > 0, total, 1.0)  # padding sees nothing: 0
    share = jnp.where(limit == UNPLACED, jnp.nan, 1 / divisor)
    for i, part in enumerate(acc):
        out.at[warpgroup][...] = (part * _along_rows(share, part)).astype(out.dtype)
        mg.commit_smem()
        column = pl.multiple_of(warpgroup * (sizes.shape.head_dim // 2) + i * LINE, LINE)
        for token in range(sizes.shape.tokens):
            mg.copy_smem_to_gmem(
                out.at[warpgroup, pl.ds(token * sizes.shape.group, sizes.shape.group)],
                o.at[split, sequence, token, heads, pl.ds(column, LINE)],
            )
        mg.wait_smem_to_gmem(0)
    _meet(shared)  # the other's sums have been read

    @pl.when(warpgroup == 0)
    def _():
        shared.of_rows.at[0][...] = jnp.where(total > 0, m + jnp.log2(divisor), -jnp.inf)
        mg.commit_smem()
        for token in range(sizes.shape.tokens):
            mg.copy_smem_to_gmem(
                shared.of_rows.at[0, pl.ds(token * sizes.shape.group, sizes.shape.group)],
                log_sum.at[split, sequence, token, heads],
            )
        mg.wait_smem_to_gmem(0)


def _along_rows(of_rows, x):
    return lax.broadcast_in_dim(of_rows, x.shape, [0])


def _of_other(shared, warpgroup, of_rows):
    """What the other multiplying warpgroup has of each row."""
    shared.of_rows.at[warpgroup][...] = of_rows
    mg.commit_smem()
    _meet(shared)
    return mg.load(shared.of_rows.at[1 - warpgroup], layout=_OF_ROWS)


def _meet(shared):
    mg.barrier_arrive(shared.met)
    mg.barrier_wait(shared.met)
