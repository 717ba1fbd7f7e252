"""Kernel time of the experts' products for launches; `choose_launch` is fitted to it.

GroupedMatmulLaunches that the shared memory does not hold are left out.
"""

import functools

from bench import measure
from bench.benchmark import Benchmark
from bench.ops import grouped_matmul as benchmark
from bench.tunings._launches import launch_rows
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.grouped_gated_matmul.triton import grouped_gated_matmul
from g4attn_jax.ops.grouped_matmul.triton import (
    GroupedMatmulLaunch,
    GroupedMatmulSizes,
    choose_launch,
    grouped_matmul,
)

KERNELS = {"gated": grouped_gated_matmul, "down": grouped_matmul}

# Rows, columns of all matrices of a group, depth, warps, stages.
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


def launches(sizes, chosen):
    """Launches of the lists for so many rows, and the chosen one."""
    listed = _FEW_ROWS if sizes.rows <= 8 * sizes.groups else _MANY_ROWS
    of_matrices = {
        GroupedMatmulLaunch(rows, width // sizes.matrices, *rest) for rows, width, *rest in listed
    }
    return sorted(of_matrices | {chosen})


def rows(points, _):
    """A row for each point and launch."""
    for point in points:
        case, product = point.subject, point.fields["product"]
        matrices = 2 if product == "gated" else 1
        sizes = GroupedMatmulSizes(
            case.num_rows, case.groups, case.depth, matrices, case.columns, 2
        )
        chosen = choose_launch(gpu(), sizes)
        functions = {
            launch: functools.partial(KERNELS[product], launch=launch)
            for launch in launches(sizes, chosen)
        }
        times = measure.kernel_times(functions, measure.calls_from_memory(case), 5)
        times = {launch: time.us for launch, time in times.items()}
        yield from launch_rows(point, times, chosen, {"num_rows": case.num_rows})


BENCHMARK = Benchmark(
    name="tune_grouped_matmul",
    about="tiles, warps and stages of the experts' products",
    identity=(*benchmark.BENCHMARK.identity, *GroupedMatmulLaunch._fields),
    fields=("num_rows", "us"),
    points=benchmark.points,
    measure=rows,
    watched={"us": None},
    rate="read_gbps",
)
