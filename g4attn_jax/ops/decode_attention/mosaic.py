"""Decode attention of several tokens on Hopper, through Pallas' Mosaic GPU.

From 17 query rows of heads of 512 on, Triton's instructions of 64 rows and what is between them
take longer than the cache's bytes. Here TMA brings tiles while two warpgroups multiply in turn.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from g4attn_jax.cache import Cache, KVCache
from g4attn_jax.ops.decode_attention.mosaic_kernel import (
    CHUNK,
    KEYS,
    ROWS,
    Inputs,
    Shared,
    Sizes,
    attend,
)
from g4attn_jax.ops.decode_attention.triton import choose_splits, combine
from g4attn_jax.ops.flash_attention.tiles import operands
from g4attn_jax.ops.flash_attention.triton import LOG2_E
from g4attn_jax.ops.gpu import gpu


def refusal(q, cache: Cache, page_table, sliding_window: int | None) -> str | None:
    """Why this kernel does not take arguments of `decode_attention`, or None."""
    tables = () if page_table is None else page_table.shape
    if not all(isinstance(size, int) for size in (*q.shape, *cache.v.shape, *tables)):
        return "sizes are symbolic; accepted: known ones"
    _, tokens, num_q_heads, width = q.shape
    _, page_size, num_kv_heads, head_dim = cache.v.shape
    group = num_q_heads // num_kv_heads
    accepted = {
        f"the GPU has compute capability {gpu().compute_capability}; accepted: 9.0": (
            gpu().compute_capability == 9.0
        ),
        f"sliding_window is {sliding_window}; accepted: None": sliding_window is None,
        f"q is {q.dtype} and the cache {cache.v.dtype}; accepted: bfloat16 or float16, of both": (
            q.dtype in (jnp.bfloat16, jnp.float16) and cache.v.dtype == q.dtype
        ),
        # The ring holds all keys of a tile at a time, and would not of more numbers.
        f"heads have {head_dim} numbers and {width - head_dim} rotated ones apart; accepted: 512 "
        f"and 0 or {CHUNK}": head_dim == 512 and width - head_dim in (0, CHUNK),
        f"{tokens} tokens have {group} query heads a KV head; accepted: 8, 16, 32 or {ROWS} heads, "
        f"in all 17 to {2 * ROWS}, of them at most {ROWS} of half of the tokens, rounded "
        "up": group in (8, 16, 32, ROWS)
        and 16 < tokens * group
        and pl.cdiv(tokens, _blocks(tokens, group)) * group <= ROWS,
        f"pages have {page_size} slots; accepted: a multiple of {KEYS}": page_size % KEYS == 0,
    }
    return next((reason for reason, is_so in accepted.items() if not is_so), None)


def decode_attention(
    q, cache, page_table, positions, *, sliding_window, scale, num_splits, interpret=False
):
    """See `g4attn_jax.ops.decode_attention`, for arguments without `refusal`."""
    del sliding_window  # there is none

    # Under vmap one by one: JAX has no rule for a batch of such kernels.
    @jax.custom_batching.sequential_vmap
    def run(q, cache, page_table, positions):
        sizes = _sizes(q, cache, page_table, positions, num_splits, interpret)
        o, log_sum = _launch(q, cache, page_table, positions, sizes, scale * LOG2_E)
        return o[0] if sizes.splits == 1 else combine(o, log_sum, q.dtype, interpret)

    return run(q, cache, page_table, positions)


def _blocks(tokens, group):
    return 1 if tokens * group <= ROWS else 2


def _sizes(q, cache, page_table, positions, num_splits, interpret):
    _, shape = operands(q, cache, page_table, positions)
    blocks = _blocks(shape.tokens, shape.group)
    programs = len(q) * shape.num_kv_heads * blocks
    tiles = shape.columns * shape.page_size // KEYS
    return Sizes(
        shape=shape,
        rotary_dim=None if isinstance(cache, KVCache) else q.shape[3] - shape.head_dim,
        blocks=blocks,
        splits=num_splits or choose_splits(gpu(), programs, tiles),
        shared_memory=gpu().shared_memory,
        interpret=interpret,
    )


def _launch(q, cache, page_table, positions, sizes, factor):
    """What the splits leave: (parts, log2 of the sum of exp of their scores).

    Parts are [splits, B, T, Nq, D], in float32; of a single split, o itself, in q's dtype.
    """
    (batch, tokens, num_q_heads, width), splits = q.shape, sizes.splits
    out_dtype = jnp.dtype(q.dtype if splits == 1 else jnp.float32)
    arrays = [part.array for part in cache.key_parts if part.array is not cache.v] + [cache.v]
    arrays = [array.reshape(-1, array.shape[2] * array.shape[3]) for array in arrays]
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
    )(Inputs(q.reshape(-1, num_q_heads, width), tuple(arrays), page_table, positions))
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
