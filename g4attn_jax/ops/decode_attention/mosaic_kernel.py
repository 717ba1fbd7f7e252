"""Program of the Mosaic GPU kernel for decode attention of several tokens.

One warpgroup loads tiles of 64 keys, in chunks of 128 numbers a key, as soon as a ring of them has
room. Two others multiply. Each makes the scores of every second tile and publishes their weights,
and each sums half of the values' columns, for which its registers suffice, of all tiles. A
warpgroup sums the tile before its own before it makes the scores of its own: the ring is short, and
lets go of a tile when its values have been summed.

    time            ------------------------------------------------------------------------->
    loader          k0 v0   k1 v1   k2 v2   k3 v3          each chunk when its place is free
    warpgroup 0     s0 p0 a0           a1 s2 p2 a2            a3 s4 p4 a4
    warpgroup 1              a0 s1 p1 a1           a2 s3 p3 a3           a4

    kN, vN   chunks of the keys and values of tile N; a compact cache has v once, for both
    sN       scores of tile N: products of queries and keys, softmax
    pN       weights of tile N, and the largest score of each row so far, in shared memory
    aN       half of the columns of tile N's values, times its weights, added to the sums

    barrier         who arrives                     who waits              what it says
    q_loaded        TMA, once a chunk               both multipliers       queries are there
    loaded[stage]   TMA                             both multipliers       a chunk is there
    used[stage]     both multipliers of the block   loader, before it      a chunk has been read
                    (of a cluster, of both)         loads the next there
    published[w]    warpgroup w, after pN           the other, before aN   pN is there
    met             both multipliers                both, in the end       sums of weights are there

`pN` needs no barrier against being overwritten: who writes p(N+1) is who has read pN before.

The queries come before all tiles, behind which they would wait, and like the output in one copy of
all tokens for each chunk: a copy takes a while to be asked for.

More than 64 query rows go to the two blocks of a cluster, half of the tokens to each, and to both
the middle one of an odd number, which the second writes. Each block loads half of every chunk, for
both.

The arithmetic is that of `g4attn_jax.ops.flash_attention.triton`, whose sources apply; that one
warpgroup multiplies while another takes exponentials is from Shah et al., "FlashAttention-3: fast
and accurate attention with asynchrony and low-precision" (2024).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from g4attn_jax.layout import UNPLACED
from g4attn_jax.ops.decode_attention.mosaic_limits import CHUNK, KEYS, ROWS
from g4attn_jax.ops.flash_attention.operands import NO_SCORE, AttentionShape

_HALF = CHUNK // 2
# Of shared memory, beside queries and ring: weights, numbers of rows, barriers, their alignment.
_OTHER_BYTES = 54 * 256
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 40, 232
_TILE = mg.Layout.WGMMA  # of [64, n] in registers
_OF_ROWS = _TILE.reduce(1)  # of [64]
# Bytes of which TMA's addresses in shared memory are multiples (NVIDIA, "CUDA C++ programming
# guide", tensor memory access); another is CUDA_ERROR_MISALIGNED_ADDRESS, and the process is lost.
_TMA_ALIGNMENT = 128


class MosaicSizes(NamedTuple):
    """Constants of a launch."""

    shape: AttentionShape
    rotary_dim: int | None  # of a compact cache; None: keys and values are separate
    blocks: int  # that share the tokens, and what they load
    splits: int
    shared_memory: int  # bytes, of a program
    # Whether JAX's interpreter runs it, which knows neither products of registers, nor accumulators
    # that hold something, nor shared memory seen in another shape.
    interpret: bool

    @property
    def tokens(self):
        """Tokens of a block."""
        return pl.cdiv(self.shape.tokens, self.blocks)

    @property
    def rows(self):
        """Query rows of a block."""
        return self.tokens * self.shape.group

    @property
    def padded_tokens(self):
        """Tokens that have ROWS query rows."""
        return ROWS // self.shape.group

    @property
    def q_tokens(self):
        """Tokens of shared memory for queries, chunk after chunk; the last chunk is padded because
        every read spans ROWS rows."""
        return (self.key_chunks - 1) * self.tokens + self.padded_tokens

    def lines(self, tokens):
        """Shape in which shared memory has the rows of tokens, to be copied as they are in q."""
        group = self.shape.group
        return (tokens * group,) if self.interpret else (tokens, group)

    def as_lines(self, ref):
        """View of shared memory of `lines` that has one dimension of them."""
        if self.interpret:
            return ref
        tokens, group, *others = ref.shape
        return ref.reshape(tokens * group, *others)

    @property
    def stages(self):
        """Chunks in the ring."""
        queries = 2 * self.q_tokens * self.shape.group * CHUNK
        return (self.shared_memory - queries - _OTHER_BYTES) // (2 * KEYS * CHUNK)

    @property
    def array_widths(self):
        """Widths of the cache's arrays, in the order in which a tile is loaded: values last."""
        head_dim = self.shape.head_dim
        return head_dim if self.rotary_dim is None else self.rotary_dim, head_dim

    @property
    def key_chunks(self):
        """Number of key chunks per tile; in a compact cache the last are also the values."""
        return (self.shape.head_dim + (self.rotary_dim or 0)) // CHUNK

    @property
    def value_chunks(self):
        """Number of value chunks per tile, which are its last."""
        return self.shape.head_dim // CHUNK

    @property
    def first_value(self):
        """Index of the first value chunk of a tile."""
        return self.array_widths[0] // CHUNK

    @property
    def chunks(self):
        """Number of chunks per tile."""
        return sum(self.array_widths) // CHUNK

    def q_chunk(self, chunk):
        """Index of the query chunk that a chunk is multiplied with: q has the values' first."""
        return chunk if self.rotary_dim is None else (chunk - self.first_value) % self.key_chunks

    def first_stage(self, index):
        """Place in the ring of a tile's first chunk."""
        return lax.rem(index * self.chunks, jnp.int32(self.stages))

    def stage(self, first, chunk):
        """Place of another chunk. A remainder for each would keep the products waiting."""
        stage = first + chunk
        return jnp.where(stage < self.stages, stage, stage - self.stages)


