"""Kernel time of the experts' products for launches; `choose_launch` is fitted to it.

    python -m bench.tune_grouped_matmul [--out DIR]

Writes tune_grouped_matmul.json, a row for each product, number of tokens and launch. Launches that
the shared memory does not hold are left out.
"""

import functools
import itertools

from bench.measure import (
    kernel_times,
    launch_rows,
    machine,
    output_folder,
    read_gbps,
    write_json,
)
from bench.moe_shapes import EMBED, EXPERTS, PRODUCTS, WIDTH, Shape
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.grouped_gated_matmul.triton import grouped_gated_matmul
from g4attn_jax.ops.grouped_matmul.triton import Launch, Sizes, choose_launch, grouped_matmul

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
KERNELS = {"gated": grouped_gated_matmul, "down": grouped_matmul}

# Rows, columns of all parts, depth, warps, stages.
_FEW_ROWS = (
    (16, 64, 64, 4, 4),
    (16, 64, 64, 4, 6),
    (16, 64, 128, 4, 3),
    (16, 64, 128, 4, 4),
    (16, 64, 128, 4, 6),
    (16, 64, 128, 2, 4),
    (16, 64, 256, 4, 3),
    (16, 128, 64, 4, 4),
    (16, 128, 64, 4, 6),
    (16, 128, 128, 4, 3),
    (16, 128, 128, 8, 4),
    (32, 128, 64, 4, 4),
)
_MANY_ROWS = (
    (32, 128, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 4, 3),
    (64, 256, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
)


def launches(sizes: Sizes, chosen: Launch) -> list[Launch]:
    """Those of the lists for so many rows, and the chosen one."""
    listed = _FEW_ROWS if sizes.rows <= 8 * EXPERTS else _MANY_ROWS
    of_parts = {Launch(rows, width // sizes.parts, *rest) for rows, width, *rest in listed}
    return sorted(of_parts | {chosen})


def main():
    """Measures, prints the best launch and the chosen one, writes."""
    folder = output_folder(__doc__)
    gbps = read_gbps()
    rows = []
    for product, tokens in itertools.product(PRODUCTS, TOKENS):
        shape = Shape(product, tokens)
        parts = (EMBED, 2, WIDTH) if product == "gated" else (WIDTH, 1, EMBED)
        sizes = Sizes(shape.num_rows, EXPERTS, *parts, 2)
        chosen = choose_launch(gpu(), sizes)
        functions = {
            launch: functools.partial(KERNELS[product], launch=launch)
            for launch in launches(sizes, chosen)
        }
        times = {
            launch: time.us for launch, time in kernel_times(functions, shape.calls(), 5).items()
        }
        rows += launch_rows(shape, tokens, shape.num_rows, times, chosen)
    head = machine() | {
        "read_gbps": round(gbps, 1),
        "command": "python -m bench.tune_grouped_matmul",
    }
    write_json(folder / "tune_grouped_matmul.json", head, rows)


if __name__ == "__main__":
    main()
