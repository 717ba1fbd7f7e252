"""Few rows times a weight: a program streams the columns it owns, every n-th tile of their rows.

Programs get equal shares of the memory bus, however many a multiprocessor has, so all end together
once there are enough. Where columns are too few for that, n programs share them (split-K), and
leave it to what reads their partial sums to add them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear.launch import choose_launch
from g4attn_jax.ops.linear.reference import gelu_gate
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.triton_tiles import dot, iota, load_tile, store_tile


def linear_partial_sums(x, w, *, num_partial_sums, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.linear_partial_sums`; `launch` overrides the choice, for tuning."""
    return _launch(x, w[:, None], _product, "linear", num_partial_sums, interpret, launch)


def geglu(x, w, *, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.geglu`."""
    return _launch(x, w, gelu_gate, "geglu", 1, interpret, launch)[0]


def _product(product):
    return product


def _launch(x, w, combine: Callable[..., jax.Array], name, num_partial_sums, interpret, launch):
    """combine(x w_0, x w_1, ...) for x [..., K] and w [K, matrices, N]: [partial sums, ..., N]."""
    *batch, k = x.shape
    _, matrices, columns = w.shape
    rows, dtype = math.prod(batch), x.dtype if num_partial_sums == 1 else jnp.float32
    if rows == 0:
        return jnp.zeros((num_partial_sums, *batch, columns), dtype)
    launch = launch or choose_launch(
        gpu(),
        rows=rows,
        columns=columns,
        matrices=matrices,
        num_partial_sums=num_partial_sums,
        itemsize=w.dtype.itemsize,
    )
    y = pl.pallas_call(
        functools.partial(
            _multiply,
            combine=combine,
            matrices=matrices,
            num_partial_sums=num_partial_sums,
            launch=launch,
        ),
        name=name,
        out_shape=jax.ShapeDtypeStruct((num_partial_sums * rows, columns), dtype),
        grid=(pl.cdiv(columns, launch.block_columns), num_partial_sums),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        interpret=interpret,
    )(x.reshape(rows, k), w.reshape(k, matrices * columns))
    return y.reshape(num_partial_sums, *batch, columns)


def _multiply(x_ref, w_ref, y_ref, *, combine, matrices, num_partial_sums, launch):
    (rows, k), columns, split = x_ref.shape, y_ref.shape[1], pl.program_id(1)
    row = iota(pad(rows))
    column = pl.program_id(0) * launch.block_columns + iota(launch.block_columns)
    row_mask = None if row.size == rows else row < rows
    column_mask = None if columns % launch.block_columns == 0 else column < columns

    def tile(i, sums):
        index = (i * num_partial_sums + split) * launch.block_k + iota(launch.block_k)
        mask = None if k % launch.block_k == 0 else index < k
        x = load_tile(x_ref, row, index, row_mask, mask)
        ws = [
            load_tile(w_ref, index, matrix * columns + column, mask, column_mask)
            for matrix in range(matrices)
        ]
        return tuple(total + dot(x, w) for total, w in zip(sums, ws, strict=True))

    tiles, splits = pl.cdiv(k, launch.block_k), jnp.int32(num_partial_sums)
    count = tiles if num_partial_sums == 1 else lax.div(tiles + splits - 1 - split, splits)
    zero = jnp.zeros((row.size, column.size), jnp.float32)
    sums = lax.fori_loop(0, count, tile, (zero,) * matrices)
    store_tile(y_ref, split * rows + row, column, row_mask, column_mask, combine(*sums))