class MosaicInputs(NamedTuple):
    """Arrays that the kernel reads."""

    q: jax.Array  # [B * T, Nq, width]
    arrays: tuple[jax.Array, jax.Array]  # of the cache, [slots, Nkv * width]
    page_table: jax.Array | None  # int32 [B, pages]; None: sequence b has page b
    positions: jax.Array  # int32 [B, T]


class Shared(NamedTuple):
    """Shared memory of a program, and the barriers of what is in it."""

    q: Any  # [*lines(q_tokens), CHUNK]
    # [stages, KEYS, CHUNK], or [2, 2, *lines(padded_tokens), CHUNK] of what is written in the end
    ring_or_out: Any
    weights: Any  # [ROWS, KEYS], of a tile, from one multiplying warpgroup to the other
    largest: Any  # [ROWS], so far, likewise
    totals: Any  # [2, ROWS], likewise
    log_sum: Any  # lines(padded_tokens), as it is written in the end
    loaded: Any  # a chunk
    used: Any  # a chunk, by both multiplying warpgroups, of both blocks
    q_loaded: Any
    published: Any  # weights and the largest of a warpgroup
    met: Any  # both multiplying warpgroups


def attend(inputs, o, log_sum, shared, *, sizes: MosaicSizes, factor: float):
    """Runs a program; `factor` takes scores to those of exp2."""
    program = _Program.this(inputs, shared, sizes)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def _():
        mg.set_max_registers(_LOADER_REGISTERS, action="decrease")
        _load_queries(program)
        _load(program, _Tiles.of(program))

    @pl.when(warpgroup < 2)
    def _():
        mg.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
        multiplier = _Multiplier.of(program, warpgroup, factor)
        _store(o, log_sum, multiplier, *multiplier.run())


