"""Kernel time of reading 31B's weights for one token: by the op, and by a sum over the weight.

A float32 sum does nothing but read, so its time over the same weight is what is within reach.
"""

import functools
import heapq
import statistics

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler

from bench import measure
from bench.benchmark import Benchmark, Point
from g4attn_jax import ops
from g4attn_jax.ops.linear.cases import CASES, LogitsCase
from g4attn_jax.testing.case import tagged


def identity(case):
    """Identity fields of a weight."""
    return {
        "weight": case.weight,
        "k": case.depth,
        "matrices": case.num_matrices,
        "columns": case.columns,
    }


def points():
    """31B's weights, one token."""
    return [
        Point(identity(case), case)
        for case in tagged(CASES, "bench")
        if case.tokens == 1 and case.model == "gemma-4-31b" and not isinstance(case, LogitsCase)
    ]


def op_of(case):
    """The op that the model multiplies this weight with."""
    return ops.geglu if case.num_matrices == 2 else ops.linear_partial_sums


def sum_us(weights):
    """Microseconds of the kernel that reads a weight for a sum, one weight after the other."""

    def program(weights):
        total = jnp.float32(0)
        for weight in weights:
            weight, total = lax.optimization_barrier((weight, total))
            total += jnp.sum(weight, dtype=jnp.float32)
        return total

    _, runs = profiler.measure(program, aggregate=False, iterations=20)(weights)
    longest = [heapq.nlargest(len(weights), (ms for _, ms in run)) for run in runs]
    return 1e3 * statistics.median(map(statistics.mean, longest))


def rows(points, gbps):
    """A row for each point."""
    for point in points:
        case = point.subject
        calls = measure.calls_from_memory(case)
        multiply = functools.partial(op_of(case), implementation="triton")
        ours = measure.kernel_time(multiply, calls)
        yield point.fields | {
            "limit_us": round(case.bytes() / gbps / 1e3, 2),
            "sum_us": round(sum_us([w for _, w in calls]), 2),
            "ours_us": round(ours.us, 2),
            "ours_p10_p90_us": [round(ours.p10, 2), round(ours.p90, 2)],
        }


BENCHMARK = Benchmark(
    name="linear",
    about="31B's weights times one token, beside a sum that only reads them",
    variants={"ours": "the op", "sum": "a float32 sum of the weight, XLA's longest kernel of it"},
    identity=("weight", "k", "matrices", "columns"),
    fields=("limit_us", "sum_us", "ours_us", "ours_p10_p90_us"),
    points=points,
    measure=rows,
    watched={"ours_us": "ours_p10_p90_us"},
    rate="read_gbps",
)
