"""Kernel time of decode attention over full caches.

The limit is the bytes that must move over the rate of a float32 sum measured in the same run.
"""

import functools
import statistics

import jax
import jax.numpy as jnp

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.ops.qkv_norm_rope_write import FORMS
from g4attn_jax import ops
from g4attn_jax.ops.decode_attention.cases import CASES
from g4attn_jax.testing.case import tagged

try:
    import torch
except ImportError:
    torch = None

VARIANTS = {
    "ours": "the op as it is: on Hopper several tokens over D = 512 have a kernel of their own",
    "triton": "the kernel that all GPUs have, where the op runs another",
    "xla": "the reference in jnp under XLA",
    "jax_nn": "jax.nn.dot_product_attention, for K and V in a contiguous cache",
    "torch_sdpa": "PyTorch's scaled_dot_product_attention, where PyTorch is installed",
}


def points():
    """A step's sequences and heads, and the form and the layout of its cache."""
    return [Point(identity(case), case) for case in tagged(CASES, "bench")]


def identity(case):
    """Identity fields of a case."""
    return {
        "batch": case.batch,
        "context": case.context,
        "num_kv_heads": case.num_kv_heads,
        "group": case.group,
        "head_dim": case.head_dim,
        "sliding_window": case.sliding_window,
        "query_tokens": case.tokens,
        "form": FORMS[case.form.__name__],
        "layout": case.layout,
    }


def jax_nn(q, cache, page_table, positions, *, sliding_window):
    """JAX's own attention with the masks of a decode step."""
    keys = jnp.arange(cache.k.shape[1])
    visible = keys <= positions[..., None]
    if sliding_window is not None:
        visible &= keys > positions[..., None] - sliding_window
    return jax.nn.dot_product_attention(q, cache.k, cache.v, mask=visible[:, None], scale=1.0)


def torch_sdpa_us(case):
    """Microseconds of PyTorch's attention, by CUDA events; None where there is no PyTorch."""
    if torch is None:
        return None

    def normal(heads, length):
        size = case.batch, heads, length, case.head_dim
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    q = normal(case.num_q_heads, case.tokens) * case.head_dim**-0.5
    k, v = (normal(case.num_kv_heads, case.context) for _ in range(2))
    mask = None
    if case.tokens > 1:
        last = torch.arange(case.tokens, device="cuda")[:, None] + case.context - case.tokens
        mask = torch.arange(case.context, device="cuda")[None] <= last

    def run():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True
        )

    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    del q, k, v, mask
    torch.cuda.empty_cache()
    return statistics.median(times[3:])


def rows(points, gbps):
    """A row for each point."""
    for point in points:
        row = point.fields | measured(point.subject, gbps, point.fields["form"])
        yield {name: measure.rounded(value) for name, value in row.items()}


def measured(case, gbps, form):
    """Fields of a case's row."""
    calls = measure.calls_from_memory(case)
    attend = functools.partial(ops.decode_attention, sliding_window=case.sliding_window)
    ours = measure.kernel_time(jax.jit(attend), calls)  # slow to lower: once for all calls
    (main_us,) = [us for name, us in ours.kernels.items() if name.startswith("decode_attention")]
    xla = functools.partial(attend, implementation="xla")
    fields = {
        "ours_us": ours.us,
        "ours_p10_p90_us": [ours.p10, ours.p90],
        "main_us": main_us,
        "triton_us": None,
        "xla_us": measure.kernel_time(xla, calls, 5).us,
        "jax_nn_us": None,
        "torch_sdpa_us": None,
        "limit_us": case.bytes() / gbps / 1e3,
        "launches": ours.launches,
    }
    if "decode_attention" not in ours.kernels:
        triton = functools.partial(attend, implementation="triton")
        fields["triton_us"] = measure.kernel_time(triton, calls).us
    if form == "separate" and case.page_size is None:
        theirs = functools.partial(jax_nn, sliding_window=case.sliding_window)
        fields["jax_nn_us"] = measure.kernel_time(theirs, calls, 5).us
        fields["torch_sdpa_us"] = torch_sdpa_us(case)
    return fields


