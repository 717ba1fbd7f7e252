"""Launches of `moe_mlp`, and how many programs share the columns of its products (split-K)."""

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
    parts: int  # of each sum
    num_warps: int
    num_stages: int


def choose_hidden_launch(gpu: Gpu, *, rows: int, depth: int, columns: int) -> ProductLaunch:
    """Launch for products with both matrices of the first half.

    Args:
        gpu: what it runs on.
        rows: k for each token.
        depth: E.
        columns: F.
    """
    return _launch(gpu, rows, depth, columns, num_stages=5)


def choose_down_launch(
    gpu: Gpu, *, tokens: int, top_k: int, depth: int, columns: int
) -> ProductLaunch:
    """Launch for the sum over the experts of a token, whose matrices are one of k * F rows.

    Args:
        gpu: what it runs on.
        tokens: M.
        top_k: k.
        depth: F.
        columns: E.
    """
    return _launch(gpu, tokens, top_k * depth, columns, num_stages=6)


def _launch(gpu, rows, depth, columns, num_stages):
    """Launch of two programs a multiprocessor, with a tile of rows each at least."""
    block_columns, block_depth = min(_BLOCK_COLUMNS, pad(columns)), min(_BLOCK_DEPTH, pad(depth))
    parts = round(2 * gpu.num_sms / (rows * pl.cdiv(columns, block_columns)))
    parts = max(1, min(parts, pl.cdiv(depth, block_depth)))
    return ProductLaunch(block_columns, block_depth, parts, _NUM_WARPS, num_stages)
