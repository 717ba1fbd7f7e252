import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from g4attn_jax import ProjectionMode, ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache, float8_scale
from g4attn_jax.commands.check import judge
from g4attn_jax.ops.qkv_norm_rope.triton import cache_rows, choose_launch
from g4attn_jax.ops.qkv_norm_rope_write.cases import CASES, QkvNormRopeWriteCase
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases

RUNS_HERE = ("xla", "triton_interpret")
KINDS = [
    (mode, form)
    for mode, form in itertools.product(ProjectionMode, (KVCache, CompactKVCache))
    if (mode, form) != (ProjectionMode.QKV_FULL, CompactKVCache)
]
on_every_kind = pytest.mark.parametrize(
    ("mode", "form"), KINDS, ids=[f"{m.name}-{f.__name__}" for m, f in KINDS]
)
on_both = pytest.mark.parametrize("implementation", RUNS_HERE)


# Thinned for the interpreter; tests/gpu/test_kernels.py runs all of it.
SWEEP = [
    case
    for case in tagged(CASES, "published")
    if case.tokens == 7 or (case.tokens, case.head_dim) == (64, 128)
]


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_sweep(case, implementation):
    result = judge(case, case.arguments(), implementation)
    assert result.passed, result


# One of each layer, of few tokens; tests/gpu/test_kernels.py runs all.
PARTIAL_SUMS = [
    case
    for case in CASES
    if case.partial_sums is not None and case.tokens < 16 and case.num_pages is None
]


@everyday("34-12-9-partial_sums=3")
@on_both
@pytest.mark.parametrize("case", PARTIAL_SUMS, ids=str)
def test_partial_sums(case, implementation):
    result = judge(case, case.arguments(), implementation)
    assert result.passed, result


@everyday("5-8-8")
@on_both
@on_every_kind
@pytest.mark.parametrize(
    ("tokens", "head_dim", "rotary_dim"), [(0, 12, 4), (1, 12, 4), (5, 8, 8), (2000, 12, 4)]
)
def test_any_number_of_tokens(mode, form, tokens, head_dim, rotary_dim, implementation):
    """Compared as whole arrays: what is not written must still be as it was."""
    case = QkvNormRopeWriteCase(mode, form, 6, 2, head_dim, rotary_dim, tokens)
    arguments = case.arguments(jnp.float32)
    outputs = case.run(arguments, implementation), case.exact(arguments)
    for ours, exact in zip(*map(jax.tree.leaves, outputs), strict=True):
        assert ours.shape == exact.shape
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def random_bits(shape, dtype):
    """Bits of finite numbers: XLA's CPU backend of JAX 0.10 sets a bit of some bfloat16 NaNs."""
    width = 8 * jnp.dtype(dtype).itemsize
    bits = np.random.default_rng(3).integers(0, 2**width, shape, dtype=f"uint{width}")
    return jnp.asarray((bits & ~np.array(1 << width - 2, bits.dtype)).view(dtype))


@everyday("bfloat16-QK_ONLY-CompactKVCache")
@on_both
@on_every_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, FLOAT8])
def test_other_bytes_stay(mode, form, dtype, implementation):
    """Slots permuted, negative, past the end, and overwritten by a second step."""
    case = QkvNormRopeWriteCase(mode, form, 4, 2, 32, 8, 11)
    scale = jnp.full(2, 0.05) if dtype == FLOAT8 else None
    qkv, q_norm, k_norm, cos, sin, slots, cache = case.arguments(dtype)
    if dtype == FLOAT8:
        qkv, q_norm, k_norm = (x.astype(jnp.bfloat16) for x in (qkv, q_norm, k_norm))
    num_slots = cache.v.shape[0] * cache.v.shape[1]
    slots = slots.at[:5].set(jnp.array([-1, -(2**31), num_slots, num_slots + 3, 2**31 - 1]))
    poison = jax.tree.map(lambda x: random_bits(x.shape, dtype), cache)
    written = poison = poison._replace(scale=scale)
    for _ in range(2):
        _, written = ops.qkv_norm_rope_write(
            qkv,
            q_norm,
            k_norm,
            cos,
            sin,
            slots,
            written,
            mode=mode,
            implementation=implementation,
        )
    hit = np.zeros(num_slots, bool)
    hit[np.asarray(slots[5:])[np.asarray(slots[5:]) >= 0]] = mode is not ProjectionMode.Q_ONLY
    for before, after in zip(poison[:2], written[:2], strict=True):
        before, after = (
            np.asarray(a).reshape(num_slots, -1).view(np.uint8) for a in (before, after)
        )
        np.testing.assert_array_equal(before[~hit], after[~hit])
        assert np.all(np.any(before[hit] != after[hit], axis=1))


