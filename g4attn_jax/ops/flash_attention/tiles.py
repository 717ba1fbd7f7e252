"""How the kernel sees a cache of any form and layout, and tiles of its rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.cache import Cache, CompactKVCache, KVCache
from g4attn_jax.ops.head_norm.triton import both, iota, load
from g4attn_jax.ops.matmul_tiles.triton import pad


class Inputs(NamedTuple):
    """What a kernel reads; None is not there."""

    q: jax.Array  # [B * T * Nq, width]
    keys: tuple[jax.Array, ...]  # [slots * Nkv, part of width]
    v: jax.Array | None  # [slots * Nkv, D]; None: the first of keys
    page_table: jax.Array | None  # int32 [B * pages]; None: sequence b has page b
    positions: jax.Array  # int32 [B * T]
    scale: jax.Array | None  # float32 [2], of K and of V


class Shape(NamedTuple):
    """Sizes that a kernel knows when it is compiled."""

    tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_pages: int
    page_size: int
    columns: int  # of the page table

    @property
    def num_q_heads(self):
        return self.num_kv_heads * self.group


# Of `scale`, which are the keys' in order; the values' is the second.
KEY_SCALES = {KVCache: (0,), CompactKVCache: (1, 0)}


def operands(q, cache: Cache, page_table, positions) -> tuple[Inputs, Shape]:
    """Arguments of an attention op, see `g4attn_jax.ops.decode_attention`, for a kernel."""
    _, tokens, num_q_heads, width = q.shape
    num_pages, page_size, num_kv_heads, head_dim = cache.v.shape
    keys = [part.array for part in cache.key_parts]
    v_is_key = any(array is cache.v for array in keys)
    inputs = Inputs(
        q=q.reshape(-1, width),
        keys=tuple(array.reshape(-1, array.shape[-1]) for array in keys),
        v=None if v_is_key else cache.v.reshape(-1, head_dim),
        page_table=None if page_table is None else page_table.reshape(-1),
        positions=positions.reshape(-1),
        scale=cache.scale,
    )
    shape = Shape(
        tokens=tokens,
        num_kv_heads=num_kv_heads,
        group=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        columns=1 if page_table is None else page_table.shape[1],
    )
    return inputs, shape


def pages(inputs, shape, sequence, first, size):
    """The page of each of `size` positions from `first` on, a multiple of it; one if all share it.

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
