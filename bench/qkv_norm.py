"""Kernel time of the fused Q/K/V norm against XLA, three and two launches, and the memory limit.

    python -m bench.qkv_norm [--out DIR]

Writes qkv_norm.json and qkv_norm.png. All read the same packed buffer.
"""

import functools

from bench.measure import (
    copy_gbps,
    kernel_time,
    machine,
    output_folder,
    plot_times,
    write_json,
)
from bench.qkv_shapes import SHAPES, TOKENS, Shape
from g4attn_jax import ProjectionMode, ops
from g4attn_jax.ops.head_norm.triton import head_norm
from g4attn_jax.ops.qkv_rms_norm.triton import packed_heads


def in_launches(*arguments, mode, merge_kv):
    """The norm kernel, Q by itself; K and V in one launch (`merge_kv`) or one each."""
    tokens, num_kv_heads, _, _ = arguments[0].shape
    q, *kv = packed_heads(*arguments, mode=mode)
    if merge_kv:
        launches = [[q], kv]
    else:
        launches = [[q], *([k._replace(scales=(s,))] for k in kv for s in k.scales)]
    return [head_norm(heads, groups=tokens * num_kv_heads, eps=1e-6) for heads in launches]


def variants(mode: ProjectionMode):
    """What is compared, by the prefix of its fields in the JSON."""
    norm = functools.partial(ops.qkv_rms_norm, mode=mode)
    yield "ours", functools.partial(norm, implementation="triton")
    yield "xla", functools.partial(norm, implementation="xla")
    if mode is not ProjectionMode.Q_ONLY:
        yield "three_launch", functools.partial(in_launches, mode=mode, merge_kv=False)
        yield "two_launch", functools.partial(in_launches, mode=mode, merge_kv=True)


def measure_row(shape: Shape, tokens: int, gbps: float) -> dict:
    """One row of the JSON."""
    row = {
        **shape.fields(),
        "tokens": tokens,
        "limit_us": round(shape.bytes(tokens) / gbps / 1e3, 3),
        "three_launch_us": None,
        "two_launch_us": None,
    }
    calls = shape.calls(tokens)
    for name, f in variants(shape.mode):
        time = kernel_time(f, calls)
        row[f"{name}_us"] = round(time.us, 3)
        row[f"{name}_p10_p90_us"] = [round(time.p10, 3), round(time.p90, 3)]
        row[f"{name}_launches"] = time.launches
    return row


def missed_bars(row: dict) -> list[str]:
    """The bars of the project's second issue that a row does not reach."""
    ours, tokens, missed = row["ours_us"], row["tokens"], []

    def bar(name, ratio, minimum):
        if ratio < minimum:
            missed.append(f"{name} {ratio:.2f} < {minimum}")

    if row["ours_launches"] != 1:
        missed.append(f"{row['ours_launches']} launches")
    if row["mode"] == "Q_ONLY":
        bar("xla/ours", row["xla_us"] / ours, 1.0)
    elif tokens <= 32:
        bar("xla/ours", row["xla_us"] / ours, 1.9)
        bar("two_launch/ours", row["two_launch_us"] / ours, 1.4)
    elif tokens == 8192:
        bar("xla/ours", row["xla_us"] / ours, 1.15)
    if tokens == 8192:
        bar("limit/ours", row["limit_us"] / ours, 0.92 if row["limit_us"] > 40 else 0.88)
    return missed


def plot(rows: list[dict], head: dict, path) -> None:
    """Time against tokens, a panel a shape."""
    import matplotlib.pyplot as plt

    lines = {
        "xla": ("XLA", "tab:red", "o"),
        "three_launch": ("three launches", "tab:orange", "v"),
        "two_launch": ("two launches", "tab:olive", "s"),
        "ours": ("g4attn-jax, one launch", "tab:blue", "D"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, shape in zip(axes.flat, SHAPES, strict=True):
        mine = [r for r in rows if _shape_of(r) == shape]
        plot_times(axis, str(shape), mine, lines)
    figure.suptitle(f"RMSNorm of Q, K and V (Nq/Nkv/D), bfloat16, {head['gpu']}, JAX {head['jax']}")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def _shape_of(row):
    mode = ProjectionMode[row["mode"]]
    return Shape(mode, row["num_q_heads"], row["num_kv_heads"], row["head_dim"])


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    gbps = copy_gbps()
    head = machine() | {"copy_gbps": round(gbps, 1), "command": "python -m bench.qkv_norm"}
    rows = []
    print(f"{'shape':<22}{'M':>6}{'limit':>9}{'ours':>9}{'xla':>9}{'3':>9}{'2':>9}  missed bars")
    for shape in SHAPES:
        for tokens in TOKENS:
            row = measure_row(shape, tokens, gbps)
            rows.append(row)
            times = [row[f"{n}_us"] for n in ("limit", "ours", "xla", "three_launch", "two_launch")]
            cells = "".join(f"{'-' if t is None else format(t, '.2f'):>9}" for t in times)
            print(f"{shape!s:<22}{tokens:>6}{cells}  {', '.join(missed_bars(row))}", flush=True)
    write_json(folder / "qkv_norm.json", head, rows)
    plot(rows, head, folder / "qkv_norm.png")
    print("missed bars:", sum(bool(missed_bars(row)) for row in rows))


if __name__ == "__main__":
    main()
