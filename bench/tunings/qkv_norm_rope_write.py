"""Kernel time of the prologue for every sensible launch: its `choose_launch` is fitted to it."""

import functools

from bench import measure
from bench.benchmark import Benchmark, Point
from bench.ops import qkv_norm_rope_write
from bench.tunings._launches import launch_rows
from g4attn_jax import ProjectionMode
from g4attn_jax.ops.head_norm.triton import NormLaunch
from g4attn_jax.ops.qkv_norm_rope.triton import choose_launch
from g4attn_jax.ops.qkv_norm_rope_write import triton

LAUNCHES = tuple(
    NormLaunch(rows, warps)
    for rows, warps in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (16, 4))
)


def points():
    """Points of the benchmark without the rotary width, which the mode and the heads decide."""
    return [
        Point({k: v for k, v in fields.items() if k != "rotary_dim"}, case)
        for fields, case in qkv_norm_rope_write.points()
    ]


def launched(case, launch):
    """The kernel with this launch, as `kernel_time` takes it."""
    if case.mode is not ProjectionMode.Q_ONLY:
        return functools.partial(
            triton.qkv_norm_rope_write, mode=case.mode, eps=1e-6, launch=launch
        )

    def query(qkv, q_norm, k_norm, cos, sin, _, cache):
        constants = {"form": case.form, "mode": case.mode, "eps": 1e-6, "launch": launch}
        return triton.query(qkv, q_norm, k_norm, cos, sin, **constants), cache

    return query


def rows(points, _):
    """A row for each point and launch."""
    for point in points:
        case = point.subject
        calls, cache = qkv_norm_rope_write.calls(case)
        num_rows = case.tokens * case.num_kv_heads * (case.group + case.mode.num_kv_projections)
        times = {
            launch: measure.kernel_time(launched(case, launch), calls, 5, state=cache).us
            for launch in LAUNCHES
        }
        chosen = choose_launch(num_rows, case.head_dim, absorbed=point.fields["form"] == "compact")
        yield from launch_rows(point, times, chosen, {"num_rows": num_rows})


BENCHMARK = Benchmark(
    name="tune_qkv_norm_rope_write",
    about="rows and warps of a program of the prologue",
    identity=(
        *(name for name in qkv_norm_rope_write.BENCHMARK.identity if name != "rotary_dim"),
        *NormLaunch._fields,
    ),
    fields=("num_rows", "us"),
    points=points,
    measure=rows,
    watched={"us": None},
)