class _Program(NamedTuple):
    """Program, as all its warpgroups know it."""

    inputs: MosaicInputs
    shared: Shared
    sizes: MosaicSizes
    sequence: jax.Array
    head: jax.Array  # of keys and values
    split: jax.Array
    first_token: jax.Array  # of this block

    @classmethod
    def this(cls, inputs, shared, sizes):
        """Program that runs."""
        index, split = lax.axis_index("sequence_and_head"), lax.axis_index("split")
        heads = jnp.int32(sizes.shape.num_kv_heads)
        sequence, head = lax.div(index, heads), lax.rem(index, heads)
        first_token = lax.axis_index("block") * (sizes.shape.tokens - sizes.tokens)
        return cls(inputs, shared, sizes, sequence, head, split, first_token)

    @property
    def ring(self):
        """Ring of chunks in shared memory."""
        return self.shared.ring_or_out[0]

    def copies(self, array, split, columns, ref, tokens, begin=0):
        """Copies of rows of q or of the output: (part of array, part of ref) of each.

        There is one, but in the interpreter one for each token.

        Args:
            array: [B * T, Nq, ...], or of each split one after the other.
            split: which.
            columns: indices of its other dimensions.
            ref: [*lines(...), ...].
            tokens: how many, from this block's first.
            begin: the token of ref that is this block's first.
        """
        sizes, group = self.sizes, self.sizes.shape.group
        first = split * self.inputs.q.shape[0] + self.sequence * sizes.shape.tokens
        first, heads = first + self.first_token, pl.ds(self.head * group, group)
        if not sizes.interpret:
            token_bytes = math.prod(ref.shape[1:]) * jnp.dtype(ref.dtype).itemsize
            assert begin * token_bytes % _TMA_ALIGNMENT == 0, (begin, ref.shape, ref.dtype)
            return [(array.at[pl.ds(first, tokens), heads, *columns], ref.at[pl.ds(begin, tokens)])]
        return [
            (array.at[first + i, heads, *columns], ref.at[pl.ds((begin + i) * group, group)])
            for i in range(tokens)
        ]

    def position(self, token):
        """Position of a token of this block."""
        return self.inputs.positions[self.sequence, self.first_token + token]

    def is_page(self, page):
        """Whether the cache has a page."""
        return (page >= 0) & (page < self.sizes.shape.num_pages)


class _Tiles(NamedTuple):
    """Tiles of a split."""

    program: _Program
    newest: jax.Array  # position of all tokens, also another block's
    count: jax.Array
    begin: jax.Array  # which tile of the sequence is the first
    step: int  # from one to the next

    @classmethod
    def of(cls, program):
        """Tiles of the split of a program, at most one more than another split has.

        The programs of a sequence read neighbouring tiles at a time. But pages lie anywhere: of
        them a program has its tiles side by side, as their pages are in the page table.
        """
        sizes, split = program.sizes, program.split
        positions = [
            program.inputs.positions[program.sequence, token] for token in range(sizes.shape.tokens)
        ]
        newest, splits = functools.reduce(jnp.maximum, positions), jnp.int32(sizes.splits)
        count = jnp.where(newest >= 0, lax.div(newest, jnp.int32(KEYS)) + 1, 0)
        share, left = lax.div(count, splits), lax.rem(count, splits)
        own = share + (split < left)
        if program.inputs.page_table is None:
            return cls(program, newest, own, split, sizes.splits)
        return cls(program, newest, own, split * share + jnp.minimum(split, left), 1)

    def first(self, index):
        """First position of a tile."""
        return (self.begin + index * self.step) * KEYS

    def page(self, index):
        """Page of a tile, or of the last one."""
        program = self.program
        if program.inputs.page_table is None:
            return program.sequence
        shape = program.sizes.shape
        index = jnp.maximum(jnp.minimum(index, self.count - 1), 0)
        place = lax.rem(self.first(index), jnp.int32(shape.columns * shape.page_size))
        column = lax.div(place, jnp.int32(shape.page_size))
        return program.inputs.page_table[program.sequence, column]


def _load_queries(program):
    sizes, shared, q = program.sizes, program.shared, program.inputs.q
    for chunk in range(sizes.key_chunks):
        columns = (pl.ds(chunk * CHUNK, CHUNK),)
        for part, lines in program.copies(
            q, 0, columns, shared.q, sizes.tokens, begin=chunk * sizes.tokens
        ):
            mg.copy_gmem_to_smem(part, lines, shared.q_loaded)


