import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import Gemma4Config, ProjectionMode
from g4attn_jax.cache import (
    FLOAT8,
    CompactKVCache,
    KVCache,
    bytes_per_token,
    float8_scale,
    model_bytes,
    zeros,
)
from g4attn_jax.layout import Ring
from g4attn_jax.rope import apply_rope
from g4attn_jax.testing import oracle
from tests.everyday import everyday
from tests.test_attention import K_EQ_V, KV_SHARED

PAGES, PAGE, N, D, R = 3, 4, 2, 16, 8
SLOTS = PAGES * PAGE
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, FLOAT8]
on_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
on_both_forms = pytest.mark.parametrize("form", [KVCache, CompactKVCache])


def rows(*batch, seed=0, dtype=jnp.float32):
    """k and v."""
    return jax.random.normal(jax.random.key(seed), (2, *batch, N, D)).astype(dtype)


def poisoned(form, dtype=jnp.float32, pages=PAGES, page_size=PAGE):
    """A cache full of what a write must leave alone, down to the sign of a zero."""
    widths = {"k": D, "v": D} if form is KVCache else {"v": D, "k_rot": R}
    rng = np.random.default_rng(0)
    arrays = {
        name: jnp.asarray(rng.normal(size=(pages, page_size, N, width)) * 50, dtype)
        .at[:, ::2, :, :3]
        .set(jnp.array([-0.0, 0.0, 2.0**-6], dtype))
        for name, width in widths.items()
    }
    return form(**arrays, scale=jnp.array([0.03, 0.02]) if dtype == FLOAT8 else None)


def bits(array):
    return np.asarray(array).view(np.uint8)


