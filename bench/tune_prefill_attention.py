"""Kernel time of prefill attention for every sensible launch: what `choose_launch` is fitted to.

    python -m bench.tune_prefill_attention [--out DIR]

Writes tune_prefill_attention.json, a row for each shape and launch, of 8192 tokens.
"""

import functools
import itertools

from bench.measure import kernel_times, launch_rows, machine, output_folder, write_json
from bench.prefill_shapes import SHAPES, Shape
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch as Launch
from g4attn_jax.ops.flash_attention.launch import HeadSizes
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.prefill_attention import triton

TOKENS = 8192


def launches(shape: Shape) -> list[Launch]:
    """Those that an H200 has the registers for; `kernel_times` leaves out what does not fit."""
    if shape.head_dim == 256:
        tiles = [*itertools.product((64, 128), (32, 64), (1,), (8,), (2, 3)), (64, 64, 1, 4, 3)]
    else:
        tiles = [*itertools.product((64,), (16, 32), (1,), (8,), (2, 3, 4))]
        if shape.form is KVCache:
            tiles += itertools.product((64,), (16, 32), (2,), (4,), (2, 3))
            tiles += itertools.product((128,), (16, 32), (2,), (8,), (2, 3))
    return [
        Launch(rows, keys, 1, value_blocks, num_warps, num_stages)
        for rows, keys, value_blocks, num_warps, num_stages in tiles
    ]


def main():
    """Measures, prints the best launch and the chosen one, writes."""
    folder = output_folder(__doc__)
    rows = []
    for shape in SHAPES:
        if shape.paged and shape.form is CompactKVCache:
            continue
        arguments = shape.arguments(TOKENS)
        attend = functools.partial(
            triton.prefill_attention, sliding_window=shape.sliding_window, scale=1.0
        )
        chosen = triton.choose_launch(gpu(), HeadSizes.of(*arguments[:2]))
        functions = {
            launch: functools.partial(attend, launch=launch)
            for launch in {chosen, *launches(shape)}
        }
        times = {
            launch: time.us for launch, time in kernel_times(functions, [arguments], 5).items()
        }
        num_rows = TOKENS * shape.num_kv_heads * shape.group
        rows += launch_rows(shape, TOKENS, num_rows, times, chosen)
    write_json(
        folder / "tune_prefill_attention.json",
        machine() | {"command": "python -m bench.tune_prefill_attention"},
        rows,
    )


if __name__ == "__main__":
    main()
