"""Launches of products with a weight, and how many programs share its columns (split-K)."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.padding import pad

# Bytes of a weight that loads of a multiprocessor have asked for at a time. So many keep the memory
# bus of an H200 busy while a load takes its way; with more, loads queue, and multiprocessors that
# have one program more than others end later.
_BYTES_ON_THEIR_WAY = 60 * 1024
_TILE_BYTES = 16 * 1024
# Columns that a program owns. DRAM reads shorter pieces of a row at less than its full rate.
_COLUMNS = 64
# A weight of no more rows or columns takes little longer than a launch of nothing.
_NARROW = 512
_BUSY = 0.7  # share of the multiprocessors that keeps the memory bus busy
_MAX_PARTIAL_SUMS = 8  # each costs its reader 0.2 us, more with many tokens
_MIN_STAGES, _MAX_BUFFERS = 3, 12
# Up to 16 rows, and up to 32, tiles go through registers to instructions of 16 rows. An instruction
# of 64 rows reads them where they lie.
_FEW_ROWS, _ROWS_OF_WGMMA = 16, 64


class MatmulLaunch(NamedTuple):
    """Shape of a launch."""

    block_columns: int  # of each matrix of the weight; of a table its rows
    block_k: int
    num_warps: int
    num_stages: int


def choose_num_partial_sums(gpu: Gpu, *, rows: int, k: int, columns: int) -> int:
    """Number of programs that share the columns of a block, each for a part of the K rows.

    Blocks times this number are at most the multiprocessors, and every program has a tile of rows.
    Among the numbers that keep the memory bus busy the one is taken that shares out tiles best.

    Args:
        gpu: what it runs on.
        rows: tokens.
        k: K.
        columns: N.
    """
    block = _block_columns(gpu, rows, k, columns, matrices=1)
    blocks, tiles = pl.cdiv(columns, block), max(1, k // (_TILE_BYTES // (2 * block)))
    most = gpu.num_sms // blocks
    if most == 1 and _is_slow(rows) and blocks < _BUSY * gpu.num_sms:
        most = 2
    most = max(1, min(most, tiles, _MAX_PARTIAL_SUMS))
    busy = [n for n in range(1, most + 1) if n * blocks >= _BUSY * gpu.num_sms]
    return min(busy or [most], key=lambda n: (pl.cdiv(tiles, n) * n, -n))


def geglu_is_faster(gpu: Gpu, *, rows: int, columns: int) -> bool:
    """Whether programs that share no columns take less time than XLA, which splits K.

    They do where they fill the memory bus, one for every two multiprocessors. Of fewer columns and
    up to 16 rows one launch takes as long as XLA's two or three with what is between them.
    """
    return rows <= _FEW_ROWS or columns >= _COLUMNS * gpu.num_sms / 2


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
    block = _block_columns(gpu, rows, k, columns, matrices)
    programs = pl.cdiv(columns, block) * num_partial_sums
    tile = _tile_bytes(gpu, rows, block, programs, matrices)
    block_k = tile // (block * matrices * itemsize)
    buffers = round(gpu.num_sms * _BYTES_ON_THEIR_WAY / (programs * tile))
    # While a tile goes through registers the buffers for those on their way are all free.
    stages = min(max(2, buffers), _MAX_BUFFERS) + (pad(rows) < _ROWS_OF_WGMMA)
    stages = max(_MIN_STAGES, min(stages, pl.cdiv(k, block_k * num_partial_sums) + 1))
    most = gpu.shared_memory // (tile + pad(rows) * block_k * itemsize)
    num_warps = 8 if block > 2 * _COLUMNS else 4
    return MatmulLaunch(block, block_k, num_warps, max(2, min(stages, most)))


def choose_logits_launch(gpu: Gpu, *, rows: int, itemsize: int) -> MatmulLaunch:
    """Launch for logits: programs of 64 entries of a table, several a multiprocessor at a time.

    Args:
        gpu: what it runs on.
        rows: tokens.
        itemsize: bytes of a number.
    """
    block_k = _TILE_BYTES // (_COLUMNS * itemsize)
    tile = _TILE_BYTES + pad(rows) * block_k * itemsize
    return MatmulLaunch(_COLUMNS, block_k, 4, max(2, min(3, gpu.shared_memory // tile)))


def _is_slow(rows):
    """Whether products take so long that loads may wait for them."""
    return _FEW_ROWS < pad(rows) < _ROWS_OF_WGMMA


def _block_columns(gpu, rows, k, columns, matrices):
    """Columns that a program owns.

    They are 64 where that makes a good number of programs. They are 128 where some multiprocessors
    would have one program more than others, or many would have none; 256 of a wide weight with 64
    rows; 32 of a narrow weight, and of gate and up with few columns.
    """
    programs = pl.cdiv(columns, _COLUMNS) / gpu.num_sms
    if matrices > 1:
        if 1 < programs <= 1.5:
            return 2 * _COLUMNS
        return _COLUMNS if programs >= 0.5 else _COLUMNS // 2
    if min(k, columns) <= _NARROW:
        return _COLUMNS // 2
    if programs > 2:
        return 4 * _COLUMNS if pad(rows) >= _ROWS_OF_WGMMA else _COLUMNS
    has_idle = programs <= 1 and programs * (1 // programs) < _BUSY
    # Products of a tile of 128 columns and half the K are chains of half the length.
    is_late = _is_slow(rows) and programs > 1 / 3
    return 2 * _COLUMNS if programs > 1 or has_idle or is_late else _COLUMNS


def _tile_bytes(gpu, rows, block, programs, matrices):
    """Bytes of a tile of the weight."""
    if matrices == 1:
        return _TILE_BYTES // (4 if block < _COLUMNS else 1)
    # Of gate and up few programs take large tiles, where rows leave room for them.
    has_room = block >= _COLUMNS and programs <= gpu.num_sms and pad(rows) < _ROWS_OF_WGMMA
    return _TILE_BYTES * (2 if has_room else 1)
