"""Grouped matmul: programs of (tile of rows of one group, block of columns).

A tile is `block_rows` rows, or what is left of a group: none has rows of two groups. A group of s
rows has ceil(s / block_rows) of them. Which tile has which rows follows from `group_sizes`, and
every program works it out for itself, in a few operations on one vector: XLA would make a list of
tiles in four launches, which in a decode step take a third of the time of the product.

There are as many programs as the sizes may need. The surplus has no rows and ends at once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.gpu import Gpu, gpu
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.triton_tiles import (
    dot,
    first_program_id,
    iota,
    load,
    load_tile,
    may_start_next,
    store_tile,
)

# Of matrices that a program asks for ahead: what a multiprocessor must have on its way to keep an
# H200's memory busy.
_BYTES_AHEAD = 40 * 1024


class GroupedMatmulLaunch(NamedTuple):
    """Shape of a launch."""

    block_rows: int
    block_columns: int  # of each matrix of a group
    block_depth: int  # of K, multiplied at a time
    num_warps: int
    num_stages: int


class GroupedMatmulSizes(NamedTuple):
    """Sizes of a product: x [rows, depth] times w [groups, depth, matrices, columns]."""

    rows: int
    groups: int
    depth: int
    matrices: int  # of a group: 2 are a gate and what it gates
    columns: int
    itemsize: int

    @classmethod
    def of(cls, x, w, rows=None):
        """Sizes of arguments of `combined_grouped_matmul`."""
        count = x.shape[0] if rows is None else rows.shape[0]
        return cls(count, *w.shape, x.dtype.itemsize)

    def tiles(self, block_rows: int) -> int:
        """Most tiles that the rows can make, whatever the sizes of groups; some may be of none."""
        groups = min(self.groups + 1, self.rows)  # each a tile, and more for its rows but one
        return groups + (self.rows - groups) // block_rows

    def fits(self, gpu: Gpu, launch: GroupedMatmulLaunch) -> bool:
        """Whether the shared memory holds the tiles of x and w of all stages."""
        width = launch.block_rows + launch.block_columns * self.matrices
        tile = width * launch.block_depth * self.itemsize
        return launch.num_stages * tile <= gpu.shared_memory


def choose_launch(gpu: Gpu, sizes: GroupedMatmulSizes) -> GroupedMatmulLaunch:
    """Launch for a product, fitted to bench/results/h200/tune_grouped_matmul.json.

    Few rows a group are bound by reading the matrices: small tiles, many bytes on their way, and
    programs for every multiprocessor. Many are bound by arithmetic: tiles as large as the registers
    hold sums of, but not so large that the last tile of a group is mostly empty.

    Raises:
        NotImplementedError: no launch fits the shared memory.
    """
    for launch in _launches(gpu, sizes):
        if sizes.fits(gpu, launch):
            return launch
    raise NotImplementedError(
        f"a matmul of {sizes.itemsize}-byte numbers needs more shared memory than the "
        f"{gpu.shared_memory} bytes of this GPU; accepted: implementation 'xla'"
    )


def _launches(gpu, sizes):
    """Launches, the fastest first."""
    per_group = pl.cdiv(sizes.rows, sizes.groups)
    if sizes.itemsize == 4:  # no tensor cores: sums and operands in registers
        yield from (_launch(sizes, 16, 64, 32, 4, 3), _launch(sizes, 16, 32, 16, 4, 2))
        return
    if per_group > 96:
        yield _launch(sizes, 128, 256, 64, 8, 4)
        yield _launch(sizes, 128, 128, 64, 8, 3)
    if per_group > 24:
        yield _launch(sizes, 64, 128, 64, 4, 3)
        yield _launch(sizes, 64, 64, 64, 4, 2)
    block_rows = 16 if per_group <= 8 else 32
    width, depth = 128, 128 if sizes.depth % 128 == 0 else 64
    programs = min(sizes.rows, sizes.groups) * pl.cdiv(sizes.columns, width // sizes.matrices)
    stages = max(3, 1 + pl.cdiv(_BYTES_AHEAD, width * depth * sizes.itemsize))
    if programs < 2 * gpu.num_sms:  # DRAM gives narrower lines at less than its full rate
        width, depth, stages = 64 * sizes.matrices, 64, 6
    elif sizes.matrices > 1 and sizes.groups <= 2 * sizes.rows <= 2 * sizes.groups:
        # With half as many rows as groups, up to as many, a group has one or two. Programs of large
        # tiles are few enough to run at the same time.
        width, depth, stages = 128 * sizes.matrices, 32, 3
    yield _launch(sizes, block_rows, width, depth, 4, stages)
    yield _launch(sizes, 16, 64, 64, 4, 3)


def _launch(sizes, block_rows, width, block_depth, num_warps, num_stages):
    """Launch with `width` columns of a group's matrices, and no block larger than the product."""
    return GroupedMatmulLaunch(
        block_rows,
        min(width // sizes.matrices, pad(sizes.columns)),
        min(block_depth, pad(sizes.depth)),
        num_warps,
        num_stages,
    )


def grouped_matmul(x, w, group_sizes, *, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.grouped_matmul`; `launch` overrides the choice, for tuning."""
    return combined_grouped_matmul(
        x,
        None,
        w[:, :, None],
        group_sizes,
        combine=lambda y: y,
        name="grouped_matmul",
        interpret=interpret,
        launch=launch,
    )


def combined_grouped_matmul(
    x,
    rows,
    w,
    group_sizes,
    *,
    combine: Callable[..., jax.Array],
    name: str,
    interpret: bool,
    launch: GroupedMatmulLaunch | None = None,
) -> jax.Array:
    """Launches the products with all matrices of a group: combine(x_i w_g0, x_i w_g1, ...).

    Args:
        x: [T, K].
        rows: int32 [M], the row of x that row i of the product is of; None: i.
        w: [X, K, matrices, N].
        group_sizes: int32 [X].
        combine: of float32 products, one for each matrix, elementwise.
        name: of the kernel.
        interpret: runs the kernel body in Pallas' interpreter.
        launch: overrides `choose_launch`.

    Returns:
        [M, N] in the dtype of x.
    """
    sizes = GroupedMatmulSizes.of(x, w, rows)
    if sizes.rows == 0 or x.size == 0:
        return jnp.zeros((sizes.rows, sizes.columns), x.dtype)
    launch = launch or choose_launch(gpu(), sizes)
    inputs = GroupedMatmulInputs(
        x, rows, w.reshape(-1, sizes.matrices * sizes.columns), group_sizes
    )
    return pl.pallas_call(
        functools.partial(
            _kernel,
            sizes=sizes,
            combine=combine,
            launch=launch,
            starts_next=may_start_next(interpret),
        ),
        name=name,
        out_shape=jax.ShapeDtypeStruct((sizes.rows, sizes.columns), x.dtype),
        grid=(sizes.tiles(launch.block_rows) * pl.cdiv(sizes.columns, launch.block_columns),),
        in_specs=(jax.tree.map(lambda _: pl.no_block_spec, inputs),),
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        interpret=interpret,
    )(inputs)


class GroupedMatmulInputs(NamedTuple):
    """Arrays that the kernel reads."""

    x: jax.Array  # [T, K]
    rows: jax.Array | None  # int32 [M]
    w: jax.Array  # [X * K, matrices * N]
    group_sizes: jax.Array  # int32 [X]


def _kernel(inputs, out_ref, *, sizes, combine, launch, starts_next):
    # Blocks of columns of a tile are neighbours, which read the same rows, and then the tiles of a
    # group, which read the same matrix: they find them in the L2.
    blocks = jnp.int32(pl.cdiv(sizes.columns, launch.block_columns))
    program = first_program_id(starts_next)
    tile, block = lax.div(program, blocks), lax.rem(program, blocks)
    group, first, end = _tile(inputs.group_sizes, tile, sizes.rows, launch.block_rows)
    row = first + iota(launch.block_rows)
    row_mask = row < end
    x_row = row
    if inputs.rows is not None:
        x_row = load(inputs.rows.at[row], row_mask, row.shape)
        x_row = jnp.clip(x_row, 0, inputs.x.shape[0] - 1)
    # A group's matrices are side by side in one tile: tensor cores read x once for all of them.
    index, width = iota(sizes.matrices * launch.block_columns), jnp.int32(launch.block_columns)
    matrix, column = lax.div(index, width), block * width + lax.rem(index, width)
    is_whole = sizes.columns % launch.block_columns == 0
    column_mask = None if is_whole else column < sizes.columns
    is_deep = sizes.depth % launch.block_depth == 0

    def step(index, total):
        k = index * launch.block_depth + iota(launch.block_depth)
        k_mask = None if is_deep else k < sizes.depth
        x = load_tile(inputs.x, x_row, k, row_mask, k_mask)
        w_row = group * sizes.depth + k
        w = load_tile(inputs.w, w_row, matrix * sizes.columns + column, k_mask, column_mask)
        return total + dot(x, w)

    nothing = jnp.zeros((launch.block_rows, index.size), jnp.float32)
    has_product = (group < sizes.groups) & (first < end)
    steps = has_product.astype(jnp.int32) * pl.cdiv(sizes.depth, launch.block_depth)
    total = lax.fori_loop(0, steps, step, nothing)
    out = combine(*_products(total, sizes.matrices))
    column = block * width + iota(launch.block_columns)
    column_mask = None if is_whole else column < sizes.columns
    store_tile(out_ref, row, column, row_mask, column_mask, out)


def _products(total, count):
    """Product [rows, columns] of each of `count` matrices that are side by side."""
    if count == 1:
        return [total]
    products = total.reshape(total.shape[0], count, -1)
    # Triton has no slices; these sums are within a thread where a warp has whole rows.
    index = iota(count)[None, :, None]
    return [jnp.sum(jnp.where(index == i, products, 0), axis=1) for i in range(count)]


def _tile(group_sizes, tile, num_rows, block_rows):
    """Group of a tile, its first row, and the row at which the group ends.

    Past the tiles of all groups come those of rows of no group, for which the group is not less
    than their number, and then tiles that begin past the last row.
    """
    index = iota(pad(group_sizes.size))
    size = jnp.maximum(load(group_sizes.at[index], index < group_sizes.size, index.shape), 0)
    total = lax.cumsum(size)
    ends, starts = jnp.minimum(total, num_rows), jnp.minimum(total - size, num_rows)
    last_tile = lax.cumsum(lax.div(ends - starts + (block_rows - 1), jnp.int32(block_rows)))
    is_before = last_tile <= tile  # groups, all of whose tiles come before this one
    group = jnp.sum(is_before.astype(jnp.int32), dtype=jnp.int32)
    tiles_before = jnp.max(jnp.where(is_before, last_tile, 0))
    rows_before = jnp.max(jnp.where(is_before, ends, 0))
    end = jnp.min(jnp.where(is_before, num_rows, ends))
    return group, rows_before + (tile - tiles_before) * block_rows, end
