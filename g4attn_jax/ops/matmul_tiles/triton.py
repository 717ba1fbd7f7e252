"""Tiles of matrices, masked where the matrix ends, and their product."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.head_norm.triton import both, load


def dot(a, b, trans_b=False):
    """a b, or a b^T, in float32; of float32 operands without TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision).astype(jnp.float32)


def pad(width: int) -> int:
    """Columns that are loaded for some: a power of two, and what tensor cores take at least."""
    return max(16, pl.next_power_of_2(width))


def load_tile(ref, row, column, row_mask, column_mask):
    """Elements of rows [m] and columns [n], 0 where a mask is false; a mask of None is all true."""
    shape = row.size, column.size
    return load(ref.at[row[:, None], column[None, :]], _mask(row_mask, column_mask, shape), shape)


def store_tile(ref, row, column, row_mask, column_mask, tile):
    """Stores [m, n] at rows [m] and columns [n] in the dtype of `ref`, where no mask is false."""
    mask = _mask(row_mask, column_mask, tile.shape)
    plgpu.store(ref.at[row[:, None], column[None, :]], tile.astype(ref.dtype), mask=mask)


def _mask(row_mask, column_mask, shape):
    row_mask = None if row_mask is None else row_mask[:, None]
    column_mask = None if column_mask is None else column_mask[None, :]
    mask = both(row_mask, column_mask)
    return None if mask is None else jnp.broadcast_to(mask, shape)
