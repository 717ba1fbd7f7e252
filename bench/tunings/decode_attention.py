"""Kernel time of Triton's decode attention for launches around the chosen one.

`choose_launch` is fitted to it. Launches that the shared memory does not hold are left out.
"""

import functools
import itertools
import math

from bench import measure
from bench.benchmark import Benchmark, Point
from bench.ops import decode_attention
from bench.tunings._launches import launch_rows
from g4attn_jax.ops.decode_attention import triton
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch


def points():
    """Points of the benchmark with contiguous caches."""
    return [
        Point({k: v for k, v in fields.items() if k != "layout"}, case)
        for fields, case in decode_attention.points()
        if case.page_size is None
    ]


def launches_around(chosen, form, num_rows):
    """Other tiles and stages, numbers of splits, and blocks of the query rows of a KV head."""

    def programs(rows, value_blocks):
        return math.ceil(num_rows / rows) * value_blocks

    splits = {max(1, round(chosen.num_splits * factor)) for factor in (0.5, 1, 2)}
    launches = {chosen._replace(num_splits=n) for n in splits}
    for keys, stages in itertools.product((16, 32, 64), (2, 3, 4)):
        launches.add(chosen._replace(block_keys=keys, num_stages=stages))
    if chosen.block_rows > 16:
        # Rows, programs that share the columns of their values, warps.
        blocks = [(16, 1, 4), (32, 1, 4), (64, 1, 8), (64, 2, 4)]
        if form == "compact":
            blocks.pop()
        wanted = chosen.num_splits * programs(chosen.block_rows, chosen.value_blocks)
        for rows, value_blocks, num_warps in blocks:
            launches.add(
                chosen._replace(
                    block_rows=rows,
                    value_blocks=value_blocks,
                    num_warps=num_warps,
                    block_keys=32,
                    num_stages=3,
                    num_splits=max(1, wanted // programs(rows, value_blocks)),
                )
            )
    return sorted(launches)


def rows(points, _):
    """A row for each point and launch."""
    for point in points:
        case = point.subject
        calls = measure.calls_from_memory(case)
        attend = functools.partial(
            triton.decode_attention,
            sliding_window=case.sliding_window,
            scale=1.0,
            num_splits=None,
        )
        chosen = triton.launch_for(*calls[0][:3], sliding_window=case.sliding_window)
        functions = {
            launch: functools.partial(attend, launch=launch)
            for launch in launches_around(chosen, point.fields["form"], case.tokens * case.group)
        }
        times = measure.kernel_times(functions, calls, 5)
        yield from launch_rows(point, {key: time.us for key, time in times.items()}, chosen)


BENCHMARK = Benchmark(
    name="tune_decode_attention",
    about="tiles, splits, warps and stages of decode attention by the kernel of all GPUs",
    identity=(
        *(name for name in decode_attention.BENCHMARK.identity if name != "layout"),
        *AttentionLaunch._fields,
    ),
    fields=("us",),
    points=points,
    measure=rows,
    watched={"us": None},
    rate="read_gbps",
)