def _load(program, tiles):
    """Loads tile after tile, each chunk where one was that has been used."""
    sizes, shared = program.sizes, program.shared

    def tile(index, page):
        page = jnp.where(program.is_page(page), page, 0)
        place = lax.rem(tiles.first(index), jnp.int32(sizes.shape.page_size))
        slots = pl.ds(pl.multiple_of(page * sizes.shape.page_size + place, KEYS), KEYS)
        first, chunk = sizes.first_stage(index), 0
        for array, width in zip(program.inputs.arrays, sizes.array_widths, strict=True):
            for begin in range(0, width, CHUNK):
                stage = sizes.stage(first, chunk)

                @pl.when(index * sizes.chunks + chunk >= sizes.stages)
                def _(stage=stage):
                    mg.barrier_wait(shared.used.at[stage])

                columns = pl.ds(pl.multiple_of(program.head * width + begin, CHUNK), CHUNK)
                mg.copy_gmem_to_smem(
                    array.at[slots, columns],
                    program.ring.at[stage],
                    shared.loaded.at[stage],
                    collective_axes="block",
                )
                chunk += 1
        return tiles.page(index + 1)

    lax.fori_loop(0, tiles.count, tile, tiles.page(0))
    count = tiles.count * sizes.chunks

    # What another block writes here, and whom it tells, must be there until it has. JAX's
    # interpreter, too, wants the loader to see every phase of a barrier that it has waited for.
    def wait(chunk, _):
        mg.barrier_wait(shared.used.at[lax.rem(chunk, jnp.int32(sizes.stages))])

    lax.fori_loop(jnp.maximum(count - sizes.stages, 0), count, wait, None)


def _limits(positions, sizes):
    """Last position that each row sees, [ROWS]: less than 0 of padding."""
    row = mg.broadcasted_iota(jnp.int32, (ROWS, 8), 0, layout=_TILE)
    limit = mg.layout_cast(jnp.full((ROWS, 8), -1, jnp.int32), _TILE)
    for i, position in enumerate(positions):
        begin = i * sizes.shape.group
        limit = jnp.where((row >= begin) & (row < begin + sizes.shape.group), position, limit)
    return jnp.max(limit, axis=1)


