"""Kernel time of the experts' products of 26B-A4B.

    python -m bench.grouped_matmul [--out DIR]

Writes grouped_matmul.json and grouped_matmul.png. Compared are

    ours    `ops.grouped_gated_matmul` and `ops.grouped_matmul`
    xla     their references: `jax.lax.ragged_dot`, which XLA makes a product with all experts of

and the limit is the bytes that must move, of the matrices those of the touched experts alone, over
the rate of a float32 sum measured in the same run.
"""

import functools
import itertools

from bench.measure import (
    kernel_time,
    machine,
    output_folder,
    plot_times,
    read_gbps,
    write_json,
)
from bench.moe_shapes import PRODUCTS, Shape
from g4attn_jax import ops

TOKENS = (1, 8, 32, 128, 2048, 8192)
XLA_TOKENS = (1, 8, 32, 128)  # above, a row for every expert is 12 GB and more
OPS = {"gated": ops.grouped_gated_matmul, "down": ops.grouped_matmul}


def measure_row(shape: Shape, gbps: float) -> dict:
    """One row of the JSON."""
    calls, op = shape.calls(), OPS[shape.product]
    ours = kernel_time(functools.partial(op, implementation="triton"), calls, 10)
    xla_us = None
    if shape.tokens in XLA_TOKENS:
        xla_us = kernel_time(functools.partial(op, implementation="xla"), calls[:1], 3).us
    row = {
        **shape.fields(),
        "num_rows": shape.num_rows,
        "ours_us": ours.us,
        "ours_p10_us": ours.p10,
        "ours_p90_us": ours.p90,
        "xla_us": xla_us,
        "limit_us": shape.bytes(calls) / gbps / 1e3,
        "tflops": shape.flops / ours.us / 1e6,
        "launches": ours.launches,
    }
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def plot(rows: list[dict], head: dict, path) -> None:
    """Time against tokens, a panel for each product."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PRODUCTS), figsize=(11, 4.5), layout="constrained")
    titles = {"gated": "gelu(x Wg) * (x Wu), 2816 to 704", "down": "x Wd, 704 to 2816"}
    for axis, product in zip(axes, PRODUCTS, strict=True):
        shown = [row for row in rows if row["product"] == product]
        theirs = [(row["tokens"], row["xla_us"]) for row in shown if row["xla_us"] is not None]
        axis.loglog(*zip(*theirs, strict=True), color="tab:red", marker="s", ms=4, label="XLA")
        ours = {"ours": ("g4attn-jax", "tab:blue", "o")}
        plot_times(axis, titles[product], shown, ours)
        axis.legend()
    figure.suptitle(
        f"8 of 128 experts a token (26B-A4B), bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    gbps = read_gbps()
    head = machine() | {"read_gbps": round(gbps, 1), "command": "python -m bench.grouped_matmul"}
    rows = []
    for product, tokens in itertools.product(PRODUCTS, TOKENS):
        row = measure_row(Shape(product, tokens), gbps)
        rows.append(row)
        print(
            f"{product:<6} tokens={tokens:<5} ours {row['ours_us']} us, xla {row['xla_us']} us, "
            f"limit/ours {row['limit_us'] / row['ours_us']:.3f}, {row['tflops']:.0f} TFLOP/s",
            flush=True,
        )
    write_json(folder / "grouped_matmul.json", head, rows)
    plot(rows, head, folder / "grouped_matmul.png")


if __name__ == "__main__":
    main()