@everyday("QK_ONLY-KVCache-xla")
@on_both
@on_every_kind
def test_leading_dims(mode, form, implementation):
    """[B, T] and [B * T] tokens are the same."""
    case = QkvNormRopeWriteCase(mode, form, 4, 2, 32, 8, 6)
    arguments = case.arguments()
    folded = [x.reshape(2, 3, *x.shape[1:]) for x in (arguments[0], *arguments[3:6])]
    q, cache = case.run(arguments, implementation)
    folded_q, folded_cache = case.run(
        [folded[0], *arguments[1:3], *folded[1:], arguments[6]], implementation
    )
    np.testing.assert_array_equal(q.reshape(folded_q.shape), folded_q)
    jax.tree.map(np.testing.assert_array_equal, cache, folded_cache)


@on_both
def test_q_only_touches_no_cache(implementation):
    for form in (KVCache, CompactKVCache):
        case = QkvNormRopeWriteCase(ProjectionMode.Q_ONLY, form, 4, 2, 32, 8, 5)
        qkv, q_norm, k_norm, cos, sin, _, cache = case.arguments()
        _, same = ops.qkv_norm_rope_write(
            qkv,
            q_norm,
            k_norm,
            cos,
            sin,
            None,
            cache,
            mode=ProjectionMode.Q_ONLY,
            implementation=implementation,
        )
        assert same is cache


@everyday("QK_ONLY-CompactKVCache-triton_interpret", "QKV_FULL-KVCache-xla")
@on_both
@on_every_kind
def test_float8_storage(mode, form, implementation):
    """Written and read back within half an ulp of float8: 2^-4 of the value, 2^-10 if subnormal."""
    if mode is ProjectionMode.Q_ONLY:
        pytest.skip("writes nothing")
    case = QkvNormRopeWriteCase(mode, form, 4, 2, 64, 16, 9)
    arguments = case.arguments(jnp.float32)
    cache = case.arguments(FLOAT8)[6]._replace(scale=float8_scale(arguments[2]))
    q, written = case.run([*arguments[:6], cache], implementation)
    exact_q, exact = case.exact(arguments)
    np.testing.assert_allclose(q, exact_q, atol=1e-5)
    placed = np.asarray(arguments[5])[np.asarray(arguments[5]) >= 0]
    scales = {"k": cache.scale[0], "k_rot": cache.scale[0], "v": cache.scale[1]}
    for name in cache._fields[:2]:
        stored, value = getattr(written, name), getattr(exact, name)
        assert stored.dtype == FLOAT8
        read = np.asarray(stored.astype(jnp.float32) * scales[name])
        read, value = (a.reshape(-1, a.shape[-2] * a.shape[-1])[placed] for a in (read, value))
        bound = np.maximum(np.abs(value) * 2.0**-4, float(scales[name]) * 2.0**-10)
        assert np.all(np.abs(read - value) <= bound * (1 + 1e-5))


@on_both
def test_what_float8_does_not_hold_is_nan(implementation):
    """448 is the largest; 464 and less are rounded to it, more is NaN rather than clamped."""
    # A head of one number in dim 0 is normalised to 8 there: a V of 8 / scale.
    qkv = jnp.zeros((4, 1, 3, 64)).at[..., 0].set(1e3)
    cos, sin = jnp.ones((4, 0)), jnp.zeros((4, 0))
    for scale, stored in ((8 / 448, 448), (8 / 463, 448), (8 / 465, np.nan), (8 / 1e6, np.nan)):
        cache = KVCache(*jnp.zeros((2, 1, 16, 1, 64), FLOAT8), jnp.full(2, scale))
        _, cache = ops.qkv_norm_rope_write(
            qkv,
            jnp.ones(64),
            jnp.ones(64),
            cos,
            sin,
            jnp.arange(4, dtype=jnp.int32),
            cache,
            mode=ProjectionMode.QKV_FULL,
            implementation=implementation,
        )
        np.testing.assert_array_equal(cache.v[0, :4, 0, 0].astype(jnp.float32), stored)
        np.testing.assert_array_equal(cache.v[0, :4, 0, 1:].astype(jnp.float32), 0)


