"""Kernel time of the fused norm for every sensible launch: what `choose_launch` is fitted to.

    python -m bench.tune_qkv_norm [--out DIR]

Writes tune_qkv_norm.json, a row for each shape, number of tokens and launch.
"""

import functools

from bench.measure import kernel_time, launch_rows, machine, output_folder, write_json
from bench.qkv_shapes import SHAPES
from g4attn_jax.ops.head_norm.triton import NormLaunch as Launch
from g4attn_jax.ops.head_norm.triton import choose_launch
from g4attn_jax.ops.qkv_rms_norm import triton

TOKENS = (1, 8, 32, 128, 256, 1024, 8192)
LAUNCHES = tuple(
    Launch(rows, warps) for rows, warps in ((1, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 4), (8, 8))
)


def main():
    """Measures, prints the best launch and the chosen one, writes."""
    folder = output_folder(__doc__)
    rows = []
    for shape in SHAPES:
        for tokens in TOKENS:
            calls = shape.calls(tokens)
            num_rows = tokens * shape.num_kv_heads * (shape.group + shape.mode.num_kv_projections)
            times = {
                launch: kernel_time(
                    functools.partial(
                        triton.qkv_rms_norm,
                        mode=shape.mode,
                        eps=1e-6,
                        scale_offset=0.0,
                        launch=launch,
                    ),
                    calls,
                    iterations=10,
                ).us
                for launch in LAUNCHES
            }
            chosen = choose_launch(num_rows, 2 * shape.head_dim)
            rows += launch_rows(shape, tokens, num_rows, times, chosen)
    write_json(
        folder / "tune_qkv_norm.json",
        machine() | {"command": "python -m bench.tune_qkv_norm"},
        rows,
    )


if __name__ == "__main__":
    main()
