"""One launch that RMS-normalises heads lying in one or several buffers.

A buffer is a list of rows [groups * rows_per_group, D]. In every group, rows `first` to
`first + count - 1` are the heads of one kind. For each of them, with x in float32,

    norm = x * rsqrt(mean(x^2) + eps)           one load, one rsqrt
    y_i  = norm * (scale_offset + scale_i)      one output per scale; norm itself where it is None

so K = V heads, scales (k_scale, None), are read once and written twice. y_i lists the heads of a
kind one after the other, [groups * count, D], which is [..., heads, D] for the caller.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# JAX 0.11 deprecated the backend these kernels are lowered through; pyproject.toml bounds JAX for
# it. The warning comes when JAX lowers a program, long after we return, so it is filtered here.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)

# One 16-byte load for each of the 32 lanes of a warp. A row is loaded in pieces of this size, so
# that its sum of squares never leaves the warp: no shared memory, no barrier.
_WARP_LOAD_BYTES = 512


class Heads(NamedTuple):
    """Heads of one kind: rows `first` to `first + count - 1` of every group of `x`."""

    x: jax.Array
    first: int
    count: int
    scales: tuple[jax.Array | None, ...]


class Launch(NamedTuple):
    """Rows a program normalises, and the warps it has for them."""

    block_rows: int
    num_warps: int


def choose_launch(num_rows: int) -> Launch:
    """The launch for `num_rows` heads in all, from `bench/results/h200/tune_qkv_norm.json`.

    Few rows: latency is all, so every row gets a warp, and a program of its own while there are
    multiprocessors to spare. Many: a warp with four rows has four loads in flight, and one-warp
    programs retire and start independently of each other.
    """
    if num_rows <= 128:
        return Launch(block_rows=1, num_warps=1)
    if num_rows <= 4096:
        return Launch(block_rows=4, num_warps=4)
    return Launch(block_rows=4, num_warps=1)


def head_norm(
    heads: Sequence[Heads],
    *,
    groups: int,
    eps: float,
    scale_offset: float = 0.0,
    launch: Launch | None = None,
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
    x_refs, scale_refs, kinds, out_shape = [], [], [], []
    for kind in heads:
        head_dim = kind.x.shape[-1]
        outputs = []
        for scale in kind.scales:
            outputs.append((len(out_shape), _position(scale_refs, scale)))
            out_shape.append(jax.ShapeDtypeStruct((groups * kind.count, head_dim), kind.x.dtype))
        rows_per_group = kind.x.shape[0] // max(groups, 1)
        kinds.append(
            _Kind(_position(x_refs, kind.x), rows_per_group, kind.first, kind.count, tuple(outputs))
        )
    if groups == 0:
        return [jnp.zeros(out.shape, out.dtype) for out in out_shape]

    units = sum(kind.count for kind in kinds)
    if launch is None:
        launch = choose_launch(groups * units)
    body = functools.partial(
        _kernel,
        kinds=tuple(kinds),
        groups=groups,
        num_buffers=len(x_refs),
        num_scales=len(scale_refs),
        eps=eps,
        scale_offset=scale_offset,
        block_rows=launch.block_rows,
    )
    return pl.pallas_call(
        body,
        name="head_norm",
        out_shape=out_shape,
        grid=(pl.cdiv(groups, launch.block_rows) * units,),
        in_specs=[pl.no_block_spec] * (len(x_refs) + len(scale_refs)),
        out_specs=[pl.no_block_spec] * len(out_shape),
        compiler_params=plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=1),
        interpret=interpret,
    )(*x_refs, *scale_refs)


class _Kind(NamedTuple):
    """`Heads` with positions in the kernel's argument lists in place of arrays."""

    buffer: int
    rows_per_group: int
    first: int
    count: int
    outputs: tuple[tuple[int, int | None], ...]  # (output, scale)


def _position(arrays: list[jax.Array], array: jax.Array | None) -> int | None:
    """Where `array` is in `arrays`, appended if it was not there; None for None."""
    if array is None:
        return None
    for position, other in enumerate(arrays):
        if other is array:
            return position
    arrays.append(array)
    return len(arrays) - 1


def _kernel(*refs, kinds, groups, num_buffers, num_scales, eps, scale_offset, block_rows):
    x_refs = refs[:num_buffers]
    scale_refs = refs[num_buffers : num_buffers + num_scales]
    out_refs = refs[num_buffers + num_scales :]
    # `block_rows` groups have `block_rows` rows for each head of a group. They are dealt to as many
    # programs as a group has heads, kind by kind: every program has the same work, one kind of
    # head, and neighbours in memory are neighbours in time.
    units = sum(kind.count for kind in kinds)
    block, unit = lax.div(pl.program_id(0), units), lax.rem(pl.program_id(0), units)
    for kind in kinds:

        @pl.when((unit >= 0) & (unit < kind.count))
        def _(kind=kind, unit=unit):
            head = (block * kind.count + unit) * block_rows + _iota(block_rows)
            group, head_in_group = lax.div(head, kind.count), lax.rem(head, kind.count)
            row = group * kind.rows_per_group + kind.first + head_in_group
            num_heads = groups * kind.count
            _norm_rows(
                x_refs[kind.buffer],
                row,
                head,
                None if num_heads % block_rows == 0 else head < num_heads,
                [(out_refs[o], None if s is None else scale_refs[s]) for o, s in kind.outputs],
                eps,
                scale_offset,
            )

        unit -= kind.count


def _norm_rows(x_ref, row, out_row, row_mask, outputs, eps, scale_offset):
    """Rows `row` of x, normalised, into rows `out_row` of every output; masked rows are left out."""
    head_dim = x_ref.shape[-1]
    width = min(pl.next_power_of_2(head_dim), _WARP_LOAD_BYTES // x_ref.dtype.itemsize)
    sum_of_squares = jnp.zeros(row.shape, jnp.float32)
    pieces = []
    for start in range(0, head_dim, width):
        column = start + _iota(width)
        column_mask = None if start + width <= head_dim else column < head_dim
        mask = _outer_and(row_mask, column_mask, (row.size, width))
        x = _load(x_ref.at[row[:, None], column[None, :]], mask).astype(jnp.float32)
        sum_of_squares += jnp.sum(x * x, axis=1)
        pieces.append((x, column, column_mask, mask))
    rrms = lax.rsqrt(sum_of_squares * (1 / head_dim) + eps)[:, None]
    for x, column, column_mask, mask in pieces:
        norm = x * rrms
        for out_ref, scale_ref in outputs:
            y = norm
            if scale_ref is not None:
                scale = _load(scale_ref.at[column], column_mask).astype(jnp.float32)
                y = norm * (scale_offset + scale)[None, :]
            target = out_ref.at[out_row[:, None], column[None, :]]
            plgpu.store(target, y.astype(out_ref.dtype), mask=mask)


def _iota(size):
    return jnp.arange(size, dtype=jnp.int32)


def _load(ref, mask):
    """Loads `ref`, zero where the mask is false; no mask loads all."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _outer_and(row_mask, column_mask, shape):
    """The mask of a tile from those of its rows and columns, either of which may be None."""
    if row_mask is None and column_mask is None:
        return None
    mask = jnp.ones(shape, jnp.bool_)
    if row_mask is not None:
        mask &= row_mask[:, None]
    if column_mask is not None:
        mask &= column_mask[None, :]
    return mask
