"""Launches of `moe_mlp`, and how many programs share columns of the second product (split-K)."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.padding import pad

_BLOCK_COLUMNS = 64  # whole lines of 128 bytes of bfloat16
_BLOCK_DEPTH = 64
_NUM_WARPS = 4


class ProductLaunch(NamedTuple):
    """Shape of a launch."""

    block_columns: int  # of each matrix
    block_depth: int
    parts: int  # of each sum over rows
    num_warps: int
    num_stages: int


def choose_gated_launch(gpu: Gpu, *, depth: int, columns: int, itemsize: int) -> ProductLaunch:
    """Launch for products with both matrices of the first half.

    Args:
        gpu: what it runs on.
        depth: E.
        columns: F.
        itemsize: bytes of a number.
    """
    return _launch(gpu, 1, depth, columns, itemsize, matrices=2, most_stages=6)


def choose_down_launch(
    gpu: Gpu, *, tokens: int, top_k: int, depth: int, columns: int, itemsize: int
) -> ProductLaunch:
    """Launch for the sum over the experts of a token, whose matrices are one of k * F rows.

    Args:
        gpu: what it runs on.
        tokens: M.
        top_k: k.
        depth: F.
        columns: E.
        itemsize: bytes of a number.
    """
    # Two programs a multiprocessor, each with a tile of rows at least.
    programs = max(1, tokens) * pl.cdiv(columns, _BLOCK_COLUMNS)
    parts = min(round(2 * gpu.num_sms / programs), pl.cdiv(top_k * depth, _BLOCK_DEPTH))
    return _launch(gpu, max(1, parts), depth, columns, itemsize, matrices=1, most_stages=6)


def _launch(gpu, parts, depth, columns, itemsize, matrices, most_stages):
    """Launch with as many stages as the shared memory holds, for 16 rows and the matrices."""
    block_columns, block_depth = min(_BLOCK_COLUMNS, pad(columns)), min(_BLOCK_DEPTH, pad(depth))
    stage = (16 + matrices * block_columns) * block_depth * itemsize
    stages = max(2, min(most_stages, gpu.shared_memory // stage))
    return ProductLaunch(block_columns, block_depth, parts, _NUM_WARPS, stages)
