"""Launch that RMS-normalises heads lying in one or several buffers.

A buffer is a list of rows [groups * rows_per_group, D]. In every group, rows `first` to
`first + count - 1` are the heads of one kind. For each of them, with x in float32,

    norm = x * rsqrt(mean(x^2) + eps)           one load, one rsqrt
    y_i  = norm * (scale_offset + scale_i)      one output per scale; norm itself where it is None

so K = V heads, scales (k_norm, None), are read once and written twice. y_i lists the heads of a
kind one after the other, [groups * count, D], which is [..., heads, D] for the caller.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.triton_tiles import (
    WARP_LOAD_BYTES,
    both,
    first_program_id,
    iota,
    load,
    may_start_next,
)

# Bounds the masks and sums of a program where heads are tiny.
MAX_BLOCK_ROWS = 16


class Heads(NamedTuple):
    """Heads of one kind: rows `first` to `first + count - 1` of every group of `x`."""

    x: jax.Array
    first: int
    count: int
    scales: tuple[jax.Array | None, ...]


class NormLaunch(NamedTuple):
    """Rows that a program normalises, and its warps."""

    block_rows: int
    num_warps: int


def choose_launch(num_rows: int, row_bytes: int) -> NormLaunch:
    """Launch for `num_rows` heads of `row_bytes` each, padding to a power of two included.

    From `bench/results/h200/tune_qkv_rms_norm.json`: programs of 2 KiB with a warp for each 512
    bytes or longer row, from hundreds of rows to the largest sizes. Few rows get a program each, to
    spread over the multiprocessors; longer rows gain from it up to a larger number. Over the whole
    sweep this is at most 0.33 us, and at most 13 %, behind the best launch for that shape and size.
    """
    block_rows = 1
    if num_rows > row_bytes // 4:
        block_rows = min(max(1, 2048 // row_bytes), MAX_BLOCK_ROWS)
    return NormLaunch(block_rows, num_warps=min(block_rows, 4))


def head_norm(
    heads: Sequence[Heads],
    *,
    groups: int,
    eps: float,
    scale_offset: float = 0.0,
    launch: NormLaunch | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Normalises all `heads` in one launch.

    Args:
        heads: the kinds of head, with buffers `x` [groups * rows_per_group, D] of one dtype and
            scales [D]. Kinds may share a buffer; it is then passed once.
        groups: number of groups in every buffer.
        eps: added to the mean square.
        scale_offset: added to every scale.
        launch: overrides `choose_launch`, for tuning.
        interpret: runs the kernel body in Pallas' interpreter.

    Returns:
        For each kind in order, one array [groups * count, D] per scale.
    """
    buffers, scales, kinds, out_shape = [], [], [], []
    for kind in heads:
        head_dim = kind.x.shape[-1]
        outputs = []
        for scale in kind.scales:
            outputs.append((len(out_shape), _position(scales, scale)))
            out_shape.append(jax.ShapeDtypeStruct((groups * kind.count, head_dim), kind.x.dtype))
        rows_per_group = kind.x.shape[0] // max(groups, 1)
        kinds.append(
            _Kind(
                _position(buffers, kind.x), rows_per_group, kind.first, kind.count, tuple(outputs)
            )
        )
    if groups == 0:
        return [jnp.zeros(out.shape, out.dtype) for out in out_shape]

    units = sum(kind.count for kind in kinds)
    if launch is None:
        row_bytes = pl.next_power_of_2(head_dim) * buffers[0].dtype.itemsize
        launch = choose_launch(groups * units, row_bytes)
    body = functools.partial(
        _kernel,
        kinds=tuple(kinds),
        groups=groups,
        num_buffers=len(buffers),
        num_scales=len(scales),
        eps=eps,
        scale_offset=scale_offset,
        launch=launch,
        starts_next=may_start_next(interpret),
    )
    return pl.pallas_call(
        body,
        name="head_norm",
        out_shape=out_shape,
        grid=(pl.cdiv(groups, launch.block_rows) * units,),
        in_specs=[pl.no_block_spec] * (len(buffers) + len(scales)),
        out_specs=[pl.no_block_spec] * len(out_shape),
        compiler_params=plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=1),
        interpret=interpret,
    )(*buffers, *scales)


class _Kind(NamedTuple):
    """`Heads` with positions in the kernel's argument lists in place of arrays."""

    buffer: int
    rows_per_group: int
    first: int
    count: int
    outputs: tuple[tuple[int, int | None], ...]  # (output, scale)


