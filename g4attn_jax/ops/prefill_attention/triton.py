"""Flash attention of a prompt, or a chunk of one, in one launch."""

from g4attn_jax.ops.flash_attention.launch import AttentionLaunch, HeadSizes
from g4attn_jax.ops.flash_attention.triton import flash_attention
from g4attn_jax.ops.float8_cache import apart_if_float8
from g4attn_jax.ops.gpu import Gpu, gpu

# Query rows of a program, keys of a tile, programs that share the columns of values, warps and
# stages: the fastest on an H200 first, down to what 99 KiB of shared memory hold.
_WIDE = (
    (128, 32, 2, 8, 2),
    (64, 32, 1, 8, 3),
    (64, 16, 1, 8, 3),
    (32, 16, 1, 8, 2),
    (16, 16, 1, 8, 2),
)
_NARROW = (
    (128, 64, 1, 8, 2),
    (128, 32, 1, 8, 3),
    (64, 32, 1, 8, 3),
    (64, 16, 1, 8, 2),
    (16, 16, 1, 8, 2),
)
_FLOAT32 = ((32, 16, 1, 8, 2), (16, 16, 1, 8, 2))


def choose_launch(gpu: Gpu, sizes: HeadSizes) -> AttentionLaunch:
    """Launch for a layer, fitted to bench/results/h200/tune_prefill_attention.json.

    Keys and values are read again for every block of rows, so it has as many as the registers hold
    the accumulators of.

    Returns:
        The fastest launch that fits the shared memory, or the least one if none does.
    """
    tiles = _FLOAT32 if sizes.q_bytes == 4 else _WIDE if sizes.head_dim > 256 else _NARROW
    for rows, keys, value_blocks, num_warps, num_stages in tiles:
        launch = AttentionLaunch(rows, keys, 1, value_blocks, num_warps, num_stages)
        # Blocks of columns are not padded, and not of values that are keys too.
        can_share = sizes.head_dim == 512 and sizes.value_width is not None
        if (value_blocks == 1 or can_share) and sizes.fits(gpu, launch):
            return launch
    return launch


def prefill_attention(
    q, cache, page_table, positions, *, sliding_window, scale, interpret=False, launch=None
):
    """Kernel of `g4attn_jax.ops.prefill_attention`; `launch` overrides the choice, for tuning."""
    launch = launch or choose_launch(gpu(), HeadSizes.of(q, cache))

    def run(*arguments):
        return flash_attention(
            *arguments,
            sliding_window=sliding_window,
            scale=scale,
            launch=launch,
            name="prefill_attention",
            interpret=interpret,
        )[0]

    return apart_if_float8(run, cache)(q, cache, page_table, positions)
