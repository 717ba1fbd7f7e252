"""Kernel time from the packed projection to attention: norm, RoPE and cache write.

    python -m bench.qkv_prologue [--out DIR]

Writes qkv_prologue.json and qkv_prologue.png. All update a donated cache of 65 536 slots at random
places. Compared are

    ours            one launch
    xla             XLA's compilation of the formula in jnp, with cache.at[slots].set
    xla_unique      the same with the promise that slots differ: what implementation="xla" runs
    norm_then_xla   the norm kernel, then RoPE and cache write as in xla
"""

import functools

import jax.numpy as jnp

from bench.measure import (
    copy_gbps,
    kernel_time,
    machine,
    output_folder,
    plot_times,
    write_json,
)
from bench.prologue_shapes import SHAPES, Shape
from g4attn_jax import ProjectionMode, ops
from g4attn_jax.cache import CompactKVCache
from g4attn_jax.ops.qkv_norm_rope.reference import unrounded
from g4attn_jax.rope import apply_rope

TOKENS = (1, 8, 32, 128, 2048, 8192)


def scatter(cache, slots, k, v):
    """`cache.write` without the promise that slots differ."""
    rows = {"k": k, "v": v}
    if isinstance(cache, CompactKVCache):
        half, pairs = k.shape[-1] // 2, cache.k_rot.shape[-1] // 2
        rows["k_rot"] = jnp.concatenate([k[..., :pairs], k[..., half : half + pairs]], axis=-1)
    arrays = {}
    for name in cache._fields[:2]:
        array = getattr(cache, name)
        flat = array.reshape(-1, *array.shape[2:])
        index = jnp.where(slots < 0, flat.shape[0], slots)
        flat = flat.at[index].set(rows[name].astype(array.dtype), mode="drop")
        arrays[name] = flat.reshape(array.shape)
    return cache._replace(**arrays)


def formula(qkv, q_norm, k_norm, cos, sin, slots, cache, *, mode):
    """The formula in `jnp`."""
    q, k, v = unrounded(qkv, q_norm, k_norm, cos, sin, mode=mode, eps=1e-6)
    q = cache.query(q, k_norm, 2 * cos.shape[-1]).astype(qkv.dtype)
    return q, cache if k is None else scatter(cache, slots, k, v)


def norm_then_formula(qkv, q_norm, k_norm, cos, sin, slots, cache, *, mode):
    """The fused norm of `ops.qkv_rms_norm`, the rest in `jnp`."""
    norm_k_norm = None if mode is ProjectionMode.Q_ONLY else k_norm
    q, k, v = ops.qkv_rms_norm(qkv, q_norm, norm_k_norm, mode=mode, implementation="triton")
    q = cache.query(apply_rope(q, cos, sin), k_norm, 2 * cos.shape[-1])
    return q, cache if k is None else scatter(cache, slots, apply_rope(k, cos, sin), v)


def variants(mode: ProjectionMode):
    """What is compared, by the prefix of its fields in the JSON."""
    write = functools.partial(ops.qkv_norm_rope_write, mode=mode)
    yield "ours", functools.partial(write, implementation="triton")
    yield "xla", functools.partial(formula, mode=mode)
    yield "xla_unique", functools.partial(write, implementation="xla")
    yield "norm_then_xla", functools.partial(norm_then_formula, mode=mode)


def measure_row(shape: Shape, tokens: int, gbps: float) -> dict:
    """One row of the JSON."""
    row = {
        **shape.fields(),
        "tokens": tokens,
        "limit_us": round(shape.bytes(tokens) / gbps / 1e3, 3),
    }
    calls, cache = shape.calls(tokens), shape.cache()
    for name, f in variants(shape.mode):
        time = kernel_time(f, calls, iterations=10, state=cache)
        row[f"{name}_us"] = round(time.us, 3)
        row[f"{name}_p10_p90_us"] = [round(time.p10, 3), round(time.p90, 3)]
        row[f"{name}_launches"] = time.launches
    return row


def missed_bars(row: dict) -> list[str]:
    """The bars of the project's third issue that a row does not reach."""
    ours, tokens, missed = row["ours_us"], row["tokens"], []

    def bar(name, ratio, minimum):
        if ratio < minimum:
            missed.append(f"{name} {ratio:.2f} < {minimum}")

    if row["ours_launches"] != 1:
        missed.append(f"{row['ours_launches']} launches")
    if row["mode"] != "Q_ONLY" and tokens <= 2048:
        bar("xla/ours", row["xla_us"] / ours, 2.5 if tokens == 1 else 4.0)
    if tokens == 8192:
        bar("limit/ours", row["limit_us"] / ours, 0.85)
    return missed


def plot(rows: list[dict], head: dict, path) -> None:
    """Time against tokens, a panel a shape."""
    import matplotlib.pyplot as plt

    lines = {
        "xla": ("XLA", "tab:red", "o"),
        "xla_unique": ("XLA, unique slots promised", "tab:pink", "s"),
        "norm_then_xla": ("norm kernel, then XLA", "tab:orange", "v"),
        "ours": ("g4attn-jax, one launch", "tab:blue", "D"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, shape in zip(axes.flat, SHAPES, strict=False):
        mine = rows[SHAPES.index(shape) * len(TOKENS) :][: len(TOKENS)]
        plot_times(axis, str(shape), mine, lines)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    figure.suptitle(
        f"Norm, RoPE and cache write (Nq/Nkv/D), bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    gbps = copy_gbps()
    head = machine() | {"copy_gbps": round(gbps, 1), "command": "python -m bench.qkv_prologue"}
    rows = []
    names = ("limit", "ours", "xla", "xla_unique", "norm_then_xla")
    print(f"{'shape':<30}{'M':>6}" + "".join(f"{n:>14}" for n in names) + "  missed bars")
    for shape in SHAPES:
        for tokens in TOKENS:
            row = measure_row(shape, tokens, gbps)
            rows.append(row)
            cells = "".join(f"{row[f'{n}_us']:>14.2f}" for n in names)
            print(f"{shape!s:<30}{tokens:>6}{cells}  {', '.join(missed_bars(row))}", flush=True)
    write_json(folder / "qkv_prologue.json", head, rows)
    plot(rows, head, folder / "qkv_prologue.png")
    print("missed bars:", sum(bool(missed_bars(row)) for row in rows))


if __name__ == "__main__":
    main()
