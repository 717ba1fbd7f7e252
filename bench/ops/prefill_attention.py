"""Kernel time of attention over a prompt of one sequence, and useful TFLOP/s.

Useful are the products of what a token sees. `ours` is timed by the host's clock where the program
chooses between cuDNN and the kernel when it runs, so that the choice is in the time; the others are
timed by CUPTI.
"""

import functools

import jax

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.ops.qkv_norm_rope_write import FORMS
from g4attn_jax import ops
from g4attn_jax.ops.prefill_attention import cudnn
from g4attn_jax.ops.prefill_attention.cases import CASES
from g4attn_jax.testing.case import tagged

try:
    import torch
except ImportError:
    torch = None

MAX_XLA_TOKENS = 8192
VARIANTS = {
    "ours": "the op as it is: cuDNN where it takes the case, otherwise the kernel",
    "kernel": "the kernel, demanded",
    "jax_nn_cudnn": "jax.nn.dot_product_attention by cuDNN, where it takes the case",
    "jax_nn_xla": "the same by XLA, up to 8192 tokens: its scores grow with their square",
    "torch_sdpa": "PyTorch's, where it is installed: full causal attention, heads repeated",
}


def points():
    """A layer's heads, the form and layout of its cache, and a number of tokens."""
    return [Point(identity(case), case) for case in tagged(CASES, "bench")]


def identity(case):
    """Identity fields of a case."""
    return {
        "tokens": case.tokens,
        "num_kv_heads": case.num_kv_heads,
        "group": case.group,
        "head_dim": case.head_dim,
        "sliding_window": case.sliding_window,
        "form": FORMS[case.form.__name__],
        "layout": "contiguous" if case.page_size is None else "paged",
    }


def jax_nn(q, cache, table, positions, *, sliding_window, implementation):
    """JAX's, of a prompt alone."""
    return jax.nn.dot_product_attention(
        q,
        cache.k,
        cache.v,
        scale=1.0,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation=implementation,
    )


def torch_us(q, cache, group, repeats=5):
    """Microseconds of PyTorch's, by CUDA events."""
    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in (q, cache.k, cache.v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(repeats + 1):
        if i == 1:
            start.record()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    stop.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(stop) / repeats


def variants(case, arguments):
    """Functions that CUPTI times, by the prefix of their fields."""
    window = {"sliding_window": case.sliding_window}
    yield "kernel", functools.partial(ops.prefill_attention, implementation="triton", **window)
    if cudnn.refusal(*arguments[:3], **window, scale=1.0) is None:
        yield "jax_nn_cudnn", functools.partial(jax_nn, implementation="cudnn", **window)
    if _is_plain(case) and case.tokens <= MAX_XLA_TOKENS:
        yield "jax_nn_xla", functools.partial(jax_nn, implementation="xla", **window)


def _is_plain(case):
    return FORMS[case.form.__name__] == "separate" and case.page_size is None


def rows(points, _):
    """A row for each point."""
    for point in points:
        yield point.fields | measured(point.subject)


def measured(case):
    """Fields of a case's row."""
    arguments = tuple(case.arguments())
    window = {"sliding_window": case.sliding_window}
    refusal = cudnn.refusal(*arguments[:3], **window, scale=1.0)
    by_cudnn = refusal is None and cudnn.is_faster(arguments[0])
    times = dict.fromkeys(("kernel", "jax_nn_cudnn", "jax_nn_xla"))
    functions = dict(variants(case, arguments))
    times |= measure.kernel_times(functions, [arguments], 20 if case.tokens <= 8192 else 5)
    fields = {"by_cudnn": by_cudnn}
    fields |= {f"{name}_us": time and round(time.us, 1) for name, time in times.items()}
    fields["kernel_p10_p90_us"] = [round(times["kernel"].p10, 1), round(times["kernel"].p90, 1)]
    fields["ours_us"] = fields["kernel_us"]
    if by_cudnn:
        ours = jax.jit(lambda arguments: ops.prefill_attention(*arguments, **window))
        fields["ours_us"] = round(1e6 * measure.host_time(ours, arguments), 1)
    fields["torch_sdpa_us"] = None
    if torch is not None and _is_plain(case) and case.sliding_window is None:
        q, cache, *_ = arguments
        fields["torch_sdpa_us"] = round(torch_us(q, cache, case.group), 1)
    for name in VARIANTS:
        us = fields[f"{name}_us"]
        fields[f"{name}_tflops"] = us and round(case.flops() / us / 1e6, 1)
    return fields


def plot(rows, head, path):
    """TFLOP/s against tokens, a panel a shape."""
    import matplotlib.pyplot as plt

    lines = {
        "jax_nn_xla": ("jax.nn, XLA", "tab:red", "o"),
        "jax_nn_cudnn": ("jax.nn, cuDNN", "tab:orange", "v"),
        "torch_sdpa": ("PyTorch SDPA", "tab:green", "s"),
        "kernel": ("g4attn-jax, the kernel", "tab:cyan", "^"),
        "ours": ("g4attn-jax", "tab:blue", "D"),
    }
    figure, axes = plt.subplots(
        2, 3, figsize=(12, 7), layout="constrained", sharex=True, sharey=True
    )
    shapes = {}
    for row in rows:
        shapes.setdefault(_title(row), []).append(row)
    for axis, (title, mine) in zip(axes.T.flat, shapes.items(), strict=True):
        tokens = [row["tokens"] for row in mine]
        for name, (label, color, marker) in lines.items():
            rates = [row[f"{name}_tflops"] or float("nan") for row in mine]
            axis.semilogx(tokens, rates, color=color, marker=marker, ms=4, label=label)
        axis.set_title(title, fontsize=9)
        axis.set(ylim=(0, 650), xlabel="tokens", ylabel="useful TFLOP/s")
        axis.set_xticks(tokens, [str(t) for t in tokens])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="upper left")
    figure.suptitle(
        f"Prefill attention (Nq/Nkv/D), one sequence, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def _title(row):
    heads = f"{row['num_kv_heads'] * row['group']}/{row['num_kv_heads']}/{row['head_dim']}"
    window = "" if row["sliding_window"] is None else f", window {row['sliding_window']}"
    return f"{heads}{window} {row['form']} {row['layout']}"


_MEASURED_AT = {"tokens": 8192, "form": "separate", "layout": "contiguous"}
BENCHMARK = Benchmark(
    name="prefill_attention",
    about="attention of a prompt of one sequence, useful TFLOP/s",
    variants=VARIANTS,
    identity=(
        "tokens",
        "num_kv_heads",
        "group",
        "head_dim",
        "sliding_window",
        "form",
        "layout",
    ),
    fields=(
        "by_cudnn",
        "kernel_p10_p90_us",
        *(f"{name}_{what}" for name in VARIANTS for what in ("us", "tflops")),
    ),
    points=points,
    measure=rows,
    watched={"ours_us": None, "kernel_us": "kernel_p10_p90_us"},
    head=lambda: {"torch": None if torch is None else torch.__version__},
    plot=plot,
    memory_fraction=0.4,  # PyTorch takes as much again
    bars=(
        Bar(
            of="ours_tflops",
            where={**_MEASURED_AT, "head_dim": 512},
            least=180,
            why="XLA with a score matrix in memory reaches 169 on this GPU",
        ),
        Bar(
            of="ours_tflops",
            where={**_MEASURED_AT, "head_dim": 256},
            least=500,
            why="cuDNN reaches 571 on this GPU, from which the choice between kernels may take",
        ),
    ),
)
