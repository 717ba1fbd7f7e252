"""Time of a whole decode step, with more and more of the kernels.

31B has every variant, other sizes the first and the last. Weights are random bfloat16, caches are
filled to 8192 tokens with random numbers, sliding layers have rings. A step goes from tokens to the
likeliest next ones, which the next step takes. Steps of several tokens are verifications of drafts
of which the first token stays. Times are by the host's clock over chained, donated steps.

The limit is the bytes that must move over the rate of a float32 sum in the same run. Of experts it
counts those that steps of the same chain choose, beside it those of choices that are all as likely.

A draft step of the assistant of 31B is there too. It chooses one token of every sequence.
"""

import itertools
import statistics

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.steps._ablated import Variant
from bench.steps._model import StepCase, compile_steps, random_like
from bench.steps.speculative import DRAFTS, Group
from g4attn_jax import Gemma4Config

CONTEXT = 8192
BATCHES = (1, 8, 32, 64)
VERIFIED = (5, 9)  # tokens of a sequence
VERIFIED_BATCHES = (1, 8)
COUNTED_STEPS = 8  # in which experts are counted
SHIPPED = Variant.COMPACT
MODELS = {
    "gemma-4-31b": tuple(Variant),
    "gemma-4-12b": (Variant.XLA, SHIPPED),
    "gemma-4-26b-a4b": (Variant.XLA, SHIPPED),
    "gemma-4-e4b": (Variant.XLA, SHIPPED),
    "gemma-4-e2b": (Variant.XLA, SHIPPED),
}
TARGET, ASSISTANT = "gemma-4-31b", "gemma-4-31b-assistant"
# Its caches of 64 sequences do not fit beside its weights.
_MOST_SEQUENCES = {"gemma-4-31b": 32}


def points():
    """A model, a variant, a number of sequences, and of tokens of each."""
    found = []
    for model, variants in MODELS.items():
        batches = [b for b in BATCHES if b <= _MOST_SEQUENCES.get(model, b)]
        found += [_point(model, variant, batch) for batch in batches for variant in variants]
        found += [
            _point(model, SHIPPED, batch, tokens)
            for batch in VERIFIED_BATCHES
            for tokens in VERIFIED
        ]
    return found + [_point(ASSISTANT, SHIPPED, batch) for batch in BATCHES[:3]]


def _point(model, variant, batch, tokens=1):
    fields = {
        "model": model,
        "variant": variant.letter,
        "batch": batch,
        "tokens": tokens,
        "context": CONTEXT,
    }
    return Point(fields, variant)


def rows(points, gbps):
    """A row for each point; those of a model share its weights, and their steps are compiled side
    by side."""
    for model, of_model in itertools.groupby(points, lambda point: point.fields["model"]):
        if model == ASSISTANT:
            yield from drafts(list(of_model), gbps)
            continue
        config = Gemma4Config.preset(model)
        weights = random_like(StepCase(config, Variant.XLA, 1, CONTEXT).weights)
        yield from measured(config, weights, list(of_model), gbps)
        del weights


def _place_of_point(point):
    return point.fields["batch"], point.fields["tokens"]


def measured(config, weights, points, gbps):
    """Rows of one model, whose caches go from one variant to the next of the same form."""
    cases = [_case(config, point) for point in points]
    cache, kind = None, None
    for point, case, step in zip(points, cases, compile_steps(cases), strict=True):
        if (case.forms, _place_of_point(point)) != kind:
            cache = None  # before there is another
            kind, cache = (case.forms, _place_of_point(point)), random_like(case.cache())
        fields, state = measured_step(step, weights, (*case.tokens(CONTEXT), cache))
        experts = None
        if config.enable_moe_block:
            experts, state = chosen_experts(case, weights, state)
        *_, cache = state
        del state  # caches of another form need its memory
        yield point.fields | fields | limits(case, gbps, experts)


def _case(config, point):
    batch, tokens = _place_of_point(point)
    return StepCase(config, point.subject, batch, CONTEXT + 256, tokens_per_step=tokens)


def measured_step(step, stays, state, passes=1):
    """(fields of a row, the state after all steps); a call of `step` may be several passes."""
    times, state = measure.step_ms(step, stays, state)
    kernels, state = measure.profile_step(step, stays, state)
    fields = {
        "step_ms": round(statistics.median(times) / passes, 3),
        "min_max_ms": [round(min(times) / passes, 3), round(max(times) / passes, 3)],
        "launches": len(kernels) / passes if passes > 1 else len(kernels),
        "kernels_ms": round(sum(ms for _, ms in kernels) / passes, 3),
        "kernels": measure.kernel_table(kernels, passes),
    }
    return fields, state


def chosen_experts(case, weights, state):
    """(mean number of experts of a layer that a step chooses, the state after some steps)."""
    step, counts = case.counting_step(), []
    for _ in range(COUNTED_STEPS):
        state, of_step = step(weights, state)
        counts.append((of_step > 0).sum(axis=1).mean())
    return statistics.mean(map(float, counts)), state


def limits(case, gbps, experts):
    """Fields of a row: its limit; with experts also their number, and what both would be."""
    fields = {"limit_ms": round(case.bytes(CONTEXT, experts) / gbps / 1e6, 3)}
    if experts is None:
        return fields
    return fields | {
        "uniform_limit_ms": round(case.bytes(CONTEXT) / gbps / 1e6, 3),
        "experts": round(experts, 2),
        "uniform_experts": round(case.uniform_experts(), 2),
    }


