"""Launches of products with a weight, and how many programs share its columns (split-K)."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.padding import pad

_TILE_BYTES = 16 * 1024
_BLOCK_K = 64  # of a tile of 128 columns of bfloat16
_MAX_PARTIAL_SUMS = 8


class MatmulLaunch(NamedTuple):
    """Shape of a launch."""

    block_columns: int  # of each matrix of the weight
    block_k: int
    num_warps: int
    num_stages: int


def choose_num_partial_sums(gpu: Gpu, *, k: int, columns: int) -> int:
    """Number of programs that share columns: two programs of 64 columns a multiprocessor.

    No more than have a tile of the K rows of a weight each.
    """
    partial_sums = round(2 * gpu.num_sms / pl.cdiv(columns, 64))
    return max(1, min(partial_sums, pl.cdiv(k, _BLOCK_K), _MAX_PARTIAL_SUMS))


def choose_launch(
    gpu: Gpu, *, rows: int, columns: int, matrices: int, num_partial_sums: int, itemsize: int
) -> MatmulLaunch:
    """Launch for a product, fitted to `python -m bench tune linear` on an H200.

    Programs own 128 columns if that makes about one for each multiprocessor, else 64: DRAM gives
    narrower lines at less than its full rate. A tile is 16 KiB, and up to four are on their way
    while one is multiplied. Two matrices at a time have two programs a multiprocessor, and less
    each.

    Args:
        gpu: what it runs on.
        rows: tokens.
        columns: N.
        matrices: of the weight.
        num_partial_sums: programs that share columns.
        itemsize: bytes of a number.
    """
    wide = matrices == 1 and num_partial_sums * columns >= 0.9 * gpu.num_sms * 128
    block_columns = 128 if wide else 64
    block_k = _TILE_BYTES // (block_columns * matrices * itemsize)
    tile = _TILE_BYTES + pad(rows) * block_k * itemsize
    most = 3 if matrices > 1 else 5
    return MatmulLaunch(block_columns, block_k, 4, max(2, min(most, gpu.shared_memory // tile)))
