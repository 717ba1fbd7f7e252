"""Kernel time of few rows times 31B's weights, for launches; `choose_launch` is fitted to it.

XLA's own matmul has a row too, its launch fields null. Launches that the shared memory does not
hold are left out.
"""

import functools
import itertools

import jax

from bench import measure
from bench.benchmark import Benchmark, Point
from bench.ops import linear
from g4attn_jax import ops
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear import reference, triton
from g4attn_jax.ops.linear.cases import CASES
from g4attn_jax.ops.linear.launch import MatmulLaunch, choose_launch
from g4attn_jax.testing.case import tagged


def points():
    """31B's weights, by the number of tokens."""
    return [
        Point(linear.identity(case) | {"tokens": case.tokens}, case)
        for case in tagged(CASES, "bench")
    ]


def launches(chosen, matrices):
    """Tiles of 8 to 32 KiB, of which 3 to 5 are there at a time."""
    found = {chosen}
    for columns, k, stages in itertools.product((64, 128), (32, 64, 128), (3, 4, 5)):
        if 8 * 1024 <= 2 * columns * k * matrices <= 32 * 1024:
            found.add(MatmulLaunch(columns, k, 4, stages))
    return sorted(found)


def numbers_of_sums(case):
    """Numbers of partial sums; the chosen one first."""
    if case.num_matrices > 1:
        return [1]
    chosen = jax.eval_shape(ops.linear_partial_sums, *case.structs()).shape[0]
    return list(dict.fromkeys((chosen, 1, 2, 3, 4)))


def functions(case, chosen, counts):
    """Functions by (launch, number of partial sums); None is XLA's matmul."""
    if case.num_matrices == 2:
        yield None, reference.geglu
    else:
        yield None, functools.partial(reference.linear_partial_sums, num_partial_sums=1)
    for launch, count in itertools.product(launches(chosen, case.num_matrices), counts):
        kernel = triton.geglu
        if case.num_matrices == 1:
            kernel = functools.partial(triton.linear_partial_sums, num_partial_sums=count)
        yield (launch, count), functools.partial(kernel, launch=launch)


def rows(points, gbps):
    """A row for each point, launch and number of partial sums."""
    for point in points:
        case = point.subject
        counts = numbers_of_sums(case)
        chosen = choose_launch(
            gpu(),
            rows=case.tokens,
            columns=case.columns,
            matrices=case.num_matrices,
            num_partial_sums=counts[0],
            itemsize=2,
        )
        calls = measure.calls_from_memory(case)
        times = measure.kernel_times(dict(functions(case, chosen, counts)), calls, 5)
        chosen = chosen, counts[0]
        best = min(times.keys() - {None}, key=lambda key: times[key].us)
        print(
            f"{case.weight:<15} M={case.tokens:<3} limit {case.bytes() / gbps / 1e3:6.1f} "
            f"XLA {times[None].us:6.1f} ({times[None].launches} launches), "
            f"best {tuple(best[0])}, {best[1]} sums {times[best].us:6.1f}, "
            f"chosen {tuple(chosen[0])}, {chosen[1]} sums {times[chosen].us:6.1f} us",
            flush=True,
        )
        for key, time in times.items():
            launch, count = key or (None, 1)
            fields = dict.fromkeys(MatmulLaunch._fields) if launch is None else launch._asdict()
            yield point.fields | {"partial_sums": count} | fields | {"us": round(time.us, 2)}


BENCHMARK = Benchmark(
    name="tune_linear",
    about="tiles, stages and partial sums of matmuls of few tokens",
    identity=(*linear.BENCHMARK.identity, "tokens", "partial_sums", *MatmulLaunch._fields),
    fields=("us",),
    points=points,
    measure=rows,
    watched={"us": None},
    rate="read_gbps",
)