@everyday("triton_interpret")
@on_both
def test_no_derivative_with_a_cache(implementation):
    for mode, form in KINDS:
        case = QkvNormRopeWriteCase(mode, form, 4, 2, 32, 8, 3)
        qkv, *rest = case.arguments(jnp.float32)

        def loss(qkv, case=case, rest=rest):
            return jnp.sum(case.run([qkv, *rest], implementation)[0] ** 2)

        if mode is ProjectionMode.Q_ONLY:
            assert float(jnp.abs(jax.grad(loss)(qkv)).max()) > 0
            continue
        for differentiate in (jax.grad(loss), lambda x, f=loss: jax.jvp(f, (x,), (x,))):
            with pytest.raises(NotImplementedError, match="updates a cache and has no derivative"):
                differentiate(qkv)


@everyday(
    "QK_ONLY-CompactKVCache-float32-triton_interpret", "QK_ONLY-KVCache-storage1-triton_interpret"
)
@on_both
@pytest.mark.parametrize("storage", [jnp.float32, FLOAT8])
@on_every_kind
def test_vmap(mode, form, storage, implementation):
    """Over tokens, slots and caches: as if each were alone."""
    singles, scale = [], jnp.full(2, 0.05) if storage == FLOAT8 else None
    for seed in range(3):
        case = QkvNormRopeWriteCase(mode, form, 4, 2, 32, 8, 5)
        qkv, q_norm, k_norm, cos, sin, slots, _ = case.arguments(jnp.float32, seed)
        cache = case.arguments(storage)[6]._replace(scale=scale)
        singles.append((qkv, cos, sin, slots, cache))

    def run(qkv, cos, sin, slots, cache):
        return case.run([qkv, q_norm, k_norm, cos, sin, slots, cache], implementation)

    batched = jax.vmap(run)(*jax.tree.map(lambda *x: jnp.stack(x), *singles))
    for i, single in enumerate(singles):
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(run(*single)), strict=True):
            np.testing.assert_allclose(a[i].astype(jnp.float32), b.astype(jnp.float32), rtol=1e-6)


@everyday("QK_ONLY-CompactKVCache")
@on_both
@on_every_kind
def test_64_bit_mode(mode, form, implementation):
    with jax.enable_x64(True):
        case = QkvNormRopeWriteCase(mode, form, 6, 2, 48, 12, 5)
        arguments = case.arguments(jnp.float32)
        arguments[3:5] = [x.astype(jnp.float32) for x in arguments[3:5]]
        outputs = case.run(arguments, implementation), case.exact(arguments)
        for ours, exact in zip(*map(jax.tree.leaves, outputs), strict=True):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, exact, atol=1e-5)


@everyday()
@hypothesis.given(
    slot=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
    num_slots=st.integers(1, 2**20),
    num_kv_heads=st.integers(1, 64),
)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_rows_of_a_cache(slot, num_slots, num_kv_heads):
    """The interpreter drops a write outside a buffer; a GPU would not. No row is outside."""
    slot = np.array(slot, np.int32)
    for kv_head in {0, num_kv_heads - 1}:
        row, in_range = cache_rows(
            jnp.asarray(slot), jnp.int32(kv_head), num_kv_heads=num_kv_heads, num_slots=num_slots
        )
        np.testing.assert_array_equal(in_range, (slot >= 0) & (slot < num_slots))
        assert np.all((row >= 0) & (row < num_slots * num_kv_heads))
        expected = slot.astype(np.int64) * num_kv_heads + kv_head
        np.testing.assert_array_equal(np.asarray(row)[in_range], expected[in_range])


