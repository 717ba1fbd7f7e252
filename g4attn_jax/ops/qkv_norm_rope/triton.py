"""Launch from the packed projection to rotated queries and keys, wherever they are to lie.

For every head of a packed buffer [..., Nkv, G + P, D], with x in float32 and its halves
lo = x[:D/2], hi = x[D/2:],

    rrms = rsqrt(mean(x^2) + eps)
    v    = x * rrms
    k    = rotate(x * k_norm) * rrms
    q    = rotate(x * q_norm) * rrms
    rotate(lo, hi) = (lo cos - hi sin, hi cos + lo sin)     for dims i < R/2 of a half, else as is

A head is loaded as its two halves, so that a rotation needs no exchange between threads. K = V
rows are loaded once. Partial sums of the buffer are loaded together and added in order. K and V go
to row slot * Nkv + g of their outputs; a slot out of range is left out.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.head_norm.triton import MAX_BLOCK_ROWS, NormLaunch, rows_of_program
from g4attn_jax.ops.triton_tiles import (
    WARP_LOAD_BYTES,
    both,
    first_program_id,
    iota,
    load,
    may_start_next,
)


class Kind(NamedTuple):
    """Heads of one kind: rows `first` to `first + count - 1` of every group of the buffer."""

    outputs: tuple[str, ...]  # "q", "k", "v"
    first: int
    count: int
    rows_per_group: int


class PrologueInputs(NamedTuple):
    """Arrays that the kernel reads; None is not there."""

    # [..., Nkv, G + P, D], in the kernel [M * Nkv * (G + P), D], with partial sums one axis before
    x: jax.Array
    q_norm: jax.Array  # [D]
    k_norm: jax.Array | None  # [D]
    cos: jax.Array | None  # float32 [..., R/2], in the kernel [M, R/2]; None if R = 0
    sin: jax.Array | None
    slots: jax.Array | None  # int32 [...], in the kernel [M]; None: token m is in slot m
    scale: jax.Array | None  # float32 [2], what K and V are divided by before storage


class PrologueOutputs(NamedTuple):
    """Arrays that it writes, their shapes, or refs."""

    q: jax.Array  # [M * Nq, D], absorbed [M * Nq, D + R]
    k: jax.Array | None  # [slots * Nkv, D], of a compact cache [slots * Nkv, R]
    v: jax.Array | None  # [slots * Nkv, D]


def qkv_norm_rope(
    qkv, q_norm, k_norm, cos, sin, *, mode, eps, dtype=None, interpret=False, launch=None
):
    """Kernel of `g4attn_jax.ops.qkv_norm_rope`; `launch` overrides the choice, for tuning."""
    batch, (num_kv_heads, rows, head_dim) = cos.shape[:-1], qkv.shape[-3:]
    num_q_heads, dtype = num_kv_heads * (rows - mode.num_kv_projections), dtype or qkv.dtype
    q = jax.ShapeDtypeStruct((math.prod(batch) * num_q_heads, head_dim), dtype)
    kv = None
    if mode is not ProjectionMode.Q_ONLY:
        kv = jax.ShapeDtypeStruct((math.prod(batch) * num_kv_heads, head_dim), dtype)
    q, k, v = norm_rope(
        PrologueInputs(qkv, q_norm, k_norm, cos, sin, None, None),
        PrologueOutputs(q, kv, kv),
        mode=mode,
        eps=eps,
        interpret=interpret,
        launch=launch,
    )
    q = q.reshape(*batch, num_q_heads, head_dim)
    k, v = (None if x is None else x.reshape(*batch, num_kv_heads, head_dim) for x in (k, v))
    return q, k, v


# Up to so many heads, and from so many on; see `choose_launch`.
_FEW_ROWS = 256
_MANY_ROWS = 4096


def choose_launch(num_rows: int, half_bytes: int, *, absorbed: bool) -> NormLaunch:
    """Launch for `num_rows` heads.

    From `bench/results/h200/tune_qkv_norm_rope_write.json`: programs of 2 KiB with a warp for every
    kibibyte, two heads a program where there are few, and where queries are absorbed and heads are
    many, programs of 8 KiB with four warps.

    Args:
        num_rows: heads to be read.
        half_bytes: of half a head, padding to a power of two included.
        absorbed: whether queries have D + R numbers.
    """
    if num_rows <= _FEW_ROWS:
        return NormLaunch(block_rows=2, num_warps=2)
    program_bytes = 8192 if absorbed and num_rows > _MANY_ROWS else 2048
    block_rows = min(max(1, program_bytes // (2 * half_bytes)), MAX_BLOCK_ROWS)
    return NormLaunch(block_rows, num_warps=min(block_rows, 4 if program_bytes == 8192 else 2))


def norm_rope(
    inputs: PrologueInputs, outputs: PrologueOutputs, *, mode, eps, interpret, launch=None
) -> PrologueOutputs:
    """Launches the kernel.

    Args:
        inputs: what to read.
        outputs: ShapeDtypeStructs of what to make, arrays of what to write into (aliased).
        mode: which heads the buffer holds.
        eps: added to the mean square.
        interpret: runs the kernel body in Pallas' interpreter.
        launch: overrides `choose_launch`.
    """
    *_, num_kv_heads, rows_per_group, head_dim = inputs.x.shape
    inputs = _with_flat_axes(inputs)
    groups = inputs.x.shape[-2] // rows_per_group
    if groups == 0:
        return PrologueOutputs(*(_empty(array) for array in outputs))
    kinds = _kinds(mode, rows_per_group)
    heads_per_group = sum(kind.count for kind in kinds)
    padded_half, itemsize = pl.next_power_of_2(head_dim // 2), inputs.x.dtype.itemsize
    launch = launch or choose_launch(
        groups * heads_per_group,
        padded_half * itemsize,
        absorbed=outputs.q.shape[-1] != head_dim,
    )
    given = [array for array in outputs if isinstance(array, jax.Array)]
    shapes = PrologueOutputs(
        *(None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs)
    )
    num_inputs = len(jax.tree.leaves(inputs))
    first_output = len(jax.tree.leaves(shapes)) - len(given)
    body = functools.partial(
        _kernel,
        kinds=kinds,
        groups=groups,
        num_kv_heads=num_kv_heads,
        width=min(padded_half, WARP_LOAD_BYTES // itemsize),
        eps=eps,
        launch=launch,
        starts_next=may_start_next(interpret),
    )
    (written,) = pl.pallas_call(
        body,
        name="norm_rope",
        out_shape=(shapes,),
        grid=(pl.cdiv(groups, launch.block_rows) * heads_per_group,),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, (inputs, given)),
        out_specs=(jax.tree.map(lambda _: pl.no_block_spec, shapes),),
        input_output_aliases={num_inputs + i: first_output + i for i in range(len(given))},
        compiler_params=plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=1),
        interpret=interpret,
    )(inputs, given)
    return written


def _with_flat_axes(inputs):
    """Inputs as the kernel has them."""
    *batch, pairs = inputs.cos.shape
    rows = math.prod((*batch, *inputs.x.shape[-3:-1]))
    partial_sums = inputs.x.shape[: inputs.x.ndim - len(batch) - 3]
    return inputs._replace(
        x=inputs.x.reshape(*partial_sums, rows, inputs.x.shape[-1]),
        cos=inputs.cos.reshape(-1, pairs) if pairs else None,
        sin=inputs.sin.reshape(-1, pairs) if pairs else None,
        slots=None if inputs.slots is None else inputs.slots.reshape(-1),
    )


def _empty(array):
    """Output of a launch for no tokens."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jnp.zeros(array.shape, array.dtype)
    return array


