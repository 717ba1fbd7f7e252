"""Kernel time from the packed projection to attention: norm, RoPE and cache write.

All variants update a donated cache of 65 536 slots at random places.
"""

import functools

import jax.numpy as jnp

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.ops.qkv_rms_norm import MAX_CACHED_TOKENS
from bench.plots import panels, times_against_tokens
from g4attn_jax import ProjectionMode, ops
from g4attn_jax.ops.qkv_norm_rope.reference import unrounded
from g4attn_jax.ops.qkv_norm_rope_write.cases import CASES
from g4attn_jax.rope import apply_rope
from g4attn_jax.testing.case import tagged

# Forms of a cache in the results.
FORMS = {"KVCache": "separate", "CompactKVCache": "compact"}
VARIANTS = {
    "ours": "one launch",
    "xla": "the formula in jnp under XLA, with cache.at[slots].set",
    "xla_unique": "the same with the promise that slots differ, as implementation='xla' runs it",
    "norm_then_xla": "the norm kernel, then RoPE and cache write as in xla",
}


def points():
    """A layer's heads, the form of its cache, and a number of tokens."""
    return [Point(identity(case), case) for case in tagged(CASES, "bench")]


def identity(case):
    """Identity fields of a case."""
    return {
        "mode": case.mode.name,
        "form": FORMS[case.form.__name__],
        "num_q_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "rotary_dim": case.rotary_dim,
        "tokens": case.tokens,
    }


def calls(case):
    """(arguments of several calls without the cache, the cache that all of them update)."""
    if case.tokens <= MAX_CACHED_TOKENS:  # one packed buffer, which stays in the L2
        made = [case.arguments(seed=seed) for seed in range(8)]
        made = [[made[0][0], *rest] for _, *rest in made]
    else:
        made = case.calls(4 * measure.L2_BYTES)
    *_, cache = made[0]
    return [tuple(arguments) for *arguments, _ in made], cache


def scatter(cache, slots, k, v):
    """`cache.write` without the promise that slots differ."""

    def written(array, rows):
        flat = array.reshape(-1, *array.shape[2:])
        index = jnp.where(slots < 0, flat.shape[0], slots)
        return flat.at[index].set(rows.astype(array.dtype), mode="drop").reshape(array.shape)

    k_array, v_array = cache.written
    k = cache.stored_keys(k, k_array.shape[-1])
    return cache.with_written(written(k_array, k), written(v_array, v))


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


def variants(mode):
    """Functions by the prefix of their fields."""
    write = functools.partial(ops.qkv_norm_rope_write, mode=mode)
    yield "ours", functools.partial(write, implementation="triton")
    yield "xla", functools.partial(formula, mode=mode)
    yield "xla_unique", functools.partial(write, implementation="xla")
    yield "norm_then_xla", functools.partial(norm_then_formula, mode=mode)


def rows(points, gbps):
    """A row for each point."""
    for point in points:
        case = point.subject
        row = {**point.fields, "limit_us": round(case.bytes() / gbps / 1e3, 3)}
        arguments, cache = calls(case)
        for name, f in variants(case.mode):
            row |= measure.kernel_time(f, arguments, iterations=10, state=cache).fields(name)
        yield row


def plot(rows, head, path):
    """Time against tokens, a panel a shape."""
    import matplotlib.pyplot as plt

    lines = {
        "xla": ("XLA", "tab:red", "o"),
        "xla_unique": ("XLA, unique slots promised", "tab:pink", "s"),
        "norm_then_xla": ("norm kernel, then XLA", "tab:orange", "v"),
        "ours": ("g4attn-jax, one launch", "tab:blue", "D"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, (title, mine) in zip(axes.flat, panels(rows, BENCHMARK.identity), strict=False):
        times_against_tokens(axis, title, mine, lines)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    figure.suptitle(
        f"Norm, RoPE and cache write (Nq/Nkv/D), bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


_WRITES = {"mode": ("QK_ONLY", "QKV_FULL")}
BENCHMARK = Benchmark(
    name="qkv_norm_rope_write",
    about="norm, RoPE and cache write: all between the QKV matmul and attention",
    variants=VARIANTS,
    identity=(
        "mode",
        "form",
        "num_q_heads",
        "num_kv_heads",
        "head_dim",
        "rotary_dim",
        "tokens",
    ),
    fields=(
        "limit_us",
        *(f"{name}_{what}" for name in VARIANTS for what in ("us", "p10_p90_us", "launches")),
    ),
    points=points,
    measure=rows,
    watched={"ours_us": "ours_p10_p90_us", "ours_launches": None},
    rate="copy_gbps",
    plot=plot,
    bars=(
        Bar(of="ours_launches", least=1, why="fewer would mean that the kernel did not run"),
        Bar(of="ours_launches", most=1, why="the kernel exists to do all of it in one launch"),
        Bar(
            of="xla_us",
            over="ours_us",
            where={**_WRITES, "tokens": 1},
            least=2.5,
            why="XLA needs five launches or more, each a microsecond at least",
        ),
        Bar(
            of="xla_us",
            over="ours_us",
            where={**_WRITES, "tokens": range(8, 2049)},
            least=4.0,
            why="XLA's scatters read what they write, and its launches pass q, k and v through "
            "memory",
        ),
        Bar(
            of="limit_us",
            over="ours_us",
            where={"tokens": 8192},
            least=0.85,
            why="a copy of the packed buffer into q and the cache, as far as its bytes go",
        ),
    ),
)