class _Multiplier(NamedTuple):
    """Warpgroup that multiplies, one of two."""

    program: _Program
    tiles: _Tiles
    warpgroup: jax.Array
    limit: jax.Array  # `_limits`
    oldest: jax.Array  # position of this block's tokens
    factor: float

    @classmethod
    def of(cls, program, warpgroup, factor):
        """Warpgroup of a program; `factor` as in `attend`."""
        positions = [program.position(token) for token in range(program.sizes.tokens)]
        limit = _limits(positions, program.sizes)
        oldest = functools.reduce(jnp.minimum, positions)
        return cls(program, _Tiles.of(program), warpgroup, limit, oldest, factor)

    @property
    def own_values(self):
        """Value chunks of a tile that this warpgroup sums."""
        return self._values(self.warpgroup)

    @property
    def other_values(self):
        """Value chunks of a tile that the other warpgroup sums."""
        return self._values(1 - self.warpgroup)

    def _values(self, warpgroup):
        half = self.program.sizes.value_chunks // 2
        first = self.program.sizes.first_value + warpgroup * half
        return [first + chunk for chunk in range(half)]

    @property
    def other_keys(self):
        """Key chunks that are no values of this warpgroup."""
        sizes = self.program.sizes
        is_compact = sizes.rotary_dim is not None
        return [*range(sizes.first_value), *(self.other_values if is_compact else ())]

    def run(self):
        """(m, sums of weights, sums of weighted values) of a split, the last of D / 2 columns."""
        shared, count = self.program.shared, self.tiles.count
        mg.barrier_wait(shared.q_loaded)
        m = mg.layout_cast(jnp.full(ROWS, NO_SCORE, jnp.float32), _OF_ROWS)
        total = mg.layout_cast(jnp.zeros(ROWS, jnp.float32), _OF_ROWS)
        zero = mg.layout_cast(jnp.zeros((ROWS, CHUNK), jnp.float32), _TILE)
        carry = m, total, *[zero for _ in self.own_values]
        turns = lax.div(count + 1 - self.warpgroup, jnp.int32(2))
        carry = lax.fori_loop(0, turns, self._turn, carry)
        left = jnp.maximum(2 * turns + self.warpgroup - 1, 0)  # the last tile, if the other's
        m, total, *acc = lax.fori_loop(left, count, self._of_other, carry)
        shared.totals.at[self.warpgroup][...] = total
        mg.commit_smem()
        mg.barrier_arrive(shared.met)
        mg.barrier_wait(shared.met)
        total += mg.load(shared.totals.at[1 - self.warpgroup], layout=_OF_ROWS)
        return m, total, acc

    def _turn(self, turn, carry):
        """Sums the tile before (a), then a tile whose scores this warpgroup makes (s, p, a)."""
        program, shared = self.program, self.program.shared
        index = 2 * turn + self.warpgroup
        begin, stage = self.tiles.first(index), program.sizes.first_stage(index)
        exists = program.is_page(self.tiles.page(index))
        m, total, *acc = lax.fori_loop(jnp.maximum(index - 1, 0), index, self._of_other, carry)
        x = self._masked(self._scores(stage) * self.factor, begin, exists)
        new_m = jnp.maximum(m, jnp.max(x, axis=1))
        alpha = jnp.exp2(m - new_m)
        weights = jnp.exp2(x - _along_rows(new_m, x))
        total = total * alpha + jnp.sum(weights, axis=1)
        weights = weights.astype(shared.weights.dtype)
        shared.weights[...] = weights
        shared.largest[...] = new_m
        mg.commit_smem()
        mg.barrier_arrive(shared.published.at[self.warpgroup])
        if program.sizes.rotary_dim is None:
            self._wait(stage, self.own_values)
        return new_m, total, *self._add_values(index, stage, exists, alpha, weights, acc)

    def _masked(self, x, begin, exists):
        """Scores of a tile from position `begin` on, -inf where a row does not see a key."""

        def masked(x):
            key = mg.broadcasted_iota(jnp.int32, x.shape, 1, layout=_TILE)
            visible = exists & (begin + key <= _along_rows(self.limit, x))
            return jnp.where(visible, x, -jnp.inf)

        all_visible = exists & (begin + (KEYS - 1) <= self.oldest)
        return lax.cond(all_visible, lambda x: x, masked, x)

    def _of_other(self, index, carry):
        """Sums a tile whose scores the other warpgroup makes (a)."""
        m, total, *acc = carry
        program, shared = self.program, self.program.shared
        stage = program.sizes.first_stage(index)
        exists = program.is_page(self.tiles.page(index))
        self._wait(stage, self.other_keys)
        self._release(stage, self.other_keys)
        self._wait(stage, self.own_values)
        mg.barrier_wait(shared.published.at[1 - self.warpgroup])
        new_m = mg.load(shared.largest, layout=_OF_ROWS)
        alpha = jnp.exp2(m - new_m)
        acc = self._add_values(index, stage, exists, alpha, shared.weights, acc)
        return new_m, total * alpha, *acc

    def _scores(self, first):
        """Scores of the tile whose chunks begin at a stage, [ROWS, KEYS]."""
        program, sizes = self.program, self.program.sizes
        rows = sizes.as_lines(program.shared.q)

        def add(sums):
            (x,) = sums
            for chunk in range(sizes.key_chunks):
                self._wait(first, [chunk])
                q = rows.at[pl.ds(sizes.q_chunk(chunk) * sizes.rows, ROWS)]
                mg.wgmma(x, q, program.ring.at[sizes.stage(first, chunk)].transpose((1, 0)))

        zero = mg.layout_cast(jnp.zeros((ROWS, KEYS), jnp.float32), _TILE)
        (x,) = _accumulate([zero], add, sizes.interpret)
        self._release(first, self.other_keys)
        return x

    def _add_values(self, index, first, exists, alpha, weights, acc):
        """Sums of weighted values, with those of a tile."""
        program = self.program
        values = [program.ring.at[program.sizes.stage(first, i)] for i in self.own_values]
        self._clear_unseen(index, exists, values)
        acc = [part * _along_rows(alpha, part) for part in acc]
        if program.sizes.interpret and isinstance(weights, jax.Array):
            for i, chunk in enumerate(values):
                acc[i] += jnp.dot(weights, chunk[...], preferred_element_type=jnp.float32)
            mg.commit_smem()  # the loader may write where this was read
        else:

            def add(sums):
                for part, chunk in zip(sums, values, strict=True):
                    mg.wgmma(part, weights, chunk)

            acc = _accumulate(acc, add, program.sizes.interpret)
        used = self.own_values
        if program.sizes.rotary_dim is None:  # the other's values are nothing to this warpgroup
            self._wait(first, self.other_values)
            used = used + self.other_values
        self._release(first, used)
        return acc

    def _clear_unseen(self, index, exists, values):
        """Sets values that no token sees to 0: a weight of 0 does not undo a NaN."""
        begin, newest = self.tiles.first(index), self.tiles.newest

        @pl.when(jnp.logical_not(exists) | (begin + (KEYS - 1) > newest))
        def _():
            key = mg.broadcasted_iota(jnp.int32, (KEYS, _HALF), 0, layout=_TILE)
            for chunk in values:
                for half in range(2):
                    some = chunk.at[:, pl.ds(half * _HALF, _HALF)]
                    x = mg.load(some, layout=_TILE)
                    seen = exists & (begin + key <= newest)
                    some[...] = jnp.where(seen, x, jnp.zeros_like(x))
            mg.commit_smem()

    def _wait(self, first, chunks):
        """Waits for chunks of the tile whose chunks begin at a stage."""
        program = self.program
        for chunk in chunks:
            mg.barrier_wait(program.shared.loaded.at[program.sizes.stage(first, chunk)])

    def _release(self, first, chunks):
        """Lets the loaders write over chunks of a tile."""
        program = self.program
        if program.sizes.blocks > 1:
            mg.commit_smem()  # to another block one thread speaks for all
        for chunk in chunks:
            mg.barrier_arrive(program.shared.used.at[program.sizes.stage(first, chunk)])


