"""The tensor core products of Triton's attention on Hopper, compiled on a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from g4attn_jax import ops
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.testing import gpu_target

pytestmark = [
    pytest.mark.skipif(gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())),
    pytest.mark.skipif(gpu_target.ptxas() is None, reason="needs nvidia-cuda-nvcc-cu12"),
]


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("tokens", "batch", "nkv", "group", "head_dim", "window", "form", "products"),
    [
        # Of a tile: for the scores a key's width / 16; for the values keys / 16, a warpgroup having
        # 64 x 256 accumulators.
        (6, 8, 4, 8, 512, None, KVCache, 32 + 2),
        (6, 8, 4, 8, 512, None, CompactKVCache, 40 + 2),
        (6, 32, 4, 8, 512, None, CompactKVCache, 40 + 2),  # one split
        (16, 8, 16, 2, 256, 1024, KVCache, 16 + 4),
        (2048, 1, 4, 8, 512, None, KVCache, 32 + 2),
        (2048, 1, 4, 8, 512, None, CompactKVCache, 40 + 2),
        (2048, 1, 16, 2, 256, 1024, KVCache, 16 + 4),
    ],
)
def test_none_waits_for_another_or_is_done_again(
    tokens, batch, nkv, group, head_dim, window, form, products
):
    """Either is as right, and half as fast: the tests of results do not see it."""
    widths = (head_dim, 128) if form is CompactKVCache else (head_dim, head_dim)
    width = head_dim + 128 if form is CompactKVCache else head_dim
    op = ops.decode_attention if tokens <= 16 else ops.prefill_attention
    ptx, said = gpu_target.assembly(
        "9.0",
        functools.partial(op, sliding_window=window, implementation="triton"),
        struct(batch, tokens, nkv * group, width),
        form(*(struct(batch, 8192, nkv, w) for w in widths)),
        None,
        struct(batch, tokens, dtype=jnp.int32),
    )
    assert ptx.count("wgmma.mma_async") == products
    assert "registers" in said and "Potential Performance Loss" not in said
