"""Kernel time of attention over a prompt of one sequence, and useful TFLOP/s.

    python -m bench.prefill_attention [--out DIR]

Writes prefill_attention.json and prefill_attention.png. Compared are

    ours            what implementation=None runs: cuDNN where it takes the case, else the kernel
    kernel          the kernel, demanded
    jax_nn_cudnn    jax.nn.dot_product_attention on contiguous keys and values, where it takes them
    jax_nn_xla      the same by XLA, up to 8192 tokens: its scores grow with their square
    torch_sdpa      PyTorch's, where it is installed: full causal attention, heads repeated

Useful are the products of what a token sees. `ours` is timed by the host's clock where the program
chooses between cuDNN and the kernel when it runs, which is in the time; the others by CUPTI.
"""

import functools
import os

import jax

from bench.measure import host_time, kernel_times, machine, output_folder, write_json
from bench.prefill_shapes import SHAPES, Shape
from g4attn_jax import ops
from g4attn_jax.cache import KVCache
from g4attn_jax.ops.prefill_attention import cudnn

try:
    import torch
except ImportError:
    torch = None

TOKENS = (2048, 8192, 32768)
MAX_XLA_TOKENS = 8192


def attention(q, cache, table, positions, *, shape: Shape, implementation=None):
    """Ours."""
    return ops.prefill_attention(
        q,
        cache,
        table,
        positions,
        sliding_window=shape.sliding_window,
        implementation=implementation,
    )


def jax_nn(q, cache, table, positions, *, shape: Shape, implementation):
    """JAX's, of a prompt alone."""
    window = shape.sliding_window
    return jax.nn.dot_product_attention(
        q,
        cache.k,
        cache.v,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def torch_us(q, cache, table, positions, *, shape: Shape, repeats: int = 5) -> float:
    """Microseconds of PyTorch's, by CUDA events."""
    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in (q, cache.k, cache.v))
    k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(repeats + 1):
        if i == 1:
            start.record()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    stop.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(stop) / repeats


def variants(shape: Shape, tokens: int, arguments: tuple):
    """What is compared, by the prefix of its fields in the JSON."""
    yield "kernel", functools.partial(attention, implementation="triton")
    if cudnn.refusal(*arguments[:3], sliding_window=shape.sliding_window, scale=1.0) is None:
        yield "jax_nn_cudnn", functools.partial(jax_nn, implementation="cudnn")
    if shape.form is KVCache and not shape.paged and tokens <= MAX_XLA_TOKENS:
        yield "jax_nn_xla", functools.partial(jax_nn, implementation="xla")


def measure_row(shape: Shape, tokens: int) -> dict:
    """One row of the JSON."""
    arguments = shape.arguments(tokens)
    refusal = cudnn.refusal(*arguments[:3], sliding_window=shape.sliding_window, scale=1.0)
    by_cudnn = refusal is None and cudnn.is_faster(arguments[0])
    functions = {
        name: functools.partial(f, shape=shape) for name, f in variants(shape, tokens, arguments)
    }
    times = dict.fromkeys(("kernel", "jax_nn_cudnn", "jax_nn_xla"))
    times |= kernel_times(functions, [arguments], 20 if tokens <= 8192 else 5)
    row = {"tokens": tokens, **shape.fields(), "by_cudnn": by_cudnn}
    row |= {f"{name}_us": time and round(time.us, 1) for name, time in times.items()}
    row["kernel_p10_p90_us"] = [round(times["kernel"].p10, 1), round(times["kernel"].p90, 1)]
    row["ours_us"] = row["kernel_us"]
    if by_cudnn:
        ours = jax.jit(lambda arguments: attention(*arguments, shape=shape))
        row["ours_us"] = round(1e6 * host_time(ours, arguments), 1)
    in_torch = torch is not None and shape.form is KVCache and not shape.paged
    row["torch_sdpa_us"] = None
    if in_torch and shape.sliding_window is None:
        row["torch_sdpa_us"] = round(torch_us(*arguments, shape=shape), 1)
    for name in ("ours", "kernel", "jax_nn_cudnn", "jax_nn_xla", "torch_sdpa"):
        us = row[f"{name}_us"]
        row[f"{name}_tflops"] = us and round(shape.flops(tokens) / us / 1e6, 1)
    return row


def missed_bars(row: dict) -> list[str]:
    """The bars of the project's fourth issue that a row does not reach."""
    if row["tokens"] != 8192 or row["form"] != "separate" or row["layout"] != "contiguous":
        return []
    bar = 180 if row["head_dim"] == 512 else 500
    return [f"{row['ours_tflops']} TFLOP/s < {bar}"] if row["ours_tflops"] < bar else []


def plot(rows: list[dict], head: dict, path) -> None:
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
    for axis, shape in zip(axes.T.flat, SHAPES, strict=True):
        mine = rows[SHAPES.index(shape) * len(TOKENS) :][: len(TOKENS)]
        for name, (label, color, marker) in lines.items():
            rates = [row[f"{name}_tflops"] or float("nan") for row in mine]
            axis.semilogx(TOKENS, rates, color=color, marker=marker, ms=4, label=label)
        axis.set_title(str(shape), fontsize=9)
        axis.set(ylim=(0, 650), xlabel="tokens", ylabel="useful TFLOP/s")
        axis.set_xticks(TOKENS, [str(t) for t in TOKENS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="upper left")
    figure.suptitle(
        f"Prefill attention (Nq/Nkv/D), one sequence, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")  # PyTorch takes as much again
    head = machine() | {"command": "python -m bench.prefill_attention"}
    head["torch"] = None if torch is None else torch.__version__
    rows = []
    names = ("ours", "kernel", "jax_nn_cudnn", "jax_nn_xla", "torch_sdpa")
    print(f"{'shape':<40}{'T':>6}" + "".join(f"{n:>16}" for n in names) + "  missed bars")
    for shape in SHAPES:
        for tokens in TOKENS:
            row = measure_row(shape, tokens)
            rows.append(row)
            cells = "".join(
                f"{row[f'{n}_us'] or 0:>10.0f}{row[f'{n}_tflops'] or 0:>6.0f}" for n in names
            )
            missed = ", ".join(missed_bars(row))
            print(f"{shape!s:<40}{tokens:>6}{cells}  {missed}", flush=True)
    write_json(folder / "prefill_attention.json", head, rows)
    plot(rows, head, folder / "prefill_attention.png")
    print("missed bars:", sum(bool(missed_bars(row)) for row in rows))


if __name__ == "__main__":
    main()
