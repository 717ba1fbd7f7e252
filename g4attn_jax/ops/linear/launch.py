"""Launches of products with a weight, and how many programs share its columns (split-K)."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.padding import pad

# Bytes of weights that are to be on their way to a multiprocessor: so many fill the memory bus of
# an H200 for as long as a load takes. With more of them loads queue, and multiprocessors that have
# one program more than others end later.
_BYTES_ON_THEIR_WAY = 60 * 1024
_TILE_BYTES = 16 * 1024
# Columns that a program owns: DRAM gives lines of fewer bytes at less than its full rate.
_COLUMNS = 64
# Of weights of less than that many rows or columns, a launch is all that matters.
_NARROW = 512
_BUSY = 0.7  # of the multiprocessors, with which the bus is full
_MAX_PARTIAL_SUMS = 8  # a reader adds in 0.2 us each, or more of many tokens
_MAX_BUFFERS = 12


class MatmulLaunch(NamedTuple):
    """Shape of a launch."""

    block_columns: int  # of each matrix of the weight; of a table its rows
    block_k: int
    num_warps: int
    num_stages: int


def choose_num_partial_sums(gpu: Gpu, *, k: int, columns: int) -> int:
    """Number of programs that share columns: such that all are about one a multiprocessor.

    No more than that, and no more than have a tile of the K rows of a weight each. Of the numbers
    that keep most multiprocessors busy, the one that divides the tiles best.
    """
    block = _block_columns(gpu, k, columns, 1)
    blocks, tiles = pl.cdiv(columns, block), max(1, k // (_TILE_BYTES // (2 * block)))
    most = max(1, min(gpu.num_sms // blocks, tiles, _MAX_PARTIAL_SUMS))
    busy = [n for n in range(1, most + 1) if n * blocks >= _BUSY * gpu.num_sms]
    return min(busy or [most], key=lambda n: (pl.cdiv(tiles, n) * n, -n))


def has_programs(gpu: Gpu, *, columns: int) -> bool:
    """Whether programs that share no columns fill the bus: one for every two multiprocessors."""
    return columns >= _COLUMNS * gpu.num_sms / 2


def choose_launch(
    gpu: Gpu,
    *,
    rows: int,
    k: int,
    columns: int,
    matrices: int,
    num_partial_sums: int,
    itemsize: int,
) -> MatmulLaunch:
    """Launch for a product, fitted to `python -m bench tune linear` on an H200.

    As many tiles are on their way as all programs together need to fill the bus.

    Args:
        gpu: what it runs on.
        rows: tokens.
        k: K.
        columns: N.
        matrices: of the weight.
        num_partial_sums: programs that share columns.
        itemsize: bytes of a number.
    """
    block = _block_columns(gpu, k, columns, matrices)
    programs = pl.cdiv(columns, block) * num_partial_sums
    tile = _tile_bytes(gpu, rows, block, programs, matrices)
    block_k = tile // (block * matrices * itemsize)
    buffers = round(gpu.num_sms * _BYTES_ON_THEIR_WAY / (programs * tile))
    buffers = min(max(2, buffers), pl.cdiv(k, block_k * num_partial_sums), _MAX_BUFFERS)
    # While a tile is multiplied its buffer is taken.
    most = gpu.shared_memory // (tile + pad(rows) * block_k * itemsize)
    return MatmulLaunch(block, block_k, 4, max(2, min(buffers + 1, most)))


def choose_logits_launch(gpu: Gpu, *, rows: int, itemsize: int) -> MatmulLaunch:
    """Launch for logits: programs of 64 entries of a table, several a multiprocessor at a time.

    Args:
        gpu: what it runs on.
        rows: tokens.
        itemsize: bytes of a number.
    """
    block_k = 2 * _TILE_BYTES // (_COLUMNS * itemsize) // 2
    tile = _TILE_BYTES + pad(rows) * block_k * itemsize
    return MatmulLaunch(_COLUMNS, block_k, 4, max(2, min(4, gpu.shared_memory // tile)))


def _block_columns(gpu, k, columns, matrices):
    """Columns that a program owns: 64, unless that makes too few programs or an unlucky number."""
    programs = pl.cdiv(columns, _COLUMNS) / gpu.num_sms
    if matrices > 1:
        return 2 * _COLUMNS if 1 < programs <= 1.5 else _COLUMNS
    if min(k, columns) <= _NARROW:
        return _COLUMNS // 2
    has_idle = programs <= 1 and programs * (1 // programs) < _BUSY
    return 2 * _COLUMNS if has_idle or 1 < programs <= 2 else _COLUMNS


def _tile_bytes(gpu, rows, block, programs, matrices):
    """Bytes of a tile of the weight."""
    if block < _COLUMNS:
        return _TILE_BYTES // 4
    # Of gate and up few programs take large tiles, where rows leave room for them.
    has_room = matrices > 1 and programs <= gpu.num_sms and pad(rows) <= 32
    return _TILE_BYTES * (2 if has_room else 1)