def _accumulate(parts, add, interpret):
    """Accumulators that hold some parts, after `add` has added to them."""
    if not interpret:
        return pl.run_state(add)([mg.ACC.init(part) for part in parts])

    def products(*sums):
        add(sums)
        return [x[...] for x in sums]

    empty = [mg.ACC(part.shape, part.dtype) for part in parts]
    return [a + b for a, b in zip(parts, pl.run_scoped(products, *empty), strict=True)]


def _store(o, log_sum, multiplier, m, total, acc):
    """Stores a split's part of the output, and log2 of the sum of exp of its scores.

    Args:
        o: [splits * B * T, Nq, D].
        log_sum: [splits * B * T, Nq].
    """
    program, warpgroup = multiplier.program, multiplier.warpgroup
    sizes, shared = program.sizes, program.shared
    divisor = jnp.where(total > 0, total, 1.0)  # padding sees nothing: 0
    share = jnp.where(multiplier.limit == UNPLACED, jnp.nan, 1 / divisor)
    out = shared.ring_or_out[1].at[warpgroup]
    for i, part in enumerate(acc):
        lines = sizes.as_lines(out.at[i]).at[pl.ds(0, ROWS)]
        lines[...] = (part * _along_rows(share, part)).astype(out.dtype)

    @pl.when(warpgroup == 0)
    def _():
        lines = sizes.as_lines(shared.log_sum).at[pl.ds(0, ROWS)]
        lines[...] = jnp.where(total > 0, m + jnp.log2(divisor), -jnp.inf)

    mg.commit_smem()

    # Each copy begins at the first token: one token of log_sum is shorter than TMA's alignment.
    def copy(tokens):
        for i in range(len(acc)):
            column = pl.multiple_of(warpgroup * (sizes.shape.head_dim // 2) + i * CHUNK, CHUNK)
            columns = (pl.ds(column, CHUNK),)
            for part, lines in program.copies(o, program.split, columns, out.at[i], tokens):
                mg.copy_smem_to_gmem(lines, part)

        @pl.when(warpgroup == 0)
        def _():
            for part, lines in program.copies(log_sum, program.split, (), shared.log_sum, tokens):
                mg.copy_smem_to_gmem(lines, part)

    in_both = sizes.blocks * sizes.tokens - sizes.shape.tokens
    if in_both:
        pl.when(program.first_token == 0)(lambda: copy(sizes.tokens - in_both))
        pl.when(program.first_token > 0)(lambda: copy(sizes.tokens))
    else:
        copy(sizes.tokens)
    mg.wait_smem_to_gmem(0, wait_read_only=True)


def _along_rows(of_rows, x):
    return lax.broadcast_in_dim(of_rows, x.shape, [0])
