"""Time that the host needs to dispatch a jitted decode step with as many arrays as 31B has.

Sizes are tiny but layers are 31B's 60, so that weights and caches have 31B's leaves. The program
has nothing to do: what is timed is JAX going through arguments and results. To put a step's kernels
into the GPU's queue is XLA's own work, and comes on top.
"""

import dataclasses
import statistics
import time

import jax
from flax import nnx

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.steps._ablated import Variant
from bench.steps._model import StepCase, random_like
from g4attn_jax import Gemma4Config

MODEL = "gemma-4-31b"
CALLS = 200
VARIANTS = {
    "tuple": "weights as the flat tuple of split_weights",
    "state": "weights as the nnx.State of nnx.split",
}


def tiny(config):
    """The config with its layers and layer types, and sizes that take no time."""
    return dataclasses.replace(
        config,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        sliding_window=64,
        vocab_size=128,
    )


def points():
    """The variants."""
    return [Point({"model": MODEL, "variant": variant}) for variant in VARIANTS]


def rows(points, _):
    """A row for each point."""
    case = StepCase(tiny(Gemma4Config.preset(MODEL)), Variant.COMPACT, 1, 256)
    for point in points:
        step, weights = program(case, point.fields["variant"])
        state = (*case.tokens(0), random_like(case.cache()))
        times = []
        for _ in range(CALLS):
            jax.block_until_ready(state)
            start = time.perf_counter()
            state = step(weights, state)
            times.append(1e6 * (time.perf_counter() - start))
        times = times[CALLS // 10 :]  # without those that compile and warm up
        deciles = statistics.quantiles(times, n=10)
        yield point.fields | {
            "call_us": round(statistics.median(times), 1),
            "call_p10_p90_us": measure.rounded([deciles[0], deciles[-1]], 1),
            "leaves": len(jax.tree.leaves((weights, state))),
        }


def program(case, variant):
    """(jitted program that returns its state and does nothing, weights) of a variant."""
    weights = random_like(case.weights)
    if variant == "state":
        weights = nnx.split(case.merge(weights))[1]
    return jax.jit(lambda weights, state: state, donate_argnums=1, keep_unused=True), weights


BENCHMARK = Benchmark(
    name="dispatch",
    about="host time of one call of a jitted program with the arrays of a decode step of 31B",
    variants=VARIANTS,
    identity=("model", "variant"),
    fields=("call_us", "call_p10_p90_us", "leaves"),
    points=points,
    measure=rows,
    watched={"call_us": "call_p10_p90_us"},
    bars=(
        Bar(
            of="call_us",
            where={"variant": "tuple"},
            most=500,
            why="a step of a small model takes 3 ms, and the host has more to do in it than calls",
        ),
    ),
)
