"""Random shapes of every op on a GPU against float64, for as long as `--fuzz-seconds` says."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ProjectionMode, ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache
from g4attn_jax.ops.q_keqv_rms_norm.cases import QKeqvRmsNormCase
from g4attn_jax.ops.qkv_norm_rope.cases import QkvNormRopeCase
from g4attn_jax.ops.qkv_norm_rope_write.cases import QkvNormRopeWriteCase
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
from g4attn_jax.testing import oracle
from tests.ops import test_add_rms_norm, test_grouped_matmul, test_linear
from tests.ops.test_decode_attention import case as attention_case

HEAD_DIMS = (16, 34, 64, 96, 128, 256, 320, 512)
# The most that one rounding to a dtype is off, relative to the number.
ROUNDING = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11, jnp.float32: 2.0**-24}
DTYPES = tuple(ROUNDING)


@pytest.fixture
def fuzz(request, record_property):
    """Call a function with a random generator until the time is up; a failure names its seed."""

    def run(try_one):
        config = request.config
        seed = config.getoption("fuzz_seed")
        seed = time.time_ns() % 2**32 if seed is None else seed
        end, tried = time.monotonic() + config.getoption("fuzz_seconds"), 0
        print(f"--fuzz-seed {seed}")
        record_property("fuzz_seed", seed)
        while time.monotonic() < end or not tried:
            rng = np.random.default_rng([seed, tried])
            try:
                try_one(rng)
            except Exception as error:
                error.add_note(f"shape {tried} of --fuzz-seed {seed}")
                raise
            tried += 1
            if tried % 40 == 0:
                jax.clear_caches()
        record_property("fuzz_shapes", tried)

    return run


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def check(ours, exact, accepted, *about):
    """Assert that arrays differ by no more than `accepted`, by norms."""
    exact = np.asarray(exact).astype(np.float64)
    error = np.linalg.norm(np.asarray(ours).astype(np.float64) - exact)
    assert error <= accepted * np.linalg.norm(exact), (error / np.linalg.norm(exact), *about)


def attention_arguments(rng, tokens):
    """Arguments of an attention op, its window, and the error that is accepted."""
    head_dim, group = pick(rng, HEAD_DIMS), int(rng.integers(1, 20))
    num_kv_heads = int(rng.integers(1, 5))
    compact, paged = rng.random() < 0.5, rng.random() < 0.5
    dtype = pick(rng, DTYPES)
    storage = FLOAT8 if rng.random() < 0.2 else None
    page_size = pick(rng, (16, 48, 64, 128))
    columns = int(rng.integers(1, 6)) + tokens // page_size + 1
    capacity = columns * page_size
    window = int(rng.integers(1, capacity)) if rng.random() < 0.4 else None
    is_ring = window is not None and window + tokens - 1 <= capacity
    most = 3 * capacity if is_ring else capacity - 1
    last = [int(rng.integers(-1, most + 1)) for _ in range(int(rng.integers(1, 5)))]
    q, *others = attention_case(
        last,
        tokens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        compact=compact,
        pages=columns if paged else None,
        capacity=None if paged else capacity,
        dtype=dtype,
        storage=storage,
        # float8 has no infinity.
        **({} if storage is None else {"poison": np.nan}),
        rotary=2 * int(rng.integers(1, head_dim // 2 + 1)),
        page_size=page_size,
    )
    # Weights and the result are rounded; scores of the order of 1 are off by sums in float32.
    return (q * head_dim**-0.5, *others), window, 2 * ROUNDING[dtype] + 1e-5


def check_attention(op, arguments, window, accepted, **further):
    o = op(*arguments, sliding_window=window, **further)
    exact = oracle.cached_attention(*arguments, sliding_window=window)
    shapes = jax.tree.map(lambda x: f"{x.dtype}{x.shape}", arguments)
    check(o, exact, accepted, shapes, window, further)


@pytest.mark.gpu("decode_attention")
def test_decode_attention(fuzz):
    def try_one(rng):
        arguments = attention_arguments(rng, int(rng.integers(1, 17)))
        splits = pick(rng, (None, None, int(rng.integers(1, 257))))
        check_attention(ops.decode_attention, *arguments, num_splits=splits)

    fuzz(try_one)


@pytest.mark.gpu("prefill_attention")
def test_prefill_attention(fuzz):
    def try_one(rng):
        check_attention(ops.prefill_attention, *attention_arguments(rng, int(rng.integers(1, 301))))

    fuzz(try_one)


def check_case(case, dtype):
    """One rounding of float32; the rest of a cache stays as it was."""
    arguments = case.arguments(dtype)
    outputs = case.run(arguments, "triton"), case.exact(arguments)
    for ours, exact in zip(*map(jax.tree.leaves, outputs), strict=True):
        check(ours, exact, ROUNDING[dtype] + 1e-6, case, dtype)


def heads(rng):
    num_kv_heads = int(rng.integers(1, 17))
    return num_kv_heads * int(rng.integers(1, 9)), num_kv_heads


@pytest.mark.gpu("qkv_rms_norm", "q_keqv_rms_norm")
def test_norms(fuzz):
    def try_one(rng):
        mode = pick(rng, (None, *ProjectionMode))
        d, tokens = int(rng.integers(1, 600)), int(rng.integers(1, 400))
        sizes = *heads(rng), d, tokens
        case = QKeqvRmsNormCase(*sizes) if mode is None else QkvRmsNormCase(mode, *sizes)
        check_case(case, pick(rng, DTYPES))

    fuzz(try_one)


@pytest.mark.gpu("qkv_norm_rope_write")
def test_prologue(fuzz):
    def try_one(rng):
        mode = pick(rng, tuple(ProjectionMode))
        form = KVCache if mode is ProjectionMode.QKV_FULL else pick(rng, (KVCache, CompactKVCache))
        d = 2 * int(rng.integers(1, 300))
        rotary_dim = 2 * int(rng.integers(1, d // 2 + 1))
        tokens, page_size = int(rng.integers(1, 400)), int(rng.integers(1, 70))
        sizes = *heads(rng), d, rotary_dim, tokens
        partial_sums = pick(rng, (None, 1, 3))
        case = QkvNormRopeWriteCase(
            mode, form, *sizes, page_size=page_size, partial_sums=partial_sums
        )
        check_case(case, pick(rng, DTYPES))

    fuzz(try_one)


@pytest.mark.gpu("qkv_norm_rope")
def test_norm_rope(fuzz):
    def try_one(rng):
        mode, dtype = pick(rng, tuple(ProjectionMode)), pick(rng, DTYPES)
        d = 2 * int(rng.integers(1, 300))
        rotary_dim = 2 * int(rng.integers(0, d // 2 + 1))
        case = QkvNormRopeCase(mode, *heads(rng), d, rotary_dim, int(rng.integers(1, 400)))
        check_case(case, dtype)

    fuzz(try_one)


def check_sums(y, exact, depth, dtype, *about):
    """One rounding of float32 sums of `depth` products."""
    check(y, exact, ROUNDING[dtype] + 2 * depth**0.5 * 2.0**-24, dtype, *about)


@pytest.mark.gpu("linear")
def test_products(fuzz):
    def try_one(rng):
        tokens, dtype = int(rng.integers(1, 65)), pick(rng, DTYPES)
        k, n = (int(rng.integers(1, 3000)) for _ in range(2))
        x, w = test_linear.case(tokens, k, n, dtype=dtype)
        exact = oracle.linear(x, w)
        y = ops.linear(x, w, implementation="triton")
        check_sums(y, exact, k, dtype, tokens, k, n)
        partial_sums = ops.linear_partial_sums(x, w, implementation="triton")
        check_sums(ops.add_partial_sums(partial_sums, dtype), exact, k, dtype, tokens, k, n)
        y = ops.logits(x, jnp.asarray(w.T), implementation="triton")
        check_sums(y, exact, k, jnp.float32, "logits", tokens, k, n)
        x, w = test_linear.case(tokens, k, 2, n, dtype=dtype)
        gate, up = np.moveaxis(oracle.linear(x, w), 2, 0)
        y = ops.geglu(x, w, implementation="triton")
        check_sums(y, oracle.gelu(gate) * up, 4 * k, dtype, "geglu", tokens, k, n)

    fuzz(try_one)


@pytest.mark.gpu("add_rms_norm")
def test_residual_sum(fuzz):
    def try_one(rng):
        shape = int(rng.integers(1, 40)), int(rng.integers(16, 6000))
        dtype, partial_sums = pick(rng, DTYPES), pick(rng, (None, 1, 2, 5))
        arguments = test_add_rms_norm.case(
            *shape, dtype=dtype, partial_sums=partial_sums, scales=int(rng.integers(0, 3))
        )
        total, norms = ops.add_rms_norm(*arguments, implementation="triton")
        exact_total, exact_norms = oracle.add_rms_norm(*arguments)
        for ours, exact in zip((total, *norms), (exact_total, *exact_norms), strict=True):
            # Of sums next to a tie the norm may see another neighbour.
            check(ours, exact, 2 * ROUNDING[dtype] + 1e-6, shape, dtype, partial_sums)

    fuzz(try_one)


@pytest.mark.gpu("grouped_matmul", "grouped_gated_matmul")
def test_grouped(fuzz):
    def try_one(rng):
        groups = int(rng.integers(1, 9))
        sizes = (
            rng.integers(0, pick(rng, (3, 40, 300)), groups) * (rng.random(groups) < 0.7)
        ).tolist()
        depth, columns = (int(rng.integers(1, 900)) for _ in range(2))
        dtype, surplus = pick(rng, DTYPES), int(rng.integers(0, 5))
        num_rows = max(sum(sizes) + surplus, 1)
        x, w, sizes, w2, rows = test_grouped_matmul.case(
            sizes, num_rows=num_rows, depth=depth, columns=columns, tokens=20, dtype=dtype
        )
        gated = ops.grouped_gated_matmul(x, w2, sizes, rows, implementation="triton")
        exact = oracle.grouped_gated_matmul(x, w2, sizes, rows)
        check_sums(gated, exact, 4 * depth, dtype, "gated", sizes, depth, columns)
        x = x[rows]
        y = ops.grouped_matmul(x, w, sizes, implementation="triton")
        check_sums(y, oracle.grouped_matmul(x, w, sizes), depth, dtype, sizes, depth, columns)

    fuzz(try_one)