def drafts(points, gbps):
    """Rows of a draft step of 31B's assistant: one of several passes, chained as in a group."""
    config, models = Gemma4Config.preset(TARGET), None
    for point in points:
        case = Group(config, point.fields["batch"])
        if models is None:
            models = random_like((case.weights, case.assistant_weights))
        stays = (*models, random_like(case.cache()))
        fields, _ = measured_step(case.draft_step(), stays, case.start(), passes=DRAFTS)
        del stays  # the next caches need its memory
        yield point.fields | fields | {"limit_ms": round(case.draft_bytes() / gbps / 1e6, 3)}


def plot(rows, head, path):
    """Steps of 31B; steps of all models as shares of their limit, of one token and of several."""
    import matplotlib.pyplot as plt

    names = {variant.letter: variant.value for variant in Variant}
    verified = [row for row in rows if row["tokens"] > 1]
    widths = (1.1, 2, 1) if verified else (1.1, 2)
    figure, axes = plt.subplots(
        1, len(widths), figsize=(17, 6.5), layout="constrained", width_ratios=widths
    )
    _plot_largest(axes[0], [r for r in rows if r["model"] == TARGET and r["tokens"] == 1], names)
    ends = {letter: names[letter] for letter in (Variant.XLA.letter, SHIPPED.letter)}
    _plot_shares(axes[1], [r for r in rows if r["tokens"] == 1], "variant", ends)
    axes[1].set(title="all sizes, by B", ylabel="memory limit / step")
    if verified:
        several = {tokens: f"{tokens} tokens" for tokens in VERIFIED}
        _plot_shares(axes[2], verified, "tokens", several)
        axes[2].set(title="verification, by B")
    figure.suptitle(
        f"A decode step at context {CONTEXT}, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def _plot_largest(axis, rows, names):
    """Times of all variants, by the number of sequences."""
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for i, (letter, name) in enumerate(names.items()):
        times = [row["step_ms"] for row in rows if row["variant"] == letter]
        at = [j + 0.12 * (i - 3) for j in range(len(times))]
        axis.bar(at, times, 0.11, label=name, color=plt.cm.viridis(i / 6))
    for j, batch in enumerate(batches):
        limits = {row["limit_ms"] for row in rows if row["batch"] == batch}
        for limit in sorted(limits):
            label = "memory limit of a and of f" if j == 0 and limit == max(limits) else None
            axis.plot([j - 0.45, j + 0.45], [limit] * 2, "k--", lw=1, label=label)
    axis.set_xticks(range(len(batches)), [f"B = {batch}" for batch in batches])
    axis.set(title="31B, a step", ylabel="ms")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _plot_shares(axis, rows, field, names):
    """Shares of the limit by model and number of sequences, a bar for each value of a field."""
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    for i, (value, name) in enumerate(names.items()):
        share = {
            (row["model"], row["batch"]): row["limit_ms"] / row["step_ms"]
            for row in rows
            if row[field] == value
        }
        at = [j + 0.4 * (i - 0.5) for j in range(len(places))]
        heights = [share.get(place, 0) for place in places]
        bars = axis.bar(at, heights, 0.38, label=name, color=plt.cm.viridis(i * 0.99))
        axis.bar_label(bars, [f"{height:.2f}" if height else "" for height in heights], fontsize=6)
    labels = [f"{_short(model)}\n{batch}" for model, batch in places]
    axis.set_xticks(range(len(places)), labels, fontsize=6)
    axis.set(ylim=(0, 1.1))
    axis.legend(fontsize=8, loc="upper right", ncols=2)


def _short(model):
    return model.removeprefix("gemma-4-").replace("-", "\n")


# Least shares of the limit by model and number of sequences, and why they are asked for.
_SMALL = "where launches are short, filling and draining the memory bus is what they cost"
_SHARES = {
    "gemma-4-e4b": ({1: 0.70, 8: 0.75, 32: 0.80}, _SMALL),
    "gemma-4-e2b": ({1: 0.62, 8: 0.70, 32: 0.75}, _SMALL),
    "gemma-4-26b-a4b": (
        {1: 0.70, 8: 0.82, 32: 0.88},
        "of the experts those that were chosen are read, once, and nothing waits for the router",
    ),
    "gemma-4-12b": (
        {1: 0.86, 8: 0.87, 32: 0.88},
        "a step reads 24 GB of weights, so what is over the limit is launches and their gaps",
    ),
    "gemma-4-31b": (
        {1: 0.91, 8: 0.91, 32: 0.90},
        "a step reads 61 GB of weights, so what is over the limit is launches and their gaps",
    ),
}
# What 31B reached before the small models were worked on.
_REACHED = {1: 0.877, 8: 0.885, 32: 0.883}


def _share_bars(model, shares, why):
    """Bars of a model's shares, those that are as high for several numbers of sequences once."""
    where = {"model": model, "variant": SHIPPED.letter, "tokens": 1}
    return [
        Bar(
            of="limit_ms",
            over="step_ms",
            where={**where, "batch": tuple(b for b in shares if shares[b] == least)},
            least=least,
            why=why,
        )
        for least in dict.fromkeys(shares.values())
    ]


BENCHMARK = Benchmark(
    name="decode_step",
    about="whole steps at a context of 8192: from XLA alone to all kernels, verifications, drafts",
    variants={variant.letter: variant.value for variant in Variant},
    identity=("model", "variant", "batch", "tokens", "context"),
    fields=(
        "step_ms",
        "min_max_ms",
        "limit_ms",
        "uniform_limit_ms",
        "experts",
        "uniform_experts",
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
        *(bar for model, shares in _SHARES.items() for bar in _share_bars(model, *shares)),
        *_share_bars(TARGET, _REACHED, "faster small models must not make the largest slower"),
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
