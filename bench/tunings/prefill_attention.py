"""Kernel time of prefill attention for every sensible launch: `choose_launch` is fitted to it."""

import functools
import itertools

from bench import measure
from bench.benchmark import Benchmark
from bench.ops import prefill_attention
from bench.tunings._launches import launch_rows
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch, HeadSizes
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.prefill_attention import triton

TOKENS = 8192


def points():
    """Points of the benchmark with 8192 tokens, compact caches only contiguous."""
    return [
        point
        for point in prefill_attention.points()
        if point.subject.tokens == TOKENS
        and (point.subject.page_size is None or point.fields["form"] == "separate")
    ]


def launches(case, form):
    """Launches that an H200 has registers for; `kernel_times` leaves out what does not fit."""
    if case.head_dim == 256:
        tiles = [*itertools.product((64, 128), (32, 64), (1,), (8,), (2, 3)), (64, 64, 1, 4, 3)]
    else:
        tiles = [*itertools.product((64,), (16, 32), (1,), (8,), (2, 3, 4))]
        if form == "separate":
            tiles += itertools.product((64,), (16, 32), (2,), (4,), (2, 3))
            tiles += itertools.product((128,), (16, 32), (2,), (8,), (2, 3))
    return [
        AttentionLaunch(rows, keys, 1, value_blocks, num_warps, num_stages)
        for rows, keys, value_blocks, num_warps, num_stages in tiles
    ]


def rows(points, _):
    """A row for each point and launch."""
    for point in points:
        case = point.subject
        arguments = case.arguments()
        attend = functools.partial(
            triton.prefill_attention, sliding_window=case.sliding_window, scale=1.0
        )
        chosen = triton.choose_launch(gpu(), HeadSizes.of(*arguments[:2]))
        functions = {
            launch: functools.partial(attend, launch=launch)
            for launch in {chosen, *launches(case, point.fields["form"])}
        }
        times = measure.kernel_times(functions, [arguments], 5)
        times = {launch: time.us for launch, time in times.items()}
        yield from launch_rows(point, times, chosen, {"num_rows": TOKENS * case.num_q_heads})


BENCHMARK = Benchmark(
    name="tune_prefill_attention",
    about="tiles, warps and stages of prefill attention",
    identity=(*prefill_attention.BENCHMARK.identity, *AttentionLaunch._fields),
    fields=("num_rows", "us"),
    points=points,
    measure=rows,
    watched={"us": None},
)
