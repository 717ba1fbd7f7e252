"""Kernel time of the prologue for every sensible launch: what its `choose_launch` is fitted to.

    python -m bench.tune_qkv_prologue [--out DIR]

Writes tune_qkv_prologue.json, a row for each shape, number of tokens and launch.
"""

import functools

from bench.measure import kernel_time, launch_rows, machine, output_folder, write_json
from bench.prologue_shapes import SHAPES
from g4attn_jax import ProjectionMode
from g4attn_jax.cache import CompactKVCache
from g4attn_jax.ops.head_norm.triton import NormLaunch as Launch
from g4attn_jax.ops.qkv_norm_rope.triton import choose_launch
from g4attn_jax.ops.qkv_norm_rope_write import triton

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
LAUNCHES = tuple(
    Launch(rows, warps)
    for rows, warps in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (16, 4))
)


def launched(shape, launch):
    """The kernel with this launch, as `kernel_time` takes it."""
    if shape.mode is not ProjectionMode.Q_ONLY:
        return functools.partial(
            triton.qkv_norm_rope_write, mode=shape.mode, eps=1e-6, launch=launch
        )

    def query(qkv, q_norm, k_norm, cos, sin, _, cache):
        constants = {"form": shape.form, "mode": shape.mode, "eps": 1e-6, "launch": launch}
        return triton.query(qkv, q_norm, k_norm, cos, sin, **constants), cache

    return query


def main():
    """Measures, prints the best launch and the chosen one, writes."""
    folder = output_folder(__doc__)
    rows = []
    for shape in SHAPES:
        for tokens in TOKENS:
            calls, cache = shape.calls(tokens), shape.cache()
            num_rows = tokens * shape.rows_in
            times = {
                launch: kernel_time(launched(shape, launch), calls, 5, state=cache).us
                for launch in LAUNCHES
            }
            absorbed = shape.form is CompactKVCache
            chosen = choose_launch(num_rows, shape.head_dim, absorbed=absorbed)
            rows += launch_rows(shape, tokens, num_rows, times, chosen)
    write_json(
        folder / "tune_qkv_prologue.json",
        machine() | {"command": "python -m bench.tune_qkv_prologue"},
        rows,
    )


if __name__ == "__main__":
    main()