def band(k):
    """The dims that rotate: the first R/2 of both halves."""
    return np.concatenate([k[..., : R // 2], k[..., D // 2 : D // 2 + R // 2]], axis=-1)


@everyday("slots0-float8_e4m3fn", "slots0-bfloat16")
@on_both_forms
@pytest.mark.parametrize("jit", [False, True])
@on_every_dtype
@pytest.mark.parametrize("slots", [[[0, 2, 11], [4, -1, 1]], [5, -1, 12, 7, -1, -12, 2**31 - 1]])
def test_rows_go_to_their_slots_and_nowhere_else(form, jit, dtype, slots):
    cache, slots = poisoned(form, dtype), jnp.array(slots)
    k, v = rows(*slots.shape, dtype=jnp.float32 if dtype == FLOAT8 else dtype)
    written = (jax.jit(form.write) if jit else form.write)(cache, slots, k, v)
    assert type(written) is form
    k_norm, v_norm = (1, 1) if cache.scale is None else np.asarray(cache.scale)
    new = {"k": np.asarray(k) / k_norm, "v": np.asarray(v) / v_norm}
    new["k_rot"] = band(new["k"])
    for name in set(cache._fields) - {"scale"}:
        expected = np.array(getattr(cache, name)).reshape(SLOTS, N, -1)
        for at in np.ndindex(slots.shape):
            if 0 <= slots[at] < SLOTS:
                expected[slots[at]] = new[name][at].astype(expected.dtype)
        actual = getattr(written, name)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(bits(actual), bits(expected).reshape(bits(actual).shape))
    if dtype == FLOAT8:
        np.testing.assert_array_equal(written.scale, cache.scale)


@on_both_forms
@pytest.mark.parametrize("slot", [-1, -3, -SLOTS, SLOTS, SLOTS + 1, 2**31 - 1, -(2**31)])
def test_slots_outside_write_nothing(form, slot):
    cache = poisoned(form)
    written = jax.jit(form.write)(cache, jnp.full((3,), slot), *rows(3))
    for actual, before in zip(written, cache, strict=True):
        if before is not None:
            np.testing.assert_array_equal(bits(actual), bits(before))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_float32_rows_are_rounded_once(dtype):
    k, v = rows(5)
    cache = poisoned(KVCache, dtype).write(jnp.arange(5), k, v)
    np.testing.assert_array_equal(cache.k.reshape(SLOTS, N, D)[:5], k.astype(dtype))
    np.testing.assert_array_equal(cache.v.reshape(SLOTS, N, D)[:5], v.astype(dtype))


def test_derivative_of_a_write():
    """Rows that are written have the gradient of their slot, overwritten ones none."""
    cache = poisoned(KVCache)
    k, v = rows(2, 2)
    slots = np.array([[1, 7], [-1, 0]])
    weights = jax.random.normal(jax.random.key(9), cache.k.shape)

    def loss(cache, k):
        return jnp.sum(cache.write(jnp.asarray(slots), k, v).k * weights)

    d_cache, d_k = jax.grad(loss, argnums=(0, 1))(cache, k)
    of_slot = np.array(weights).reshape(SLOTS, N, D)
    np.testing.assert_array_equal(d_k, np.where(slots[..., None, None] < 0, 0, of_slot[slots]))
    of_slot[[0, 1, 7]] = 0
    np.testing.assert_array_equal(d_cache.k, of_slot.reshape(cache.k.shape))
    np.testing.assert_array_equal(d_cache.v, 0)
    tangent = jax.jvp(lambda k: loss(cache, k), (k,), (k,))[1]
    assert float(tangent) == pytest.approx(float(jnp.sum(d_k * k)), rel=1e-5)


@on_both_forms
@on_every_dtype
def test_a_donated_write_is_in_place(form, dtype):
    converted = dtype == FLOAT8 or (dtype == jnp.bfloat16 and jax.__version__ < "0.11")
    if converted and jax.default_backend() == "cpu":
        pytest.skip(
            "XLA's CPU backend converts the whole cache to update it: float8, and with JAX "
            "0.10 bfloat16"
        )
    cache = poisoned(form, dtype, pages=2, page_size=1024)
    arrays = [a for a in cache if a is not None and a.ndim == 4]
    k, v = rows(2, 1, dtype=jnp.bfloat16 if dtype == FLOAT8 else dtype)
    slots = jnp.array([[0], [1024]])
    step = jax.jit(form.write, donate_argnums=0)
    memory = step.lower(cache, slots, k, v).compile().memory_analysis()
    total = sum(a.nbytes for a in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == total
    assert memory.temp_size_in_bytes < total / 16
    pointers = [a.unsafe_buffer_pointer() for a in arrays]
    written = step(cache, slots, k, v)
    arrays = [a for a in written if a is not None and a.ndim == 4]
    assert [a.unsafe_buffer_pointer() for a in arrays] == pointers


def k_eq_v_heads(tokens, heads, dim, rotary_dim, seed=0):
    """Heads of a K = V layer in float64: (k_norm, v, k), k rotated to a position of its own."""
    rng = np.random.default_rng(seed)
    k_norm = rng.normal(size=dim) * 0.5
    x = rng.normal(size=(tokens, heads, dim)) * rng.uniform(0.1, 10, size=(tokens, heads, 1))
    v = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    positions = rng.integers(0, 10_000, size=tokens)
    return k_norm, v, oracle.rope(v * k_norm, positions, theta=1e4, rotary_dim=rotary_dim)


@pytest.mark.parametrize(("dim", "rotary_dim"), [(512, 128), (32, 8), (16, 2), (16, 14), (16, 16)])
def test_absorbed_queries_give_the_scores_of_whole_keys(dim, rotary_dim):
    tokens, num_q_heads = 7, 6
    k_norm, v, k = k_eq_v_heads(tokens, N, dim, rotary_dim)
    q = np.random.default_rng(1).normal(size=(5, num_q_heads, dim))
    exact = np.einsum("tkgd,skd->tkgs", q.reshape(5, N, -1, dim), k)
    k32, v32, q32 = (jnp.asarray(a, jnp.float32) for a in (k, v, q))
    cache = CompactKVCache(jnp.zeros((1, tokens, N, dim)), jnp.zeros((1, tokens, N, rotary_dim)))
    cache = cache.write(jnp.arange(tokens), k32, v32)
    query = CompactKVCache.query(q32, jnp.asarray(k_norm, jnp.float32), rotary_dim)
    assert query.shape == (5, num_q_heads, dim + rotary_dim)
    scores, parts = 0, np.split(np.asarray(query, np.float64), [dim], axis=-1)
    for part, keys in zip(parts, cache.key_parts, strict=True):
        assert keys.scale is None
        part = part.reshape(5, N, -1, keys.width)
        scores += np.einsum("tkgd,skd->tkgs", part, np.asarray(keys.array[0], np.float64))
    # q, k_norm, their product and v are rounded, each to 2^-24 of itself.
    sizes = np.einsum("tkgd,skd->tkgs", abs(q).reshape(5, N, -1, dim), abs(v)) * abs(k_norm).max()
    assert np.all(abs(scores - exact) <= 4 * 2.0**-24 * sizes)


def test_the_query_of_whole_keys_is_the_query():
    (q, _), k_norm = rows(3), jnp.ones(D)
    assert KVCache.query(q, k_norm, R) is q
    cache = poisoned(KVCache, FLOAT8)
    (keys,) = cache.key_parts
    assert keys.array is cache.k and keys.columns == slice(0, D)
    assert (float(keys.scale), float(cache.value_part.scale)) == (cache.scale[0], cache.scale[1])
    assert cache.value_part.array is cache.v


def heads_of_all_kinds(dim, k_norm):
    """[many, dim]: random ones, and those with all energy in one dim or in one rotating pair."""
    rng = np.random.default_rng(3)
    half, one = dim // 2, np.eye(dim)
    pairs = one[:half] + one[half:]
    # Such that the learned scale makes the two equal: turned by 45 degrees they are one dim.
    balanced = one[:half] / k_norm[:half, None] + one[half:] / k_norm[half:, None]
    kinds = [rng.normal(size=(64, dim)), rng.standard_cauchy(size=(64, dim)), one, -one, pairs]
    return np.concatenate([*kinds, balanced, -balanced]) * 1e3


@everyday("False-64", "True-256")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 256, 512])
@pytest.mark.parametrize("equal_scales", [False, True])
def test_no_head_overflows_float8(dim, dtype, equal_scales):
    k_norm = np.random.default_rng(2).normal(size=dim).astype(np.float32)
    k_norm[dim // 3] = -5
    if equal_scales:
        k_norm[:] = -1.3
    scale = float8_scale(jnp.asarray(k_norm))
    assert scale.shape == (2,)
    assert scale.dtype == jnp.float32
    assert float(scale.min()) > 0
    v = jnp.asarray(oracle.rms_norm(heads_of_all_kinds(dim, k_norm), eps=1e-6), jnp.float32)
    degrees = np.repeat([0, 45, 90, 225], len(v))
    v = jnp.tile(v, (4, 1))
    angle = jnp.asarray(np.deg2rad(degrees), jnp.float32)[:, None] * jnp.ones(dim // 2)
    k = apply_rope((v * k_norm)[:, None], jnp.cos(angle), jnp.sin(angle))
    empty = jnp.zeros((1, len(v), 1, dim), FLOAT8)
    cache = KVCache(empty, empty, scale)
    cache = cache.write(jnp.arange(len(v)), k.astype(dtype), v[:, None].astype(dtype))
    k, v = (np.asarray(a, np.float32)[0] for a in (cache.k, cache.v))
    assert np.isfinite(v).all()
    assert np.isfinite(k).all()
    assert abs(v).max() == 448
    for turn in (0, 90) if not equal_scales else (0, 45, 90, 225):
        assert abs(k[degrees == turn]).max() == 448


def test_float8_keys_of_zero_stay_zero():
    scale = float8_scale(jnp.zeros(D))
    assert bool(jnp.isfinite(scale).all())
    k, v = jnp.zeros((1, N, D)), rows(1)[1]
    written = poisoned(KVCache, FLOAT8)._replace(scale=scale).write(jnp.array([1]), k, v)
    np.testing.assert_array_equal(written.k.reshape(SLOTS, N, D)[1].astype(jnp.float32), 0)


@on_both_forms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_float8_reads_back_what_was_written(form, dtype):
    """To half a unit in the last of its 3 bits, or half its smallest number, 2^-9."""
    scale = jnp.array([0.013, 0.007])
    k, v = rows(SLOTS) * jnp.exp(jax.random.normal(jax.random.key(4), (SLOTS, N, D)) * 3)
    k, v = (a.clip(-448 * s, 448 * s).astype(dtype) for a, s in zip((k, v), scale, strict=True))
    cache = poisoned(form, FLOAT8)._replace(scale=scale).write(jnp.arange(SLOTS), k, v)
    keys, values = cache.key_parts[-1], cache.value_part
    assert float(keys.scale) == float(scale[0])
    assert float(cache.value_part.scale) == float(scale[1])
    k = np.asarray(k, np.float64)
    pairs = [
        (keys.array, keys.scale, k if form is KVCache else band(k)),
        (values.array, values.scale, np.asarray(v, np.float64)),
    ]
    for array, array_scale, exact in pairs:
        array_scale = float(array_scale)
        read = np.asarray(array, np.float64).reshape(exact.shape) * array_scale
        # And 2^-20 for the division in float32.
        bound = np.maximum(abs(exact) * 2.0**-4, 2.0**-10 * array_scale) * (1 + 2.0**-20)
        assert np.all(abs(read - exact) <= bound)
        assert np.any(abs(read - exact) > bound / 2)


GEMMA_31B = Gemma4Config.preset("gemma-4-31b")
FULL_31B, SLIDING_31B = GEMMA_31B.attention_spec(5), GEMMA_31B.attention_spec(0)


@pytest.mark.parametrize(
    ("spec", "form", "dtype", "expected"),
    [
        (FULL_31B, KVCache, jnp.bfloat16, 4 * (512 + 512) * 2),
        (FULL_31B, CompactKVCache, jnp.bfloat16, 4 * (512 + 128) * 2),
        (FULL_31B, KVCache, FLOAT8, 4 * (512 + 512)),
        (FULL_31B, CompactKVCache, FLOAT8, 4 * (512 + 128)),
        (FULL_31B, CompactKVCache, jnp.float32, 4 * (512 + 128) * 4),
        (SLIDING_31B, KVCache, jnp.bfloat16, 16 * 2 * 256 * 2),
        (SLIDING_31B, KVCache, FLOAT8, 16 * 2 * 256),
    ],
)
def test_bytes_per_token_of_31b(spec, form, dtype, expected):
    assert bytes_per_token(spec, form, dtype) == expected
    scale = jnp.ones(2) if dtype == FLOAT8 else None
    cache = zeros(form, spec, num_pages=2, page_size=16, dtype=dtype, scale=scale)
    assert sum(a.nbytes for a in cache if a is not scale) == 2 * 16 * expected


def test_bytes_per_token_are_of_bfloat16_whole_keys_unless_said():
    assert bytes_per_token(FULL_31B) == 8192
    assert bytes_per_token(SLIDING_31B) == 16384


@pytest.mark.parametrize("form", [KVCache, CompactKVCache])
def test_a_shared_layer_takes_no_bytes(form):
    assert bytes_per_token(KV_SHARED.attention_spec(3), form) == 0


@pytest.mark.parametrize("name", Gemma4Config.preset_names())
def test_bytes_per_token_are_those_of_the_arrays(name):
    config = Gemma4Config.preset(name)
    for spec in {config.attention_spec(layer) for layer in range(config.num_hidden_layers)}:
        if spec.mode is ProjectionMode.Q_ONLY:
            continue
        forms = [KVCache] + [CompactKVCache] * (spec.mode is ProjectionMode.QK_ONLY)
        for form, dtype in itertools.product(forms, DTYPES):
            make = functools.partial(zeros, form, spec, num_pages=3, page_size=16, dtype=dtype)
            if dtype == FLOAT8:
                make = functools.partial(make, scale=jnp.ones(2))
            numbers = sum(math.prod(a.shape) for a in jax.eval_shape(make) if a and a.ndim == 4)
            nbytes = numbers * jnp.dtype(dtype).itemsize
            assert nbytes == 3 * 16 * bytes_per_token(spec, form, dtype)


@pytest.mark.parametrize("tokens", [8192, 131_072, 262_144])
def test_model_bytes_of_31b(tokens):
    """50 sliding layers and 10 full ones."""
    config = GEMMA_31B
    assert model_bytes(config, tokens) == (50 * 16384 + 10 * 8192) * tokens
    assert model_bytes(config, tokens, compact=True) == (50 * 16384 + 10 * 5120) * tokens
    ring = Ring(1, 1024, 16).capacity
    assert ring == 1088
    sliding = 50 * 16384 * 1088
    assert model_bytes(config, tokens, ring_capacity=ring) == sliding + 10 * 8192 * tokens
    both = {"compact": True, "ring_capacity": ring}
    assert model_bytes(config, tokens, **both) == sliding + 10 * 5120 * tokens
    half = (sliding + 10 * 5120 * tokens) // 2
    assert model_bytes(config, tokens, **both, dtype=FLOAT8) == half
    assert model_bytes(config, tokens, dtype=jnp.float32) == 2 * model_bytes(config, tokens)


def test_model_bytes_of_a_model_with_shared_layers():
    """E2B: of 35 layers the last 20 are shared; of the other 15 every fifth is full. K is not V."""
    config = Gemma4Config.preset("gemma-4-e2b")
    per_token = 12 * 2 * 256 * 2 + 3 * 2 * 512 * 2
    assert model_bytes(config, 1000) == model_bytes(config, 1000, compact=True) == per_token * 1000
    for tokens in (100, 1000):  # a ring is there in full from the first token
        ring = model_bytes(config, tokens, ring_capacity=576)
        assert ring == 12 * 2 * 256 * 2 * 576 + 3 * 2 * 512 * 2 * tokens


def test_negative_numbers_of_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens is -1"):
        model_bytes(GEMMA_31B, -1)
    with pytest.raises(ValueError, match="ring_capacity is -64"):
        model_bytes(GEMMA_31B, 1, ring_capacity=-64)
    assert model_bytes(GEMMA_31B, 0) == 0


def test_zeros():
    spec = K_EQ_V.attention_spec(1)
    cache = zeros(KVCache, spec, num_pages=3, page_size=16, dtype=jnp.bfloat16)
    assert cache.k.shape == cache.v.shape == (3, 16, 1, 32)
    scale = float8_scale(jnp.ones(32))
    cache = zeros(CompactKVCache, spec, num_pages=3, page_size=16, dtype=FLOAT8, scale=scale)
    assert (cache.v.shape, cache.k_rot.shape) == ((3, 16, 1, 32), (3, 16, 1, 8))
    assert cache.scale is scale
    for array in (cache.v, cache.k_rot):
        assert array.dtype == FLOAT8
        np.testing.assert_array_equal(bits(array), 0)


ROPE = K_EQ_V.rope_parameters
NO_ROPE = {
    "full_attention": ROPE["full_attention"] | {"partial_rotary_factor": 0},
    "sliding_attention": ROPE["sliding_attention"],
}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (K_EQ_V.attention_spec(0), "QKV_FULL layers have none such. Accepted: QK_ONLY layers, or"),
        (KV_SHARED.attention_spec(1), "CompactKVCache holds one projection as K and V; QKV_FULL"),
        (
            dataclasses.replace(K_EQ_V, rope_parameters=NO_ROPE).attention_spec(1),
            "rotary_dim is 0; CompactKVCache accepts 2 or more",
        ),
    ],
)
def test_layers_that_no_compact_cache_is_for(spec, message):
    for refused in (
        lambda: CompactKVCache.widths(spec),
        lambda: zeros(CompactKVCache, spec, num_pages=1, page_size=16, dtype=jnp.float32),
        lambda: bytes_per_token(spec, CompactKVCache),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_float8_and_its_scale_come_together():
    make = functools.partial(zeros, KVCache, K_EQ_V.attention_spec(1), num_pages=1, page_size=16)
    with pytest.raises(ValueError, match="dtype is float8_e4m3fn and scale is missing"):
        make(dtype=FLOAT8)
    with pytest.raises(ValueError, match="dtype is bfloat16 and scale is given"):
        make(dtype=jnp.bfloat16, scale=jnp.ones(2))


@pytest.mark.parametrize("form", [dict, None, "compact"])
def test_what_is_no_form_is_refused(form):
    spec = K_EQ_V.attention_spec(1)
    for refused in (
        lambda: zeros(form, spec, num_pages=1, page_size=16, dtype=jnp.float32),
        lambda: bytes_per_token(spec, form),
    ):
        with pytest.raises(ValueError, match=r"form is .*"):
            refused()


def test_a_compact_cache_of_a_shared_layer_is_refused():
    spec = KV_SHARED.attention_spec(3)
    with pytest.raises(ValueError, match="Q_ONLY layers have none such"):
        zeros(CompactKVCache, spec, num_pages=1, page_size=16, dtype=jnp.float32)