@hypothesis.given(
    num_rows=st.integers(1, 2**24), half=st.integers(1, 256), wide=st.booleans(), many=st.booleans()
)
@hypothesis.settings(derandomize=True)
def test_launches_are_ones_triton_takes(num_rows, half, wide, many):
    half_bytes = (4 if wide else 2) * 2 ** (half - 1).bit_length()
    launch = choose_launch(num_rows, half_bytes, absorbed=many)
    for number in launch:
        assert number & (number - 1) == 0
    assert 1 <= launch.num_warps <= launch.block_rows <= 16


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"slots": None}, "slots is None"),
            ({"slots": jnp.zeros(5)}, "slots has dtype float32"),
            ({"slots": jnp.zeros((5, 1), jnp.int32)}, r"slots has shape \(5, 1\)"),
            ({"k_norm": None}, "k_norm is missing; QK_ONLY with a CompactKVCache needs it"),
            ({"cache": None}, "cache is a NoneType"),
            ({"cache": KVCache(1, 2)}, "cache.k is a int of dtype None"),
            (
                {"cache": CompactKVCache(*jnp.zeros((2, 1, 16, 2, 32)))},
                r"cache.k_rot has shape \(1, 16, 2, 32\)",
            ),
            (
                {"cache": CompactKVCache(jnp.zeros((1, 16, 2, 32)), jnp.zeros((2, 16, 2, 8)))},
                r"arrays of cache have \[num_pages, page_size, Nkv\] .*; accepted: one",
            ),
            ({"cache": KVCache(*jnp.zeros((2, 0, 16, 2, 32)))}, r"cache\.k has shape .* may be 0"),
            (
                {"cache": KVCache(*jnp.zeros((2, 1, 16, 2, 32), FLOAT8))},
                "together with cache.scale",
            ),
            (
                {"cache": KVCache(*jnp.zeros((2, 1, 16, 2, 32)), jnp.ones(2))},
                "cache.k is .* of dtype float32",
            ),
            (
                {"cache": KVCache(*jnp.zeros((2, 1, 16, 2, 32), FLOAT8), 1.0)},
                r"cache.scale is a float; accepted: float32 \(2,\)",
            ),
        ],
    )
    def test_refused(self, change, message):
        mode = ProjectionMode.QK_ONLY
        case = QkvNormRopeWriteCase(mode, CompactKVCache, 4, 2, 32, 8, 5)
        names = "qkv", "q_norm", "k_norm", "cos", "sin", "slots", "cache"
        arguments = dict(zip(names, case.arguments(jnp.float32), strict=True)) | {"mode": mode}
        with pytest.raises(ValueError, match=message):
            ops.qkv_norm_rope_write(**(arguments | change))

    def test_a_compact_cache_is_not_for_separate_projections(self):
        case = QkvNormRopeWriteCase(ProjectionMode.QKV_FULL, CompactKVCache, 4, 2, 32, 8, 5)
        with pytest.raises(ValueError, match="cache is a CompactKVCache"):
            case.run(case.arguments(), None)

    def test_q_only_needs_the_producers_scale(self):
        case = QkvNormRopeWriteCase(ProjectionMode.Q_ONLY, CompactKVCache, 4, 2, 32, 8, 5)
        qkv, q_norm, _, *rest = case.arguments()
        with pytest.raises(ValueError, match="k_norm is missing; Q_ONLY with a CompactKVCache"):
            case.run([qkv, q_norm, None, *rest], None)

    def test_triton_without_a_gpu(self):
        if jax.default_backend() == "gpu":
            pytest.skip("there is a GPU here")
        case = QkvNormRopeWriteCase(ProjectionMode.QK_ONLY, KVCache, 4, 2, 32, 8, 5)
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU of compute capability"):
            case.run(case.arguments(), "triton")


def test_a_float8_array_that_the_kernel_cannot_address():
    """Offsets into up to 2^32 bytes are int32."""
    case = QkvNormRopeWriteCase(ProjectionMode.QK_ONLY, KVCache, 8, 4, 512, 128, 1)
    *arguments, _ = case.arguments()
    array = jax.ShapeDtypeStruct((2**17, 16, 4, 512), FLOAT8)
    cache = KVCache(array, array, jax.ShapeDtypeStruct((2,), jnp.float32))

    def run(cache, implementation="triton_interpret"):
        return case.run([*arguments, cache], implementation)

    _, written = jax.eval_shape(lambda c: run(c, None), cache)  # the reference
    assert written.k.shape == array.shape
    with pytest.raises(NotImplementedError, match=r"cache\.k has 4294967296 elements"):
        jax.eval_shape(run, cache)


def test_usual_path_is_worse():
    """The bound that `judge` holds us to is one that can be missed."""
    case = QkvNormRopeWriteCase(ProjectionMode.QK_ONLY, CompactKVCache, 16, 8, 128, 32, 33)
    arguments = case.arguments()
    (q, _), (exact, _), (usual, _) = (
        case.run(arguments, "xla"),
        case.exact(arguments),
        case.usual(arguments),
    )
    assert oracle.max_error(usual, exact) > 1.2 * oracle.max_error(q, exact)
