"""Slots of a tile of positions, and masked rows of queries, keys, values and the result."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.triton_tiles import both, iota, load


def pages(inputs, shape, sequence, first, size):
    """Page of each of `size` positions from `first` on, a multiple of it; one if all share it.

    None without a page table.
    """
    if inputs.page_table is None:
        return None
    position = first if _is_in_one_page(shape, size) else first + iota(size)
    place = _remainder(position, shape.columns * shape.page_size)
    column = lax.div(place, jnp.int32(shape.page_size))
    return plgpu.load(inputs.page_table.at[sequence * shape.columns + column])


def slots(shape, sequence, page, first, size, exists, *, aligned):
    """Slots of `size` positions from `first` on, and which of them exist.

    `page` is what `pages` returned, and `aligned` whether `first` is a multiple of `size`, as with
    pages it must be.
    """
    offset, page_size = iota(size), shape.page_size
    if page is None:
        place = _remainder(first, page_size) + offset
        if not aligned or not _is_in_one_page(shape, size):
            wrapped = place - page_size if size <= page_size else _remainder(place, page_size)
            place = jnp.where(place < page_size, place, wrapped)
        return sequence * page_size + place, exists
    if _is_in_one_page(shape, size):
        place = _remainder(first, page_size) + offset
    else:
        place = _remainder(first + offset, page_size)
    is_page = (page >= 0) & (page < shape.num_pages)
    return jnp.where(is_page, page, 0) * jnp.int32(page_size) + place, exists & is_page


def _is_in_one_page(shape, size):
    return shape.page_size % size == 0


def _remainder(position, size):
    """position mod size; of one past the largest of int32, which no token sees, a number below."""
    return lax.rem(position & jnp.iinfo(jnp.int32).max, jnp.int32(size))


def load_rows(ref, row, mask, begin, width):
    """Columns `begin` to `begin + width - 1` of some rows, zero where masked and past the width."""
    column, mask = iota(pad(width))[None, :], None if mask is None else mask[:, None]
    if column.size != width:
        mask = both(mask, column < width)
    rows, shape = ref.at[row[:, None], begin + column], (row.size, column.size)
    if ref.dtype.itemsize > 1:
        return load(rows, mask, shape)
    if mask is None:
        return plgpu.load(rows)
    # Triton has no float8 zero to load instead.
    mask = jnp.broadcast_to(mask, shape)
    return jnp.where(mask, plgpu.load(rows, mask=mask).astype(jnp.float32), 0)


def store_rows(ref, row, mask, x, begin, width):
    """Stores x in columns `begin` to `begin + width - 1` of some rows, where not masked."""
    column, mask = iota(x.shape[1])[None, :], mask[:, None]
    if column.size != width:
        mask = mask & (column < width)
    plgpu.store(
        ref.at[row[:, None], begin + column],
        x.astype(ref.dtype),
        mask=jnp.broadcast_to(mask, x.shape),
    )
