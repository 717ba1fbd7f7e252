"""Few rows times a weight: a program streams the columns it owns, every n-th tile of their rows.

Programs get equal shares of the memory bus, however many a multiprocessor has, so all end together
once there are enough. Where columns are too few for that, n programs share them, and leave the sum
of their parts to what reads it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.attention_tiles.triton import dot
from g4attn_jax.ops.gpu import Gpu, gpu
from g4attn_jax.ops.head_norm.triton import both, iota, load
from g4attn_jax.ops.linear.reference import gelu_gate

_TILE_BYTES = 16 * 1024


class Launch(NamedTuple):
    """The shape of a launch."""

    block_columns: int  # of each matrix of the weight
    block_k: int
    num_warps: int
    num_stages: int


def choose_launch(
    gpu: Gpu, *, rows: int, columns: int, matrices: int, num_parts: int, itemsize: int
) -> Launch:
    """The launch for a product, fitted to bench/results/h200/tune_linear.json.

    Programs own 128 columns if that makes enough of them, else 64: DRAM gives narrower lines at
    less than its full rate. A tile is 16 KiB, and as many are on their way as the shared memory
    holds, up to four.

    Args:
        gpu: what it runs on.
        rows: tokens.
        columns: N.
        matrices: of the weight.
        num_parts: programs that share columns.
        itemsize: bytes of a number.
    """
    wide = matrices == 1 and num_parts * columns >= 120 * 128
    block_columns = 128 if wide else 64
    block_k = _TILE_BYTES // (block_columns * matrices * itemsize)
    tile = _TILE_BYTES + _block_rows(rows) * block_k * itemsize
    most = 3 if matrices > 1 else 5
    return Launch(block_columns, block_k, 4, max(2, min(most, gpu.shared_memory // tile)))


def linear_parts(x, w, *, num_parts, interpret=False, launch=None):
    """See `g4attn_jax.ops.linear_parts`; `launch` overrides the choice, for tuning."""
    return _launch(x, w[:, None], _product, "linear", num_parts, interpret, launch)


def geglu(x, w, *, interpret=False, launch=None):
    """See `g4attn_jax.ops.geglu`."""
    return _launch(x, w, gelu_gate, "geglu", 1, interpret, launch)[0]


def _product(product):
    return product


def _launch(x, w, combine: Callable[..., jax.Array], name, num_parts, interpret, launch):
    """combine(x w_0, x w_1, ...) for x [..., K] and w [K, matrices, N]: [num_parts, ..., N]."""
    *batch, k = x.shape
    _, matrices, columns = w.shape
    rows, dtype = math.prod(batch), x.dtype if num_parts == 1 else jnp.float32
    if rows == 0:
        return jnp.zeros((num_parts, *batch, columns), dtype)
    launch = launch or choose_launch(
        gpu(),
        rows=rows,
        columns=columns,
        matrices=matrices,
        num_parts=num_parts,
        itemsize=w.dtype.itemsize,
    )
    y = pl.pallas_call(
        functools.partial(
            _multiply, combine=combine, matrices=matrices, num_parts=num_parts, launch=launch
        ),
        name=name,
        out_shape=jax.ShapeDtypeStruct((num_parts * rows, columns), dtype),
        grid=(pl.cdiv(columns, launch.block_columns), num_parts),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        interpret=interpret,
    )(x.reshape(rows, k), w.reshape(k, matrices * columns))
    return y.reshape(num_parts, *batch, columns)


def _block_rows(rows):
    return max(16, pl.next_power_of_2(rows))  # tensor cores take 16 at least


def _multiply(x_ref, w_ref, y_ref, *, combine, matrices, num_parts, launch):
    rows, k = x_ref.shape
    columns, part = y_ref.shape[1], pl.program_id(1)
    block_rows = _block_rows(rows)
    row = iota(block_rows)[:, None]
    column = (pl.program_id(0) * launch.block_columns + iota(launch.block_columns))[None, :]
    row_exists = None if rows == block_rows else row < rows
    column_exists = None if columns % launch.block_columns == 0 else column < columns

    def tile(i, sums):
        index = (i * num_parts + part) * launch.block_k + iota(launch.block_k)
        exists = None if k % launch.block_k == 0 else index < k
        in_row = None if exists is None else exists[None, :]
        in_column = None if exists is None else exists[:, None]
        x = load(x_ref.at[row, index[None, :]], both(row_exists, in_row), (block_rows, index.size))
        mask = both(in_column, column_exists)
        return tuple(
            total
            + dot(
                x,
                load(
                    w_ref.at[index[:, None], i * columns + column], mask, (index.size, column.size)
                ),
            )
            for i, total in enumerate(sums)
        )

    zero = jnp.zeros((block_rows, column.size), jnp.float32)
    tiles, parts = pl.cdiv(k, launch.block_k), jnp.int32(num_parts)
    count = tiles if num_parts == 1 else lax.div(tiles + parts - 1 - part, parts)
    sums = lax.fori_loop(0, count, tile, (zero,) * matrices)
    mask = both(row_exists, column_exists)
    plgpu.store(
        y_ref.at[part * rows + row, column],
        combine(*sums).astype(y_ref.dtype),
        mask=None if mask is None else jnp.broadcast_to(mask, zero.shape),
    )