def _kinds(mode, rows_per_group):
    """Kinds of head in a packed buffer."""
    group = rows_per_group - mode.num_kv_projections
    outputs = {
        ProjectionMode.Q_ONLY: (),
        ProjectionMode.QK_ONLY: (("k", "v"),),
        ProjectionMode.QKV_FULL: (("k",), ("v",)),
    }[mode]
    kinds = [Kind(("q",), 0, group, rows_per_group)]
    kinds += [Kind(o, group + i, 1, rows_per_group) for i, o in enumerate(outputs)]
    return tuple(kinds)


def _kernel(inputs, _, outputs, *, kinds, groups, num_kv_heads, width, eps, launch, starts_next):
    for kind, mine, rows in rows_of_program(
        first_program_id(starts_next), kinds, groups=groups, block_rows=launch.block_rows
    ):

        @pl.when(mine)
        def _(kind=kind, rows=rows):
            _norm_rope_rows(inputs, outputs, kind, rows, num_kv_heads, width, eps)


class _Store(NamedTuple):
    """Values that are multiplied with rrms and stored."""

    output: str
    row: jax.Array
    column: jax.Array
    value: jax.Array
    mask: jax.Array | None


def _norm_rope_rows(inputs, outputs, kind, rows, num_kv_heads, width, eps):
    """Norms, rotates and stores the heads of a program, all of one kind."""
    head_dim = inputs.x.shape[-1]
    token = lax.div(rows.group, jnp.int32(num_kv_heads))
    row_mask = None if rows.mask is None else rows.mask[:, None]
    target, target_mask = rows.head, row_mask
    if kind.outputs != ("q",) and inputs.slots is not None:
        target, in_range = cache_rows(
            load(inputs.slots.at[token], rows.mask, token.shape),
            lax.rem(rows.group, jnp.int32(num_kv_heads)),
            num_kv_heads=num_kv_heads,
            num_slots=outputs.v.shape[0] // num_kv_heads,
        )
        target_mask = both(in_range[:, None], row_mask)

    squares = jnp.zeros((rows.row.size, width), jnp.float32)
    stores = []
    for start in range(0, head_dim // 2, width):
        columns = _Columns.of(inputs, rows.row.size, start, width)
        tile = _HeadTile.load(inputs, columns, rows.row, token, row_mask)
        squares += tile.low * tile.low + tile.high * tile.high
        # Scaled and rotated before the sum is known: the compiler would put off loads whose values
        # are needed only after it, and the row would wait for memory twice.
        for output in kind.outputs:
            stores += _STORES[output](tile, inputs, outputs, target, target_mask)
    rrms = lax.rsqrt(jnp.sum(squares, axis=1) * (1 / head_dim) + eps)[:, None]
    for store in stores:
        _store(store, rrms, inputs, outputs)


def cache_rows(slot, kv_head, *, num_kv_heads, num_slots):
    """Rows of slots in an array [num_slots * num_kv_heads, width], and which of them it has."""
    in_range = (slot >= 0) & (slot < num_slots)
    return jnp.where(in_range, slot, 0) * num_kv_heads + kv_head, in_range


class _Columns(NamedTuple):
    """Columns of both halves of heads that a tile has: index .. of [0, D/2) and D/2 further."""

    index: jax.Array  # int32 [1, width]
    shape: tuple[int, int]  # rows and width of a tile
    half: int  # D/2
    pairs: int  # R/2
    in_half: jax.Array | None  # which of them a half has; None: all
    rotates: jax.Array | bool | None  # which of them rotate; None: all, False: none

    @classmethod
    def of(cls, inputs, num_rows, start, width):
        """Columns from `start` on."""
        half = inputs.x.shape[-1] // 2
        pairs = 0 if inputs.cos is None else inputs.cos.shape[-1]
        index = start + iota(width)[None, :]
        in_half = None if start + width <= half else index < half
        rotates = index < pairs
        if start >= pairs:
            rotates = False
        elif start + width <= pairs:
            rotates = None
        return cls(index, (num_rows, width), half, pairs, in_half, rotates)


class _HeadTile(NamedTuple):
    """Some columns of both halves of some heads, and the angles by which they rotate."""

    columns: _Columns
    low: jax.Array
    high: jax.Array
    cos: jax.Array | None  # None: none rotates
    sin: jax.Array | None

    @classmethod
    def load(cls, inputs, columns, row, token, row_mask):
        """Loads the columns of rows of x, and the angles of their tokens."""
        mask = both(columns.in_half, row_mask)
        low, high = (
            _load_sum(inputs.x, row[:, None], c, mask, columns.shape)
            for c in (columns.index, columns.half + columns.index)
        )
        if columns.rotates is False:
            return cls(columns, low, high, None, None)
        mask = both(columns.rotates, row_mask)
        index = token[:, None], columns.index
        cos = load(inputs.cos.at[index], mask, columns.shape, other=1)
        sin = load(inputs.sin.at[index], mask, columns.shape)
        return cls(columns, low, high, cos, sin)

    def scaled(self, low, high, scale_ref):
        """Both halves times a scale."""
        columns = self.columns
        # Each row loads the scale anew: one row of it that all warps share would go through shared
        # memory.
        index = jnp.zeros((columns.shape[0], 1), jnp.int32) + columns.index
        return tuple(
            x * load(scale_ref.at[c], columns.in_half, columns.shape).astype(jnp.float32)
            for x, c in ((low, index), (high, columns.half + index))
        )

    def rotated(self, low, high):
        """Both halves rotated."""
        if self.cos is None:
            return low, high
        return low * self.cos - high * self.sin, high * self.cos + low * self.sin


def _load_sum(x_ref, row, column, mask, shape):
    """Some columns of some rows of x, or the sum of its partial sums, in float32."""
    partial_sums = [()] if x_ref.ndim == 2 else [(i,) for i in range(x_ref.shape[0])]
    loaded = [load(x_ref.at[*i, row, column], mask, shape) for i in partial_sums]
    return functools.reduce(operator.add, (x.astype(jnp.float32) for x in loaded))


def _whole(output, tile, low, high, row, mask):
    """Stores of both halves of a head."""
    columns = tile.columns
    mask = both(columns.in_half, mask)
    return [
        _Store(output, row, columns.index, low, mask),
        _Store(output, row, columns.half + columns.index, high, mask),
    ]


def _band(output, tile, low, high, row, mask, first=0):
    """Stores of the rotating dims of a head, at columns `first` to `first + R - 1`."""
    columns = tile.columns
    if columns.rotates is False:
        return []
    mask = both(columns.rotates, mask)
    return [
        _Store(output, row, first + columns.index, low, mask),
        _Store(output, row, first + columns.pairs + columns.index, high, mask),
    ]


def _store_q(tile, inputs, outputs, row, mask):
    columns, width = tile.columns, outputs.q.shape[-1]
    scaled = tile.scaled(tile.low, tile.high, inputs.q_norm)
    rotated = tile.rotated(*scaled)
    if width == 2 * columns.half:
        return _whole("q", tile, *rotated, row, mask)
    # The absorbed query of a compact cache: scaled as a key, zero where it rotates; what rotates.
    low, high = tile.scaled(*scaled, inputs.k_norm)
    if columns.rotates is not False:
        is_all = columns.rotates is None
        still = jnp.zeros(columns.shape, bool) if is_all else ~columns.rotates
        low, high = jnp.where(still, low, 0), jnp.where(still, high, 0)
    return [
        *_whole("q", tile, low, high, row, mask),
        *_band("q", tile, *rotated, row, mask, first=2 * columns.half),
    ]


def _store_k(tile, inputs, outputs, row, mask):
    rotated = tile.rotated(*tile.scaled(tile.low, tile.high, inputs.k_norm))
    stores = _whole if outputs.k.shape[-1] == 2 * tile.columns.half else _band
    return stores("k", tile, *rotated, row, mask)


def _store_v(tile, inputs, outputs, row, mask):
    return _whole("v", tile, tile.low, tile.high, row, mask)


_STORES = {"q": _store_q, "k": _store_k, "v": _store_v}
_SCALE_OF = {"k": 0, "v": 1}


def _store(store, rrms, inputs, outputs):
    ref = getattr(outputs, store.output)
    value = store.value * rrms
    if store.output in _SCALE_OF and inputs.scale is not None:
        value *= 1 / inputs.scale[_SCALE_OF[store.output]]
        # Out of range is NaN, as in XLA; the conversion of the GPU would saturate.
        value = jnp.where(jnp.abs(value) <= 464, value, jnp.nan)
    mask = None if store.mask is None else jnp.broadcast_to(store.mask, value.shape)
    index = store.row[:, None], store.column
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)