def plot(rows, head, path):
    """Times of one token over contiguous caches as multiples of the memory limit."""
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r["query_tokens"] == 1 and r["layout"] == "contiguous"]
    names = {
        "ours_us": ("g4attn-jax", "tab:blue"),
        "xla_us": ("XLA", "tab:red"),
        "jax_nn_us": ("jax.nn.dot_product_attention", "tab:orange"),
        "torch_sdpa_us": ("PyTorch SDPA", "tab:gray"),
    }
    figure, axis = plt.subplots(figsize=(10, 10), layout="constrained")
    for i, (name, (label, color)) in enumerate(names.items()):
        at = [(j, r[name] / r["limit_us"]) for j, r in enumerate(shown) if r[name] is not None]
        heights = [j + 0.2 * (i - 1.5) for j, _ in at]
        bars = axis.barh(heights, [x for _, x in at], 0.2, color=color, label=label)
        axis.bar_label(bars, [f"{x:.2f}" if x < 10 else f"{x:.0f}" for _, x in at], fontsize=7)
    axis.axvline(1, color="black", ls="--", lw=1, label="memory limit")
    labels = [
        f"{r['batch']} x {r['context']}{', window' * bool(r['sliding_window'])}, {r['form']}\n"
        f"{r['num_kv_heads']} KV heads, G {r['group']}, D {r['head_dim']}"
        for r in shown
    ]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlim=(0.7, None), xlabel="time / memory limit")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)
    figure.suptitle(
        f"Decode attention, one token a sequence, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def _share(least, why, **where):
    """A bar on the share of the memory limit that one token reaches."""
    return Bar(
        of="limit_us",
        over="ours_us",
        where={"query_tokens": 1} | where,
        least=least,
        why=why,
    )


_FULL = {"sliding_window": None}
_COMBINING = "starting, draining and combining splits take about 10 us of a launch"
BENCHMARK = Benchmark(
    name="decode_attention",
    about="attention of the newest tokens over full caches of every form and layout",
    variants=VARIANTS,
    identity=(
        "batch",
        "context",
        "num_kv_heads",
        "group",
        "head_dim",
        "sliding_window",
        "query_tokens",
        "form",
        "layout",
    ),
    fields=(
        "ours_us",
        "ours_p10_p90_us",
        "main_us",
        "triton_us",
        "xla_us",
        "jax_nn_us",
        "torch_sdpa_us",
        "limit_us",
        "launches",
    ),
    points=points,
    measure=rows,
    watched={"ours_us": "ours_p10_p90_us", "launches": None},
    rate="read_gbps",
    head=lambda: {"torch": None if torch is None else torch.__version__},
    plot=plot,
    memory_fraction=0.4,  # PyTorch takes as much again
    bars=(
        Bar(of="launches", most=2, why="one launch attends, a second may combine its splits"),
        _share(0.94, "many sequences are reading alone", batch=(8, 32), form="separate", **_FULL),
        _share(0.90, f"{_COMBINING}, of fewer bytes", batch=(8, 32), form="compact", **_FULL),
        _share(0.82, _COMBINING, batch=1, form="separate", **_FULL),
        _share(0.75, f"{_COMBINING}, of fewer bytes", batch=1, form="compact", **_FULL),
        _share(0.90, "a window of 1024 keys leaves short launches", batch=32, sliding_window=1024),
        Bar(
            of="main_us",
            over="ours_us",
            where={"batch": 1, "query_tokens": 1},
            least=0.90,
            why="combining the splits of one sequence may take a tenth of the time",
        ),
        Bar(
            of="ours_us",
            over="ours_us",
            beside={"form": "compact"},
            where={"form": "separate", "batch": (8, 32), "query_tokens": 1},
            least=1.45,
            why="a compact cache has 640 numbers a token where separate K and V have 1024",
        ),
        Bar(
            of="ours_us",
            over="ours_us",
            beside={"layout": "contiguous"},
            where={"layout": "paged(64)"},
            most=1.05,
            why="a page table is a read of one number for 64 keys",
        ),
        Bar(
            of="ours_us",
            over="ours_us",
            beside={"query_tokens": 1},
            where={"query_tokens": 6},
            most=1.25,
            why="six tokens read the cache as one does; otherwise verifying drafts would not pay",
        ),
    ),
)
