"""Kernel time of decode attention over full caches.

    python -m bench.decode_attention [--out DIR]

Writes decode_attention.json and decode_attention.png. Compared are

    ours         `ops.decode_attention`
    triton       the same by the kernel that all GPUs have, where on Hopper another runs
    xla          its reference in jnp under XLA
    jax_nn       `jax.nn.dot_product_attention`, for K and V in a contiguous cache
    torch_sdpa   PyTorch's scaled_dot_product_attention on the same shapes, where it is installed

and the limit is the bytes that must move over the rate of a float32 sum measured in the same run.
"""

import functools
import os
import statistics

import jax
import jax.numpy as jnp

from bench.decode_shapes import PAGE_SIZE, QUERY_TOKENS, SHAPES, Shape
from bench.measure import kernel_time, machine, output_folder, read_gbps, write_json
from g4attn_jax import ops
from g4attn_jax.cache import CompactKVCache, KVCache

try:
    import torch
except ImportError:
    torch = None

FORMS = {KVCache: "separate", CompactKVCache: "compact"}
LAYOUTS = {False: "contiguous", True: f"paged({PAGE_SIZE})"}


def jax_nn(q, cache, page_table, positions, *, sliding_window):
    """JAX's own attention with the masks of a decode step."""
    keys = jnp.arange(cache.k.shape[1])
    visible = keys <= positions[..., None]
    if sliding_window is not None:
        visible &= keys > positions[..., None] - sliding_window
    return jax.nn.dot_product_attention(q, cache.k, cache.v, mask=visible[:, None], scale=1.0)


def torch_sdpa_us(shape: Shape, query_tokens: int) -> float | None:
    """Microseconds of PyTorch's attention, by CUDA events; None where there is no PyTorch."""
    if torch is None:
        return None

    def normal(heads, length):
        size = shape.batch, heads, length, shape.head_dim
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    q = normal(shape.num_kv_heads * shape.group, query_tokens) * shape.head_dim**-0.5
    k, v = (normal(shape.num_kv_heads, shape.context) for _ in range(2))
    mask = None
    if query_tokens > 1:
        last = torch.arange(query_tokens, device="cuda")[:, None] + shape.context - query_tokens
        mask = torch.arange(shape.context, device="cuda")[None] <= last

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


def measure_row(shape: Shape, form, query_tokens: int, paged: bool, gbps: float) -> dict:
    """One row of the JSON."""
    calls = shape.calls(form, query_tokens, paged=paged)
    attend = functools.partial(ops.decode_attention, sliding_window=shape.sliding_window)
    ours = kernel_time(jax.jit(attend), calls)  # one kernel is slow to lower: once for all calls
    (main_us,) = [us for name, us in ours.kernels.items() if name.startswith("decode_attention")]
    row = {
        **shape.fields(),
        "query_tokens": query_tokens,
        "form": FORMS[form],
        "layout": LAYOUTS[paged],
        "ours_us": ours.us,
        "ours_p10_p90_us": [ours.p10, ours.p90],
        "main_us": main_us,
        "triton_us": None,
        "xla_us": kernel_time(functools.partial(attend, implementation="xla"), calls, 5).us,
        "jax_nn_us": None,
        "torch_sdpa_us": None,
        "limit_us": shape.bytes(form, query_tokens) / gbps / 1e3,
        "launches": ours.launches,
    }
    if "decode_attention" not in ours.kernels:
        triton = functools.partial(attend, implementation="triton")
        row["triton_us"] = kernel_time(triton, calls).us
    if form is KVCache and not paged:
        theirs = functools.partial(jax_nn, sliding_window=shape.sliding_window)
        row["jax_nn_us"] = kernel_time(theirs, calls, 5).us
        row["torch_sdpa_us"] = torch_sdpa_us(shape, query_tokens)
    return {name: _rounded(value) for name, value in row.items()}


def _rounded(value):
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 3) if isinstance(value, float) else value


def missed_bars(row: dict, others: list[dict]) -> list[str]:
    """The bars of the project's fourth issue that a row does not reach, next to other rows."""
    ours, missed = row["ours_us"], []
    batch, is_compact, is_sliding = row["batch"], row["form"] == "compact", row["sliding_window"]

    def bar(name, value, minimum):
        if value < minimum:
            missed.append(f"{name} {value:.3f} < {minimum:.3f}")

    def other(**fields):
        names = ("batch", "context", "num_kv_heads", "form", "layout", "query_tokens")
        wanted = {name: row[name] for name in names} | fields
        matches = [r for r in others if all(r[n] == v for n, v in wanted.items())]
        return matches[0]["ours_us"] if matches else None

    if row["launches"] > 2:
        missed.append(f"{row['launches']} launches")
    if row["query_tokens"] == 1:
        share = row["limit_us"] / ours
        if is_sliding:
            if batch > 1:
                bar("limit/ours", share, 0.90)
        elif batch == 1:
            bar("limit/ours", share, 0.75 if is_compact else 0.82)
        else:
            bar("limit/ours", share, 0.90 if is_compact else 0.94)
        if batch == 1:
            bar("main/ours", row["main_us"] / ours, 0.90)
        if is_compact and batch >= 8:
            bar("separate/compact", other(form="separate") / ours, 1.45)
    if row["layout"] != LAYOUTS[False]:
        bar("contiguous/paged", other(layout=LAYOUTS[False]) / ours, 1 / 1.05)
    if row["query_tokens"] != 1:
        bar("one token/six", other(query_tokens=1) / ours, 1 / 1.25)
    return missed


def plot(rows: list[dict], head: dict, path) -> None:
    """Times of one token over contiguous caches as multiples of the memory limit."""
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r["query_tokens"] == 1 and r["layout"] == LAYOUTS[False]]
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


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")  # PyTorch takes as much again
    gbps = read_gbps()
    head = machine() | {
        "torch": None if torch is None else torch.__version__,
        "read_gbps": round(gbps, 1),
        "command": "python -m bench.decode_attention",
    }
    rows, num_missed = [], 0
    names = ("limit_us", "ours_us", "triton_us", "xla_us", "jax_nn_us", "torch_sdpa_us")
    for shape in SHAPES:
        for form in shape.forms():
            for query_tokens in QUERY_TOKENS:
                for paged in LAYOUTS:
                    rows.append(measure_row(shape, form, query_tokens, paged, gbps))
                    write_json(folder / "decode_attention.json", head, rows)  # so far
    for row in rows:
        missed = missed_bars(row, rows)
        num_missed += bool(missed)
        cells = " ".join("-" if row[n] is None else f"{row[n]:.1f}" for n in names)
        print(
            *(row[n] for n in ("batch", "context", "num_kv_heads", "group", "head_dim", "form")),
            row["layout"],
            f"T={row['query_tokens']}: {cells}",
            f"limit/ours {row['limit_us'] / row['ours_us']:.3f}",
            ", ".join(missed),
            flush=True,
        )
    plot(rows, head, folder / "decode_attention.png")
    print("rows that miss a bar:", num_missed)


if __name__ == "__main__":
    main()
