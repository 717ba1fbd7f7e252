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

from g4attn_jax.ops.gpu import Gpu, gpu
from g4attn_jax.ops.head_norm.triton import iota
from g4attn_jax.ops.linear.reference import gelu_gate
from g4attn_jax.ops.matmul_tiles.triton import dot, load_tile, pad, store_tile

_TILE_BYTES = 16 * 1024
_BLOCK_K = 64  # of a tile of 128 columns of bfloat16
_MAX_PARTS = 8


class Launch(NamedTuple):
    """The shape of a launch."""

    block_columns: int  # of each matrix of the weight
    block_k: int
    num_warps: int
    num_stages: int


def choose_parts(gpu: Gpu, *, k: int, columns: int) -> int:
    """How many programs should share columns: two programs of 64 columns a multiprocessor.

    No more than have a tile of the K rows of a weight each.
    """
    parts = round(2 * gpu.num_sms / pl.cdiv(columns, 64))
    return max(1, min(parts, pl.cdiv(k, _BLOCK_K), _MAX_PARTS))


def choose_launch(
    gpu: Gpu, *, rows: int, columns: int, matrices: int, num_parts: int, itemsize: int
) -> Launch:
    """The launch for a product, fitted to runs of bench/tune_linear.py on an H200.

    Programs own 128 columns if that makes about one for each multiprocessor, else 64: DRAM gives
    narrower lines at less than its full rate. A tile is 16 KiB, and up to four are on their way
    while one is multiplied. Two matrices at a time have two programs a multiprocessor, and less
    each.

    Args:
        gpu: what it runs on.
        rows: tokens.
        columns: N.
        matrices: of the weight.
        num_parts: programs that share columns.
        itemsize: bytes of a number.
    """
    wide = matrices == 1 and num_parts * columns >= 0.9 * gpu.num_sms * 128
    block_columns = 128 if wide else 64
    block_k = _TILE_BYTES // (block_columns * matrices * itemsize)
    tile = _TILE_BYTES + pad(rows) * block_k * itemsize
    most = 3 if matrices > 1 else 5
    return Launch(block_columns, block_k, 4, max(2, min(most, gpu.shared_memory // tile)))


def linear_partial_sums(x, w, *, num_parts, interpret=False, launch=None):
    """See `g4attn_jax.ops.linear_partial_sums`; `launch` overrides the choice, for tuning."""
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


def _multiply(x_ref, w_ref, y_ref, *, combine, matrices, num_parts, launch):
    (rows, k), columns, part = x_ref.shape, y_ref.shape[1], pl.program_id(1)
    row = iota(pad(rows))
    column = pl.program_id(0) * launch.block_columns + iota(launch.block_columns)
    row_mask = None if row.size == rows else row < rows
    column_mask = None if columns % launch.block_columns == 0 else column < columns

    def tile(i, sums):
        index = (i * num_parts + part) * launch.block_k + iota(launch.block_k)
        mask = None if k % launch.block_k == 0 else index < k
        x = load_tile(x_ref, row, index, row_mask, mask)
        ws = [
            load_tile(w_ref, index, matrix * columns + column, mask, column_mask)
            for matrix in range(matrices)
        ]
        return tuple(total + dot(x, w) for total, w in zip(sums, ws, strict=True))

    tiles, parts = pl.cdiv(k, launch.block_k), jnp.int32(num_parts)
    count = tiles if num_parts == 1 else lax.div(tiles + parts - 1 - part, parts)
    zero = jnp.zeros((row.size, column.size), jnp.float32)
    sums = lax.fori_loop(0, count, tile, (zero,) * matrices)
    store_tile(y_ref, part * rows + row, column, row_mask, column_mask, combine(*sums))
