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
_COLUMNS = 64  # of a tile: DRAM gives lines of fewer bytes at less than its full rate
_NARROW = 512  # columns of a weight of which a program owns half a tile's
_NARROW_COLUMNS = 32
_MAX_PARTIAL_SUMS = 8  # a reader adds in 0.2 us each, or more of many tokens
_MAX_BUFFERS = 12
# Rows from which a product is an instruction that reads tiles where they lie, until it is done.
_WGMMA_ROWS = 64


class MatmulLaunch(NamedTuple):
    """Shape of a launch."""

    block_columns: int  # of each matrix of the weight; of a table its rows
    block_k: int
    num_warps: int
    num_stages: int


def choose_num_partial_sums(gpu: Gpu, *, k: int, columns: int) -> int:
    """Number of programs that share columns: about one program a multiprocessor, and not more.

    No more than have a tile of the K rows of a weight each.
    """
    block = _block_columns(gpu, columns, matrices=1)
    partial_sums = gpu.num_sms // pl.cdiv(columns, block)
    return max(1, min(partial_sums, k // _block_k(block, 1, itemsize=2), _MAX_PARTIAL_SUMS))


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

    A tile is 16 KiB. As many are on their way as all programs together need to fill the bus.

    Args:
        gpu: what it runs on.
        rows: tokens.
        k: K.
        columns: N.
        matrices: of the weight.
        num_partial_sums: programs that share columns.
        itemsize: bytes of a number.
    """
    block = _block_columns(gpu, columns, matrices)
    block_k = _block_k(block, matrices, itemsize)
    programs = pl.cdiv(columns, block) * num_partial_sums
    tile = block * matrices * block_k * itemsize
    buffers = round(gpu.num_sms * _BYTES_ON_THEIR_WAY / (programs * tile))
    tiles = pl.cdiv(k, block_k * num_partial_sums)
    most = gpu.shared_memory // (tile + pad(rows) * block_k * itemsize)
    stages = max(2, min(buffers, tiles, _MAX_BUFFERS)) + (pad(rows) < _WGMMA_ROWS)
    return MatmulLaunch(block, block_k, 4, max(2, min(stages, most)))


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


def _block_columns(gpu, columns, matrices):
    """Columns that a program owns."""
    if matrices == 1:
        return _NARROW_COLUMNS if columns <= _NARROW else _COLUMNS
    # Nobody shares them: as many programs as half of the multiprocessors can fill the bus.
    programs = columns / _COLUMNS / gpu.num_sms
    if 1 <= programs <= 2:
        return 2 * _COLUMNS
    return _COLUMNS if programs >= 0.5 else _NARROW_COLUMNS


def _block_k(block, matrices, itemsize):
    """Rows of a tile of the weight."""
    return _TILE_BYTES // (block * matrices * itemsize)
