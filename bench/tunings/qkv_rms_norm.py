"""Kernel time of the fused norm for every sensible launch: its `choose_launch` is fitted to it."""

import functools

from bench import measure
from bench.benchmark import Benchmark
from bench.ops import qkv_rms_norm
from bench.tunings._launches import launch_rows
from g4attn_jax.ops.head_norm.triton import NormLaunch, choose_launch
from g4attn_jax.ops.qkv_rms_norm import triton

LAUNCHES = tuple(
    NormLaunch(rows, warps)
    for rows, warps in ((1, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 4), (8, 8))
)


def rows(points, _):
    """A row for each point and launch."""
    for point in points:
        case = point.subject
        calls = [(*arguments, None) for arguments in qkv_rms_norm.calls(case)]
        num_rows = case.tokens * case.num_kv_heads * (case.group + case.mode.num_kv_projections)
        norm = functools.partial(triton.qkv_rms_norm, mode=case.mode, eps=1e-6, scale_offset=0.0)
        times = {
            launch: measure.kernel_time(functools.partial(norm, launch=launch), calls, 10).us
            for launch in LAUNCHES
        }
        chosen = choose_launch(num_rows, 2 * case.head_dim)
        yield from launch_rows(point, times, chosen, {"num_rows": num_rows})


BENCHMARK = Benchmark(
    name="tune_qkv_rms_norm",
    about="rows and warps of a program of the norm",
    identity=(*qkv_rms_norm.BENCHMARK.identity, *NormLaunch._fields),
    fields=("num_rows", "us"),
    points=qkv_rms_norm.points,
    measure=rows,
    watched={"us": None},
)
