"""Few rows times a weight: a program streams the columns it owns, every n-th tile of their rows.

A multiprocessor's programs share what it gets of the memory bus, so the multiprocessor that has one
more is last. Columns are divided such that all have the same, see `choose_launch`; where they are
too few for that, n programs share them (split-K), and leave it to what reads their partial sums to
add them. The rows of a table, to which logits are products, are many: programs own some each.
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
from g4attn_jax.ops.linear.launch import choose_launch, choose_logits_launch
from g4attn_jax.ops.linear.reference import gelu_gate
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.triton_tiles import (
    dot,
    first_program_id,
    iota,
    load_tile,
    may_start_next,
    store_tile,
)


def linear_partial_sums(x, w, *, num_partial_sums, dtype, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.linear_partial_sums`; `launch` overrides the choice, for tuning."""
    return _launch(x, w[:, None], _product, "linear", num_partial_sums, dtype, interpret, launch)


def geglu(x, w, *, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.geglu`."""
    return _launch(x, w, gelu_gate, "geglu", 1, x.dtype, interpret, launch)[0]


def logits(hidden, table, *, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.logits`."""
    *batch, k = hidden.shape
    rows, entries = math.prod(batch), table.shape[0]
    if rows == 0:
        return jnp.zeros((*batch, entries), jnp.float32)
    launch = launch or choose_logits_launch(gpu(), rows=rows, itemsize=table.dtype.itemsize)
    y = pl.pallas_call(
        functools.partial(_multiply_rows, launch=launch, starts_next=may_start_next(interpret)),
        name="logits",
        out_shape=jax.ShapeDtypeStruct((rows, entries), jnp.float32),
        grid=(pl.cdiv(entries, launch.block_columns),),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        interpret=interpret,
    )(hidden.reshape(rows, k), table)
    return y.reshape(*batch, entries)


def _product(product):
    return product


def _launch(
    x, w, combine: Callable[..., jax.Array], name, num_partial_sums, dtype, interpret, launch
):
    """combine(x w_0, x w_1, ...) for x [..., K] and w [K, matrices, N]: [partial sums, ..., N]."""
    *batch, k = x.shape
    _, matrices, columns = w.shape
    rows = math.prod(batch)
    if rows == 0:
        return jnp.zeros((num_partial_sums, *batch, columns), dtype)
    launch = launch or choose_launch(
        gpu(),
        rows=rows,
        k=k,
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
            starts_next=may_start_next(interpret),
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


def _multiply(x_ref, w_ref, y_ref, *, combine, matrices, num_partial_sums, launch, starts_next):
    (rows, k), columns, split = x_ref.shape, y_ref.shape[1], pl.program_id(1)
    row, row_mask = _rows(rows)
    column, column_mask = _block(launch.block_columns, columns, starts_next)

    def tile(i, sums):
        index, mask = _tile(i * num_partial_sums + split, launch.block_k, k)
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


def _multiply_rows(x_ref, table_ref, y_ref, *, launch, starts_next):
    (rows, k), entries = x_ref.shape, table_ref.shape[0]
    row, row_mask = _rows(rows)
    entry, entry_mask = _block(launch.block_columns, entries, starts_next)

    def tile(i, total):
        index, mask = _tile(i, launch.block_k, k)
        x = load_tile(x_ref, row, index, row_mask, mask)
        return total + dot(x, load_tile(table_ref, entry, index, entry_mask, mask), trans_b=True)

    zero = jnp.zeros((row.size, entry.size), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(k, launch.block_k), tile, zero)
    store_tile(y_ref, row, entry, row_mask, entry_mask, total)


def _rows(rows):
    """(index, mask) of the rows of x, as many as a product takes."""
    row = iota(pad(rows))
    return row, None if row.size == rows else row < rows


def _block(size, columns, starts_next):
    """(index, mask) of the columns that this program owns."""
    column = first_program_id(starts_next) * size + iota(size)
    return column, None if columns % size == 0 else column < columns


def _tile(number, block_k, k):
    """(index, mask) of the K of a tile."""
    index = number * block_k + iota(block_k)
    return index, None if k % block_k == 0 else index < k