def _position(arrays: list[jax.Array], array: jax.Array | None) -> int | None:
    """Index of `array` in `arrays`, appended if it was not there; None for None."""
    if array is None:
        return None
    for position, other in enumerate(arrays):
        if other is array:
            return position
    arrays.append(array)
    return len(arrays) - 1


def _kernel(*refs, kinds, groups, num_buffers, num_scales, eps, scale_offset, launch, starts_next):
    x_refs = refs[:num_buffers]
    scale_refs = refs[num_buffers : num_buffers + num_scales]
    out_refs = refs[num_buffers + num_scales :]
    for kind, mine, rows in rows_of_program(
        first_program_id(starts_next), kinds, groups=groups, block_rows=launch.block_rows
    ):

        @pl.when(mine)
        def _(kind=kind, rows=rows):
            outputs = [(out_refs[o], None if s is None else scale_refs[s]) for o, s in kind.outputs]
            _norm_rows(x_refs[kind.buffer], rows, outputs, eps, scale_offset, launch.num_warps)


class Rows(NamedTuple):
    """Rows that a program normalises, all of one kind; int32 [block_rows] each."""

    group: jax.Array
    row: jax.Array  # in the buffer
    head: jax.Array  # the same in the outputs
    mask: jax.Array | None  # which of them exist; None if all do in every program


def rows_of_program(program, kinds, *, groups, block_rows):
    """Rows that a program normalises.

    `block_rows` groups have `block_rows` rows for each head of a group. They are dealt to as many
    programs as a group has heads, kind by kind: every program has the same work, one kind of head,
    and neighbours in memory are neighbours in time.

    Args:
        program: its index.
        kinds: what `first`, `count` and `rows_per_group` are read of.
        groups: number of groups.
        block_rows: rows of a program.

    Yields:
        For each kind (kind, mine, rows): whether the program has this kind, and if so its `Rows`.
    """
    units = sum(kind.count for kind in kinds)
    # The divisors are int32 as the indices are, also where JAX_ENABLE_X64 makes Python's int64.
    units = jnp.int32(units)
    block, unit = lax.div(program, units), lax.rem(program, units)
    for kind in kinds:
        head = (block * kind.count + unit) * block_rows + iota(block_rows)
        count = jnp.int32(kind.count)
        group, head_in_group = lax.div(head, count), lax.rem(head, count)
        row = group * kind.rows_per_group + kind.first + head_in_group
        mask = None if groups % block_rows == 0 else group < groups
        yield kind, (unit >= 0) & (unit < kind.count), Rows(group, row, head, mask)
        unit -= kind.count


def _norm_rows(x_ref, rows, outputs, eps, scale_offset, num_warps):
    """Rows of x, normalised, to every output; masked rows are left out."""
    _, row, out_row, row_mask = rows
    head_dim = x_ref.shape[-1]
    width = min(pl.next_power_of_2(head_dim), WARP_LOAD_BYTES // x_ref.dtype.itemsize)
    # With several warps each row loads the scales anew: a row of them that all warps share would
    # go through shared memory.
    scale_row = jnp.zeros((row.size if num_warps > 1 else 1, 1), jnp.int32)
    squares = jnp.zeros((row.size, width), jnp.float32)
    stores = []
    for start in range(0, head_dim, width):
        column = start + iota(width)[None, :]
        in_row = None if start + width <= head_dim else column < head_dim
        mask = both(None if row_mask is None else row_mask[:, None], in_row)
        x = load(x_ref.at[row[:, None], column], mask, (row.size, width)).astype(jnp.float32)
        squares += x * x
        for out_ref, scale_ref in outputs:
            y = x
            if scale_ref is not None:
                index = scale_row + column
                scale = load(scale_ref.at[index], in_row, index.shape).astype(jnp.float32)
                # Scaled before the sum is known: the compiler would put off a load whose value is
                # needed only after it, and the row would wait for memory twice.
                y = x * (scale_offset + scale)
            stores.append((out_ref.at[out_row[:, None], column], y, mask))
    rrms = lax.rsqrt(jnp.sum(squares, axis=1) * (1 / head_dim) + eps)[:, None]
    for target, y, mask in stores:
        if mask is not None:
            mask = jnp.broadcast_to(mask, y.shape)
        plgpu.store(target, (y * rrms).astype(target.dtype), mask=mask)
