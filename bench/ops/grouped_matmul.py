"""Kernel time of the experts' products of 26B-A4B.

"gated" is `ops.grouped_gated_matmul`, "down" `ops.grouped_matmul` of its result. The limit counts
the matrices of touched experts alone, over the rate of a float32 sum measured in the same run.
"""

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.plots import times_against_tokens
from g4attn_jax.ops.grouped_gated_matmul.cases import CASES as GATED
from g4attn_jax.ops.grouped_matmul.cases import CASES as DOWN
from g4attn_jax.testing.case import tagged

MAX_XLA_TOKENS = 128  # above, a row for every expert is 12 GB and more
PRODUCTS = {"gated": GATED, "down": DOWN}


def points():
    """Both products, by the number of tokens."""
    return [
        Point({"product": product, "tokens": case.tokens}, case)
        for product, cases in PRODUCTS.items()
        for case in tagged(cases, "bench")
    ]


def rows(points, gbps):
    """A row for each point."""
    for point in points:
        case = point.subject
        calls = measure.calls_from_memory(case)
        ours = measure.kernel_time(_run(case, "triton"), calls, 10)
        xla_us = None
        if case.tokens <= MAX_XLA_TOKENS:
            xla_us = measure.kernel_time(_run(case, "xla"), calls[:1], 3).us
        fields = {
            "num_rows": case.num_rows,
            "ours_us": ours.us,
            "ours_p10_us": ours.p10,
            "ours_p90_us": ours.p90,
            "xla_us": xla_us,
            "limit_us": case.bytes() / gbps / 1e3,
            "tflops": case.flops() / ours.us / 1e6,
            "launches": ours.launches,
        }
        yield point.fields | {name: measure.rounded(value) for name, value in fields.items()}


def _run(case, implementation):
    return lambda *arguments: case.run(arguments, implementation)


def plot(rows, head, path):
    """Time against tokens, a panel for each product."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PRODUCTS), figsize=(11, 4.5), layout="constrained")
    titles = {"gated": "gelu(x Wg) * (x Wu), 2816 to 704", "down": "x Wd, 704 to 2816"}
    for axis, product in zip(axes, PRODUCTS, strict=True):
        shown = [row for row in rows if row["product"] == product]
        theirs = [(row["tokens"], row["xla_us"]) for row in shown if row["xla_us"] is not None]
        axis.loglog(*zip(*theirs, strict=True), color="tab:red", marker="s", ms=4, label="XLA")
        times_against_tokens(
            axis, titles[product], shown, {"ours": ("g4attn-jax", "tab:blue", "o")}
        )
        axis.legend()
    figure.suptitle(
        f"8 of 128 experts a token (26B-A4B), bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


BENCHMARK = Benchmark(
    name="grouped_matmul",
    about="the products of 26B-A4B's experts",
    variants={
        "ours": "grouped_gated_matmul and grouped_matmul",
        "xla": "jax.lax.ragged_dot, of which XLA makes a product with all experts",
    },
    identity=("product", "tokens"),
    fields=(
        "num_rows",
        "ours_us",
        "ours_p10_us",
        "ours_p90_us",
        "xla_us",
        "limit_us",
        "tflops",
        "launches",
    ),
    points=points,
    measure=rows,
    watched={"ours_us": ("ours_p10_us", "ours_p90_us"), "launches": None},
    rate="read_gbps",
    plot=plot,
    bars=(Bar(of="launches", most=1, why="each product is one launch, however many experts"),),
)
