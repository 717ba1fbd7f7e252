"""Decode attention of several tokens on Hopper, through Pallas' Mosaic GPU.

From 17 query rows of heads of 512 on, Triton's instructions of 64 rows and what is between them
take longer than the cache's bytes. Here TMA brings tiles while two warpgroups multiply in turn.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as mg

from g4attn_jax.ops.decode_attention.mosaic_kernel import (
    MosaicInputs,
    MosaicSizes,
    Shared,
    attend,
)
from g4attn_jax.ops.decode_attention.mosaic_limits import CHUNK, KEYS, ROWS, num_blocks
from g4attn_jax.ops.decode_attention.splits import choose_splits, combine_splits
from g4attn_jax.ops.flash_attention.operands import LOG2_E, operands
from g4attn_jax.ops.gpu import Gpu, gpu

# What the interpreter plays: an H200.
_INTERPRETED = Gpu(9.0, 132, 227 * 1024)


def decode_attention(
    q, cache, page_table, positions, *, sliding_window, scale, num_splits, interpret=False
):
    """Kernel of `g4attn_jax.ops.decode_attention`, for arguments without `refusal`."""
    del sliding_window  # there is none

    # Under vmap one by one: JAX has no rule for a batch of such kernels.
    @jax.custom_batching.sequential_vmap
    def run(q, cache, page_table, positions):
        sizes = _sizes(q, cache, page_table, positions, num_splits, interpret)
        o, log_sum = _launch(q, cache, page_table, positions, sizes, scale * LOG2_E)
        if sizes.splits == 1:
            return o[0]
        return combine_splits(o, log_sum, q.dtype, interpret=interpret)

    return run(q, cache, page_table, positions)


def _sizes(q, cache, page_table, positions, num_splits, interpret):
    _, shape = operands(q, cache, page_table, positions)
    target = _INTERPRETED if interpret else gpu()
    blocks = num_blocks(shape.tokens, shape.group)
    programs = len(q) * shape.num_kv_heads * blocks
    tiles = shape.columns * shape.page_size // KEYS
    return MosaicSizes(
        shape=shape,
        rotary_dim=q.shape[3] - shape.head_dim if cache.values_are_keys else None,
        blocks=blocks,
        splits=num_splits or choose_splits(target, programs, tiles),
        shared_memory=target.shared_memory,
        interpret=interpret,
    )


def _launch(q, cache, page_table, positions, sizes, factor):
    """Result of each split: (its part of the output, log2 of the sum of exp of its scores).

    Parts are [splits, B, T, Nq, D], in float32; of a single split, o itself, in q's dtype.
    """
    (batch, tokens, num_q_heads, width), splits = q.shape, sizes.splits
    out_dtype = jnp.dtype(q.dtype if splits == 1 else jnp.float32)
    arrays = [array.reshape(-1, array.shape[2] * array.shape[3]) for array in cache.written]
    q_lines, out_lines = (sizes.lines(n) for n in (sizes.q_tokens, sizes.padded_tokens))
    ring = _swizzled((sizes.stages,), (KEYS, CHUNK), q.dtype)
    used = mg.Barrier
    if sizes.blocks > 1:
        used = functools.partial(mg.ClusterBarrier, collective_axes=("block",))
    shared = Shared(
        q=_swizzled((), (*q_lines, CHUNK), q.dtype),
        ring_or_out=mg.RefUnion(ring, _swizzled((2, 2), (*out_lines, CHUNK), out_dtype)),
        weights=_swizzled((), (ROWS, KEYS), q.dtype),
        largest=mg.SMEM((ROWS,), jnp.float32),
        totals=mg.SMEM((2, ROWS), jnp.float32),
        log_sum=mg.SMEM(out_lines, jnp.float32),
        loaded=mg.Barrier(num_barriers=sizes.stages),
        used=used(num_arrivals=2, num_barriers=sizes.stages),
        q_loaded=mg.Barrier(
            num_arrivals=sizes.key_chunks * (sizes.tokens if sizes.interpret else 1)
        ),
        published=mg.Barrier(num_arrivals=1, num_barriers=2),
        met=mg.Barrier(num_arrivals=2),
    )

    def body(inputs, o, log_sum, shared):
        attend(inputs, o, log_sum, shared, sizes=sizes, factor=factor)

    body.__name__ = "decode_attention"  # the launch's
    o, log_sum = mg.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (splits * batch * tokens, num_q_heads, sizes.shape.head_dim), out_dtype
            ),
            jax.ShapeDtypeStruct((splits * batch * tokens, num_q_heads), jnp.float32),
        ),
        scratch_types=(shared,),
        grid=(batch * sizes.shape.num_kv_heads, splits),
        grid_names=("sequence_and_head", "split"),
        cluster=(sizes.blocks,),
        cluster_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=mg.CompilerParams(approx_math=True),
        interpret=mg.InterpretGPUParams() if sizes.interpret else None,
    )(MosaicInputs(q.reshape(-1, num_q_heads, width), tuple(arrays), page_table, positions))
    shape = splits, batch, tokens, num_q_heads
    return o.reshape(*shape, -1), log_sum.reshape(shape)


def _swizzled(arrays, lines, dtype):
    """Shared memory as TMA and tensor cores share it: 8 lines of 128 bytes together.

    Args:
        arrays: dimensions that are not of one array.
        lines: those of one: of its lines, and what a line has.
        dtype: of a number.
    """
    tiling = *[1] * (len(lines) - 2), 8, 128 // jnp.dtype(dtype).itemsize
    transforms = mg.TilingTransform(tiling), mg.SwizzleTransform(128)
    return mg.SMEM((*arrays, *lines), dtype, transforms=transforms)
