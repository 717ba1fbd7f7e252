"""Flash-decoding: one launch over (sequence, KV head, split), and one to combine the splits.

With one split there is no second launch.
"""

from jax.experimental import pallas as pl

from g4attn_jax.ops.decode_attention.splits import choose_splits, combine_splits
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch, HeadSizes
from g4attn_jax.ops.flash_attention.triton import flash_attention
from g4attn_jax.ops.float8_cache import apart_if_float8
from g4attn_jax.ops.gpu import Gpu, gpu

_MAX_TILE_BYTES = 80 * 1024


def choose_launch(
    gpu: Gpu,
    sizes: HeadSizes,
    *,
    batch: int,
    num_kv_heads: int,
    rows: int,
    max_keys: int,
    num_splits: int | None = None,
) -> AttentionLaunch:
    """Launch for a step, fitted to bench/results/h200/tune_decode_attention.json.

    Up to 16 query rows take tensor core instructions of 16 rows, more those of 64. A multiprocessor
    holds the accumulators of 64 x 512 in the registers of 8 warps, which share the rows' scores, or
    two programs of 4 share the columns of the values: faster where those are not keys too. A tile
    is as large as leaves room in shared memory for another on its way, and as many programs share a
    sequence and KV head as make the longest row of programs, one at a time on a multiprocessor, as
    short as possible. With 16 rows and heads of up to 256 it has smaller tiles where with them a
    multiprocessor holds more than two programs and all run at once.

    Args:
        gpu: what it runs on.
        sizes: of queries, keys and values.
        batch: sequences.
        num_kv_heads: Nkv.
        rows: query rows of a KV head, T * G.
        max_keys: the most keys that a sequence may have.
        num_splits: overrides the number of splits.

    Returns:
        The fastest launch that fits the shared memory, or the least one if none does.
    """
    for block_rows, value_blocks, num_warps in _row_blocks(rows, sizes):
        programs = batch * num_kv_heads * pl.cdiv(rows, block_rows) * value_blocks
        launches = [
            AttentionLaunch(
                block_rows,
                block_keys,
                num_splits or choose_splits(gpu, programs, pl.cdiv(max_keys, block_keys)),
                value_blocks,
                num_warps,
                num_stages,
            )
            for block_keys, num_stages in ((64, 3), (32, 3), (16, 3), (16, 2))
        ]
        fitting = [
            launch
            for launch in launches
            if sizes.tile_bytes(launch.block_keys, value_blocks) <= _MAX_TILE_BYTES
            and sizes.fits(gpu, launch)
        ]
        if block_rows == 16 and sizes.head_dim <= 256:
            fitting.sort(key=lambda launch: not _is_one_turn(gpu, sizes, programs, launch))
        if fitting:
            return fitting[0]
    return launches[-1]


def _is_one_turn(gpu, sizes, programs, launch):
    """Whether all programs of a launch run at once, more than two on a multiprocessor.

    With two stages more would, but each has a single tile on its way, which was slower.
    """
    held = gpu.shared_memory // sizes.shared_memory(gpu, launch)
    runs = programs * launch.num_splits <= gpu.num_sms * held
    return launch.num_stages == 3 and held > 2 and runs


def _row_blocks(rows, sizes):
    """(query rows of a program, programs that share the values' columns, warps), fastest first."""
    if rows > 16 and sizes.q_bytes < 4:
        if sizes.head_dim <= 256:
            yield 64, 1, 4
        elif sizes.head_dim == 512 and sizes.value_width is not None:
            yield 64, 2, 4
        else:
            yield 64, 1, 8
    yield 16, 1, 4


def launch_for(q, cache, page_table, *, sliding_window, num_splits=None) -> AttentionLaunch:
    """`choose_launch` for arguments of `decode_attention`."""
    tokens, (_, page_size, num_kv_heads, _) = q.shape[1], cache.value_part.array.shape
    max_keys = page_size if page_table is None else page_table.shape[1] * page_size
    if sliding_window is not None:
        max_keys = min(max_keys, sliding_window + tokens - 1)
    return choose_launch(
        gpu(),
        HeadSizes.of(q, cache),
        batch=q.shape[0],
        num_kv_heads=num_kv_heads,
        rows=tokens * q.shape[2] // num_kv_heads,
        max_keys=max_keys,
        num_splits=num_splits,
    )


def decode_attention(
    q,
    cache,
    page_table,
    positions,
    *,
    sliding_window,
    scale,
    num_splits,
    interpret=False,
    launch=None,
):
    """Kernel of `g4attn_jax.ops.decode_attention`; `launch` overrides the choice, for tuning."""
    launch = launch or launch_for(
        q, cache, page_table, sliding_window=sliding_window, num_splits=num_splits
    )

    def run(*arguments):
        o, log_sum = flash_attention(
            *arguments,
            sliding_window=sliding_window,
            scale=scale,
            launch=launch,
            name="decode_attention",
            interpret=interpret,
        )
        if log_sum is None:
            return o
        return combine_splits(o, log_sum, q.dtype, interpret=interpret)

    return apart_if_float8(run, cache)(q, cache, page_table, positions)
