"""`gelu_and_mul_linear`: a program a few columns, with all of K, which it gates for itself."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

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

_BLOCK_COLUMNS, _NUM_WARPS = 32, 4


def gelu_and_mul_linear(gate, up, w, *, interpret=False):
    """Kernel of `g4attn_jax.ops.gelu_and_mul_linear`."""
    (*batch, k), columns = up.shape, w.shape[1]
    rows = math.prod(batch)
    if rows == 0:
        return jnp.zeros((*batch, columns), w.dtype)
    y = pl.pallas_call(
        functools.partial(
            _multiply, block_columns=_BLOCK_COLUMNS, starts_next=may_start_next(interpret)
        ),
        name="gelu_and_mul_linear",
        out_shape=jax.ShapeDtypeStruct((rows, columns), w.dtype),
        grid=(pl.cdiv(columns, _BLOCK_COLUMNS),),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(gate.reshape(-1, k), up.reshape(rows, k), w)
    return y.reshape(*batch, columns)


def _multiply(gate_ref, up_ref, w_ref, y_ref, *, block_columns, starts_next):
    (rows, k), columns = up_ref.shape, w_ref.shape[1]
    row, index = iota(pad(rows)), iota(pad(k))
    column = first_program_id(starts_next) * block_columns + iota(block_columns)
    row_mask = None if row.size == rows else row < rows
    mask = None if index.size == k else index < k
    column_mask = None if columns % block_columns == 0 else column < columns
    # First of all, as it comes from farthest.
    w = load_tile(w_ref, index, column, mask, column_mask)
    up = load_tile(up_ref, row, index, row_mask, mask).astype(jnp.float32)
    # Partial sums lie `rows` rows apart.
    gate = sum(
        load_tile(gate_ref, i * rows + row, index, row_mask, mask).astype(jnp.float32)
        for i in range(gate_ref.shape[0] // rows)
    )
    y = dot(gelu_gate(gate, up).astype(w.dtype), w)
    store_tile(y_ref, row, column, row_mask, column_mask, y)
