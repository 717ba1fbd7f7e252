"""Kernel time of the fused Q/K/V norm, for the packed projection of a layer."""

import functools

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.plots import panels, times_against_tokens
from g4attn_jax import ProjectionMode, ops
from g4attn_jax.ops.qkv_rms_norm.cases import CASES
from g4attn_jax.testing.case import tagged

# Up to here the projection that wrote the packed buffer leaves it in the L2. Above, calls rotate
# over buffers of four times the L2, so that every byte comes from memory.
MAX_CACHED_TOKENS = 128
VARIANTS = {
    "ours": "one launch",
    "xla": "the reference in jnp under XLA",
    "three_launch": "the norm kernel for Q, K and V, one launch each",
    "two_launch": "the norm kernel for Q, and for K and V in one launch",
}


def points():
    """A layer's heads and a number of tokens."""
    return [Point(identity(case), case) for case in tagged(CASES, "bench")]


def identity(case):
    """Identity fields of a case."""
    return {
        "mode": case.mode.name,
        "num_q_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "tokens": case.tokens,
    }


def calls(case):
    """Arguments (qkv, q_norm, k_norm), where few tokens are in the L2 and many in memory."""
    if case.tokens <= MAX_CACHED_TOKENS:
        return [with_k_norm(case.arguments())]
    return [with_k_norm(arguments) for arguments in case.calls(4 * measure.L2_BYTES)]


def with_k_norm(arguments):
    """(qkv, q_norm, k_norm), k_norm None where the case has none."""
    return (*arguments, None)[:3]


def in_launches(qkv, q_norm, k_norm, *, mode, merge_kv):
    """The norm kernel, Q by itself; K and V in one launch (`merge_kv`) or one each."""
    from g4attn_jax.ops.head_norm.triton import head_norm
    from g4attn_jax.ops.qkv_rms_norm.triton import packed_heads

    tokens, num_kv_heads, _, _ = qkv.shape
    q, *kv = packed_heads(qkv, q_norm, k_norm, None, mode=mode)
    if merge_kv:
        launches = [[q], kv]
    else:
        launches = [[q], *([k._replace(scales=(s,))] for k in kv for s in k.scales)]
    return [head_norm(heads, groups=tokens * num_kv_heads, eps=1e-6) for heads in launches]


def variants(mode):
    """Functions by the prefix of their fields."""
    norm = functools.partial(ops.qkv_rms_norm, mode=mode)
    yield "ours", functools.partial(norm, implementation="triton")
    yield "xla", functools.partial(norm, implementation="xla")
    if mode is not ProjectionMode.Q_ONLY:
        yield "three_launch", functools.partial(in_launches, mode=mode, merge_kv=False)
        yield "two_launch", functools.partial(in_launches, mode=mode, merge_kv=True)


def rows(points, gbps):
    """A row for each point."""
    for point in points:
        case = point.subject
        row = {
            **point.fields,
            "limit_us": round(case.bytes() / gbps / 1e3, 3),
            "three_launch_us": None,
            "two_launch_us": None,
        }
        arguments = calls(case)
        for name, f in variants(case.mode):
            row |= measure.kernel_time(f, arguments).fields(name)
        yield row


def plot(rows, head, path):
    """Time against tokens, a panel a shape."""
    import matplotlib.pyplot as plt

    lines = {
        "xla": ("XLA", "tab:red", "o"),
        "three_launch": ("three launches", "tab:orange", "v"),
        "two_launch": ("two launches", "tab:olive", "s"),
        "ours": ("g4attn-jax, one launch", "tab:blue", "D"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    shapes = panels(rows, BENCHMARK.identity)
    for axis, (title, mine) in zip(axes.flat, shapes, strict=True):
        times_against_tokens(axis, title, mine, lines)
    figure.suptitle(f"RMSNorm of Q, K and V (Nq/Nkv/D), bfloat16, {head['gpu']}, JAX {head['jax']}")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


BENCHMARK = Benchmark(
    name="qkv_rms_norm",
    about="the norms of a layer's query, key and value heads, from the packed projection",
    variants=VARIANTS,
    identity=("mode", "num_q_heads", "num_kv_heads", "head_dim", "tokens"),
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
        Bar(of="ours_launches", most=1, why="the kernel exists to norm all heads in one launch"),
        Bar(
            of="xla_us",
            over="ours_us",
            where={"mode": ("QK_ONLY", "QKV_FULL"), "tokens": range(1, 33)},
            least=1.9,
            why="a launch costs a microsecond whatever it does, and XLA needs three or more",
        ),
        Bar(
            of="two_launch_us",
            over="ours_us",
            where={"mode": ("QK_ONLY", "QKV_FULL"), "tokens": range(1, 33)},
            least=1.4,
            why="Q in the launch of K and V saves the fixed cost of a launch",
        ),
        Bar(
            of="xla_us",
            over="ours_us",
            where={"mode": ("QK_ONLY", "QKV_FULL"), "tokens": 8192},
            least=1.15,
            why="XLA reads the packed buffer more than once, one launch reads it once",
        ),
        Bar(
            of="xla_us",
            over="ours_us",
            where={"mode": "Q_ONLY"},
            least=1.0,
            why="one norm is one kernel of XLA too; ours must not be slower",
        ),
        Bar(
            of="limit_us",
            over="ours_us",
            where={"tokens": 8192, "num_q_heads": (16, 32)},
            least=0.92,
            why="a norm of many megabytes is a copy; what is left is the start of the launch",
        ),
        Bar(
            of="limit_us",
            over="ours_us",
            where={"tokens": 8192, "num_q_heads": 8},
            least=0.88,
            why="of 20 to 31 us the fixed cost of a launch is a larger share",
        ),
    ),
)
