"""Tiles of matrices, masked where the matrix ends."""

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.head_norm.triton import both, load


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
