"""Time of a whole decode step, with more and more of the kernels.

31B has every variant, other sizes the first and the last. Weights are random bfloat16, caches are
filled to 8192 tokens with random numbers, sliding layers have rings. A step goes from tokens to the
likeliest next ones, which the next step takes. Times are by the host's clock over chained, donated
steps. The limit is the bytes that must move over the rate of a float32 sum in the same run.
"""

import itertools
import statistics

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.steps._ablated import Variant
from bench.steps._model import StepCase, compile_steps, random_like
from g4attn_jax import Gemma4Config

CONTEXT = 8192
BATCHES = (1, 8, 32)
SHIPPED = Variant.COMPACT
MODELS = {
    "gemma-4-31b": tuple(Variant),
    "gemma-4-12b": (Variant.XLA, SHIPPED),
    "gemma-4-26b-a4b": (Variant.XLA, SHIPPED),
    "gemma-4-e4b": (Variant.XLA, SHIPPED),
}


def points():
    """A model, a variant and a number of sequences."""
    return [
        Point(
            {"model": model, "variant": variant.letter, "batch": batch, "context": CONTEXT}, variant
        )
        for model, variants in MODELS.items()
        for batch in BATCHES
        for variant in variants
    ]


def rows(points, gbps):
    """A row for each point; the variants of a model share its weights."""
    for model, of_model in itertools.groupby(points, lambda point: point.fields["model"]):
        config = Gemma4Config.preset(model)
        weights = random_like(StepCase(config, Variant.XLA, 1, CONTEXT).weights)
        for _, of_batch in itertools.groupby(of_model, lambda point: point.fields["batch"]):
            yield from measured(config, weights, list(of_batch), gbps)
        del weights


def measured(config, weights, points, gbps):
    """Rows of one model and number of sequences, whose caches go from variant to variant."""
    cases = [
        StepCase(config, point.subject, point.fields["batch"], CONTEXT + 256) for point in points
    ]
    cache, forms = None, None
    for point, case, step in zip(points, cases, compile_steps(cases), strict=True):
        if case.forms != forms:
            cache = None  # before there is another
            forms, cache = case.forms, random_like(case.cache())
        times, state = measure.step_ms(step, weights, (*case.tokens(CONTEXT), cache))
        kernels, (_, _, cache) = measure.profile_step(step, weights, state)
        del state  # caches of another form need its memory
        yield point.fields | {
            "step_ms": round(statistics.median(times), 3),
            "min_max_ms": [round(min(times), 3), round(max(times), 3)],
            "limit_ms": round(case.bytes(CONTEXT) / gbps / 1e6, 3),
            "launches": len(kernels),
            "kernels_ms": round(sum(ms for _, ms in kernels), 3),
            "kernels": measure.kernel_table(kernels),
        }


def _place(row):
    return row["model"], row["batch"]


def plot(rows, head, path):
    """Steps of 31B, and the first and the last variant of all models as shares of their limit."""
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys(map(_place, rows)))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    names = {variant.letter: variant.value for variant in Variant}
    largest = [row for row in rows if row["model"] == "gemma-4-31b"]
    for i, (letter, name) in enumerate(names.items()):
        times = [row["step_ms"] for row in largest if row["variant"] == letter]
        at = [j + 0.12 * (i - 3) for j in range(len(times))]
        axes[0].bar(at, times, 0.11, label=name, color=plt.cm.viridis(i / 6))
    for j, batch in enumerate(BATCHES):
        limits = {r["limit_ms"] for r in largest if r["batch"] == batch}
        for limit in sorted(limits):
            label = "memory limit of a and of f" if j == 0 and limit == max(limits) else None
            axes[0].plot([j - 0.45, j + 0.45], [limit] * 2, "k--", lw=1, label=label)
    axes[0].set_xticks(range(len(BATCHES)), [f"B = {batch}" for batch in BATCHES])
    axes[0].set(title="31B, a step", ylabel="ms")
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    ends = (Variant.XLA.letter, SHIPPED.letter)
    for i, letter in enumerate(ends):
        shares = [
            next(
                (
                    r["limit_ms"] / r["step_ms"]
                    for r in rows
                    if _place(r) == place and r["variant"] == letter
                ),
                0,
            )
            for place in places
        ]
        at = [j + 0.4 * (i - 0.5) for j in range(len(places))]
        bars = axes[1].bar(at, shares, 0.38, label=names[letter], color=plt.cm.viridis(i * 0.99))
        axes[1].bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=7)
    labels = [f"{model.removeprefix('gemma-4-')}\n{batch}" for model, batch in places]
    axes[1].set_xticks(range(len(places)), labels, fontsize=7)
    axes[1].set(title="other sizes too, by B", ylabel="memory limit / step", ylim=(0, 1.1))
    axes[1].legend(fontsize=8, loc="upper right", ncols=2)
    figure.suptitle(
        f"A decode step at context {CONTEXT}, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


_31B = {"model": "gemma-4-31b", "variant": SHIPPED.letter}
_SHARE = "a step reads 61 GB of weights, so what is over the limit is launches and their gaps"
BENCHMARK = Benchmark(
    name="decode_step",
    about="a whole step at a context of 8192, from XLA alone to all kernels",
    variants={variant.letter: variant.value for variant in Variant},
    identity=("model", "variant", "batch", "context"),
    fields=(
        "step_ms",
        "min_max_ms",
        "limit_ms",
        "launches",
        "kernels_ms",
        "kernels",
    ),
    points=points,
    measure=rows,
    watched={"step_ms": "min_max_ms", "launches": None},
    rate="read_gbps",
    head=lambda: {"variants": {variant.letter: variant.value for variant in Variant}},
    plot=plot,
    memory_fraction=0.94,
    bars=(
        *(
            Bar(
                of="step_ms",
                over="step_ms",
                beside={"variant": before.letter},
                where={"model": "gemma-4-31b", "variant": after.letter},
                most=1.005,
                why="every kernel must earn its place; half a percent is between two runs",
            )
            for before, after in itertools.pairwise(Variant)
        ),
        Bar(
            of="limit_ms",
            over="step_ms",
            where={**_31B, "batch": (1, 8)},
            least=0.91,
            why=_SHARE,
        ),
        Bar(of="limit_ms", over="step_ms", where={**_31B, "batch": 32}, least=0.90, why=_SHARE),
        Bar(
            of="step_ms",
            over="step_ms",
            beside={"variant": SHIPPED.letter},
            where={"model": "gemma-4-31b", "variant": Variant.XLA.letter, "batch": 32},
            least=1.15,
            why="with 32 sequences two fifths of the bytes are caches, where the kernels gain most",
        ),
    ),
)
