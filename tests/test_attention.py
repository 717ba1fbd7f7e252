import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache, ReadableCache, zeros
from g4attn_jax.layout import Contiguous, plan_step
from g4attn_jax.testing import oracle
from tests.everyday import everyday

# Small, with everything: a window shorter than the sequences, K = V in one model, a shared tail in
# the other, G of 2 to 4.
COMMON = {
    "model_type": "gemma4_text",
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 5,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}
K_EQ_V = Gemma4Config.from_hf(
    COMMON
    | {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
    }
)
KV_SHARED = Gemma4Config.from_hf(
    COMMON
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 2,
    }
)
LAYERS = [(K_EQ_V, 0), (K_EQ_V, 1), (KV_SHARED, 1), (KV_SHARED, 2), (KV_SHARED, 3)]
on_every_layer = pytest.mark.parametrize(
    ("config", "layer"), LAYERS, ids=[f"{c.attention_spec(i).mode.name}-{i}" for c, i in LAYERS]
)
B, T = 2, 21


@functools.cache
def build(config_id, layer, dtype=jnp.float32, implementation=None):
    config = {id(K_EQ_V): K_EQ_V, id(KV_SHARED): KV_SHARED}[config_id]
    attention = Gemma4Attention(
        config,
        layer,
        rngs=nnx.Rngs(layer),
        dtype=dtype,
        param_dtype=jnp.float32,
        implementation=implementation,
    )
    keys = jax.random.split(jax.random.key(layer), 2)
    attention.q_norm[...] = 0.5 + 0.2 * jax.random.normal(keys[0], attention.q_norm.shape)
    if attention.k_norm is not None:
        attention.k_norm[...] = 0.5 + 0.2 * jax.random.normal(keys[1], attention.k_norm.shape)
    return attention


def layer_of(config, layer, **kwargs):
    return build(id(config), layer, **kwargs)


def hidden(config, tokens=T, seed=0):
    return jax.random.normal(jax.random.key(seed), (B, tokens, config.hidden_size))


def positions_to(tokens):
    return jnp.broadcast_to(jnp.arange(tokens), (B, tokens))


def weights_of(attention):
    return by_module(nnx.state(attention))


def by_module(state):
    return {path[0]: param[...] for path, param in nnx.to_flat_state(state)}


def full_cache(config, layer, x):
    """The cache the layer reads once all of x went through its producer; its own if empty."""
    attention = layer_of(config, layer)
    producer = attention.spec.kv_layer
    if producer == layer:
        return attention.init_cache(Contiguous(B, x.shape[1]))
    return layer_of(config, producer)(x, positions_to(x.shape[1]))[1]


def expected(config, layer, x):
    attention = layer_of(config, layer)
    kv = None
    if attention.spec.kv_layer != layer:
        producer = layer_of(config, attention.spec.kv_layer)
        _, kv = oracle.attention(producer.spec, weights_of(producer), x)
    return oracle.attention(attention.spec, weights_of(attention), x, kv)[0]


@everyday("triton_interpret-QK_ONLY-1", "None-QKV_FULL-0")
@on_every_layer
@pytest.mark.parametrize("implementation", [None, "triton_interpret"])
def test_prefill_against_float64(config, layer, implementation):
    attention = layer_of(config, layer, implementation=implementation)
    x = hidden(config)
    y, cache = attention(x, positions_to(T), full_cache(config, layer, x))
    np.testing.assert_allclose(y, expected(config, layer, x), atol=1e-5)
    assert cache.v.shape[:2] == (B, T)


@everyday("triton_interpret-QKV_FULL-0")
@on_every_layer
@pytest.mark.parametrize("implementation", [None, "triton_interpret"])
def test_a_layer_cut_between_its_steps(config, layer, implementation):
    """The projection may also come as partial sums; the result has the layer's dtype."""
    attention = layer_of(config, layer, implementation=implementation)
    x = hidden(config, 3)
    given, positions = full_cache(config, layer, x), positions_to(3)
    qkv = attention.project(x)
    spec = attention.spec
    rows = spec.group_size + spec.mode.num_kv_projections
    assert qkv.shape == (B, 3, spec.num_kv_heads, rows, spec.head_dim)
    sums, cache = attention.partial_sums(x, positions, given)
    noise = jax.random.normal(jax.random.key(1), (2, *qkv.shape))
    for parts in (qkv, jnp.stack([qkv - noise[0], noise[0] - noise[1], noise[1]])):
        o, same_cache = attention.attend(parts, positions, given)
        assert o.shape == (B, 3, spec.num_q_heads, spec.head_dim)
        chex.assert_trees_all_close(same_cache, cache, atol=1e-5)
        np.testing.assert_allclose(attention.o_proj.partial_sums(o), sums, atol=1e-5)
    half = layer_of(config, layer, implementation=implementation, dtype=jnp.bfloat16)
    given = jax.tree.map(lambda a: a.astype(jnp.bfloat16), given)
    o, cache = half.attend(jnp.stack([qkv, noise[0]]), positions, given)
    assert o.dtype == cache.v.dtype == jnp.bfloat16


@pytest.mark.parametrize("tokens", [2, 65])
def test_projection_in_partial_sums(tokens):
    """Kernels share its columns where they are few; XLA, which takes many tokens, does not."""
    config = dataclasses.replace(K_EQ_V, hidden_size=1024)
    kwargs = {"rngs": nnx.Rngs(0), "dtype": jnp.float32, "param_dtype": jnp.float32}
    attention = Gemma4Attention(config, 0, **kwargs)
    x = jax.random.normal(jax.random.key(0), (1, tokens, 1024))
    qkv = attention.project(x)
    assert (qkv.ndim == 6) == (tokens == 2)
    whole = qkv.sum(axis=0) if qkv.ndim == 6 else qkv
    np.testing.assert_allclose(whole, attention.qkv_proj(x), atol=1e-5)
    positions = jnp.arange(tokens)[None]
    by_xla = Gemma4Attention(config, 0, implementation="xla", **kwargs | {"rngs": nnx.Rngs(0)})
    np.testing.assert_allclose(attention(x, positions)[0], by_xla(x, positions)[0], atol=1e-5)


@everyday("chunks2-QK_ONLY-1", "chunks0-QKV_FULL-1", "chunks0-Q_ONLY-2")
@on_every_layer
@pytest.mark.parametrize("chunks", [[1] * T, [9, 4, 1, 1, 6], [17, 4], [3, 18]])
def test_chunks_and_decode_steps_against_float64(config, layer, chunks):
    """Prefill of many tokens, decode of one or a few, past the window, into one cache."""
    attention = layer_of(config, layer)
    x = hidden(config)
    cache, ys, start = full_cache(config, layer, x), [], 0
    step = jax.jit(lambda x, p, c: attention(x, p, c))
    for tokens in chunks:
        chunk = slice(start, start + tokens)
        y, cache = step(x[:, chunk], positions_to(T)[:, chunk], cache)
        ys.append(y)
        start += tokens
    np.testing.assert_allclose(jnp.concatenate(ys, 1), expected(config, layer, x), atol=1e-5)


@everyday()
@on_every_layer
def test_sequences_of_unequal_length(config, layer):
    """Prompts padded to one length, then decode: each as if it were alone and unpadded."""
    attention = layer_of(config, layer)
    x = hidden(config)
    lengths, prompt = (4, 11), 11
    cache = full_cache(config, layer, x)
    positions = jnp.arange(prompt)
    positions = jnp.stack([jnp.where(positions < n, positions, -1) for n in lengths])
    y, cache = attention(x[:, :prompt], positions, cache)
    exact = expected(config, layer, x)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(y[b, :n], exact[b, :n], atol=1e-5)
        np.testing.assert_array_equal(y[b, n:], 0)
    for i in range(5):
        at = jnp.array([[n + i] for n in lengths])
        y, cache = attention(jnp.stack([x[b, at[b]] for b in range(B)]), at, cache)
        for b in range(B):
            np.testing.assert_allclose(y[b, 0], exact[b, at[b, 0]], atol=1e-5)


@everyday()
@on_every_layer
def test_a_sequence_does_not_depend_on_its_batch(config, layer):
    attention = layer_of(config, layer)
    x = hidden(config)
    cache = full_cache(config, layer, x)
    together, _ = attention(x, positions_to(T), cache)
    for b in range(B):
        own = jax.tree.map(lambda array, b=b: array[b : b + 1], cache)
        alone, _ = attention(x[b : b + 1], positions_to(T)[:1], own)
        np.testing.assert_allclose(together[b : b + 1], alone, atol=1e-6)


def test_later_tokens_and_those_before_the_window_are_not_seen():
    x = hidden(K_EQ_V)
    for layer, window in ((0, 5), (1, None)):
        attention = layer_of(K_EQ_V, layer)
        y, _ = attention(x, positions_to(T))
        for changed in (3, 12):
            other, _ = attention(x.at[:, changed].add(1.0), positions_to(T))
            differs = np.any(np.asarray(jnp.abs(other - y)) > 1e-6, axis=(0, 2))
            seen_by = np.arange(T) >= changed
            if window is not None:
                seen_by &= np.arange(T) < changed + window
            np.testing.assert_array_equal(differs, seen_by)


def test_no_cache_is_an_empty_one_for_these_tokens():
    attention = layer_of(K_EQ_V, 1)
    x = hidden(K_EQ_V)
    given = attention(x, positions_to(T), attention.init_cache(Contiguous(B, T)))
    chex.assert_trees_all_equal(attention(x, positions_to(T)), given)


@everyday("QK_ONLY-1")
@on_every_layer
def test_every_gradient_against_the_oracle(config, layer):
    """Along a random direction of each weight and x: the oracle's central difference, float64."""
    attention = layer_of(config, layer)
    x = hidden(config, tokens=7)
    shared = attention.spec.mode is ProjectionMode.Q_ONLY
    cache = full_cache(config, layer, x) if shared else None
    graph, params = nnx.split(attention)
    target = jax.random.normal(jax.random.key(5), x.shape)

    def loss(params, x):
        y, _ = nnx.merge(graph, params)(x, positions_to(7), cache)
        return jnp.sum(y * target)

    kv = None
    if attention.spec.kv_layer != layer:
        producer = layer_of(config, attention.spec.kv_layer)
        _, kv = oracle.attention(producer.spec, weights_of(producer), x)

    def exact(weights):
        weights = dict(weights)
        y, _ = oracle.attention(attention.spec, weights, weights.pop("x"), kv)
        return np.sum(y * np.asarray(target, np.float64))

    d_params, d_x = jax.grad(loss, argnums=(0, 1))(params, x)
    gradients = by_module(d_params) | {"x": d_x}
    values = {k: np.asarray(v, np.float64) for k, v in (weights_of(attention) | {"x": x}).items()}
    step = 1e-5
    for i, (name, value) in enumerate(values.items()):
        direction = np.random.default_rng(i).normal(size=value.shape)
        ahead = exact(values | {name: value + step * direction})
        behind = exact(values | {name: value - step * direction})
        slope = np.sum(np.asarray(gradients[name], np.float64) * direction)
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-3, abs=1e-3), name


@everyday("bfloat16-QK_ONLY-1", "float32-QKV_FULL-0")
@on_every_layer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_donated_decode_step_updates_the_cache_in_place(config, layer, dtype):
    attention = layer_of(config, layer, dtype=dtype)
    spec, capacity = attention.spec, 4096
    graph, params = nnx.split(attention)
    cache = zeros(KVCache, spec, num_pages=B, page_size=capacity, dtype=dtype)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(params, x, positions, cache):
        return nnx.merge(graph, params)(x, positions, cache)

    arguments = params, hidden(config, 1), jnp.zeros((B, 1), jnp.int32)
    memory = step.lower(*arguments, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.k.nbytes + cache.v.nbytes
    # That nothing of its size is made beside it is for the GPU: tests/test_compile_for_gpu.py.
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)]
    _, cache = step(*arguments, cache)
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)] == pointers


def test_training_is_without_a_cache():
    """With one the call is inference only, and says so."""
    attention = layer_of(K_EQ_V, 1)
    x, cache = hidden(K_EQ_V, 3), attention.init_cache(Contiguous(B, 3))
    with pytest.raises(NotImplementedError, match="has no derivative; accepted: no cache"):
        jax.grad(lambda x: jnp.sum(attention(x, positions_to(3), cache)[0]))(x)


def test_float8_storage_of_a_layer():
    """Prefill and decode with either form in float8, within what its 3 bits of mantissa give."""
    attention = layer_of(K_EQ_V, 1)
    x = hidden(K_EQ_V)
    exact = expected(K_EQ_V, 1, x)
    for form in (KVCache, CompactKVCache):
        cache = attention.init_cache(Contiguous(B, T), form, dtype=FLOAT8)
        prompt, last = slice(T - 1), slice(T - 1, T)
        y, cache = attention(x[:, prompt], positions_to(T)[:, prompt], cache)
        y_last, cache = attention(x[:, last], positions_to(T)[:, last], cache)
        y = np.concatenate([y, y_last], axis=1)
        assert cache.v.dtype == FLOAT8
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        assert 1e-3 < error < 6e-2, error


class TestCompactForm:
    """K = V layers of 12B's head dims: 512, of which 128 rotate."""

    config = Gemma4Config.from_hf(
        COMMON
        | {
            "hidden_size": 64,
            "global_head_dim": 512,
            "num_hidden_layers": 1,
            "layer_types": ["full_attention"],
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 0,
        }
    )

    def layer(self, dtype):
        attention = Gemma4Attention(
            self.config, 0, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.bfloat16
        )
        keys = jax.random.split(jax.random.key(3), 2)
        # Scores of order 1, as trained scales give, and scales that differ from dim to dim.
        attention.q_norm[...] = 0.04 * (1 + 0.3 * jax.random.normal(keys[0], 512))
        attention.k_norm[...] = 1 + 0.3 * jax.random.normal(keys[1], 512)
        return attention

    def outputs(self, dtype, tokens=64):
        """(separate, compact), each prefill and decode steps of [2, tokens]."""
        attention = self.layer(dtype)
        x = jax.random.normal(jax.random.key(1), (2, tokens, 64)).astype(jnp.bfloat16)
        positions = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
        results = []
        for form in (KVCache, CompactKVCache):
            cache, ys = attention.init_cache(Contiguous(2, tokens), form), []
            for start, stop in ((0, 32), (32, 48), (48, tokens)):
                y, cache = attention(x[:, start:stop], positions[:, start:stop], cache)
                ys.append(y)
            results.append(np.asarray(jnp.concatenate(ys, axis=1)))
        exact, _ = oracle.attention(attention.spec, weights_of(attention), x)
        return results, exact

    def test_equals_the_separate_form(self):
        with jax.default_matmul_precision("highest"):
            (separate, compact), exact = self.outputs(jnp.float32)
        np.testing.assert_allclose(compact, separate, atol=2e-5)
        np.testing.assert_allclose(compact, exact, atol=2e-5)

    @everyday()
    def test_bfloat16_errors_side_by_side(self):
        (separate, compact), exact = self.outputs(jnp.bfloat16)
        errors = [np.asarray(y).astype(np.float64) - exact for y in (separate, compact)]
        rms = [np.sqrt(np.mean(e**2)) for e in errors]
        largest = [np.max(np.abs(e)) for e in errors]
        assert rms[1] <= 1.25 * rms[0], rms
        assert largest[1] <= 1.25 * largest[0], largest


def test_linen_bridge():
    x, positions = hidden(K_EQ_V), positions_to(T)
    module = nnx.bridge.to_linen(
        Gemma4Attention, K_EQ_V, 1, dtype=jnp.float32, param_dtype=jnp.float32
    )
    variables = module.init(jax.random.key(0), x, positions)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "qkv_proj": {"weight": (48, 1, 5, 32)},
        "o_proj": {"weight": (4, 32, 48)},
        "q_norm": (32,),
        "k_norm": (32,),
    }
    y, cache = jax.jit(module.apply)(variables, x, positions)
    params = variables["params"]
    weights = params | {name: params[name]["weight"] for name in ("qkv_proj", "o_proj")}
    exact, _ = oracle.attention(K_EQ_V.attention_spec(1), weights, x)
    np.testing.assert_allclose(y, exact, atol=1e-5)
    again, _ = module.apply(variables, x[:, -1:], positions[:, -1:], cache)
    np.testing.assert_allclose(again, exact[:, -1:], atol=1e-5)


def test_positions_past_the_capacity():
    attention = layer_of(K_EQ_V, 0)
    x = hidden(K_EQ_V, 2)
    cache = attention.init_cache(Contiguous(B, 4))
    for positions, given in (([3, 4], 4), ([0, 99], 99)):
        message = f"positions has {given}, for which sequence 0 has no slot"
        with pytest.raises(ValueError, match=message):
            attention(x, jnp.array([positions] * B), cache)
    with pytest.raises(ValueError, match=r"positions has -2"):
        attention(x, jnp.array([[0, -2]] * B), cache)
    with pytest.raises(ValueError, match=r"has 3 in sequence 1 and 3 in sequence 1, .* same slot"):
        attention(x, jnp.array([[0, 1], [3, 3]]), cache)
    # Unknown under jit: nothing is written, and the output says so.
    y, written = jax.jit(lambda x, p, c: attention(x, p, c))(x, jnp.array([[3, 4]] * B), cache)
    assert bool(jnp.isfinite(y[:, 0]).all())
    assert bool(jnp.isnan(y[:, 1]).all())
    np.testing.assert_array_equal(written.k[:, :3], 0)


def test_positions_that_int32_does_not_hold():
    attention = layer_of(K_EQ_V, 0)
    x, cache = hidden(K_EQ_V, 2), attention.init_cache(Contiguous(B, 4))
    far = np.array([[2**32, 2**32 + 1]] * B)
    with pytest.raises(ValueError, match="positions has 4294967296, for which sequence 0"):
        attention(x, far, cache)
    with jax.enable_x64(True):
        y, written = jax.jit(lambda x, p, c: attention(x, p, c))(x, far, cache)
    assert bool(jnp.isnan(y).all())
    np.testing.assert_array_equal(written.k, 0)


def test_positions_of_any_integer_dtype():
    attention = layer_of(K_EQ_V, 0)
    x, cache = hidden(K_EQ_V, 3), attention.init_cache(Contiguous(B, 300))
    expected, _ = attention(x, positions_to(3), cache)
    for dtype in (np.int8, np.int16, np.int64):
        y, _ = attention(x, np.asarray(positions_to(3), dtype), cache)
        np.testing.assert_array_equal(y, expected)


def kv_cache(*shape, dtype=jnp.float32, scale=None):
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale)


class TestBadInput:
    attention = layer_of(K_EQ_V, 1)

    def call(self, **changes):
        arguments = {
            "x": hidden(K_EQ_V, 3),
            "positions": positions_to(3),
            "cache": self.attention.init_cache(Contiguous(B, 8)),
        }
        return self.attention(**(arguments | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": jnp.zeros((B, 3, 47))}, r"x has shape \(2, 3, 47\).*\[B, T, 48\]"),
            ({"x": jnp.zeros((B, 48))}, r"x has shape \(2, 48\)"),
            ({"x": jnp.zeros((B, 3, 48), int)}, "x has .* int32"),
            ({"positions": jnp.arange(3)}, r"positions has shape \(3,\); accepted: \(2, 3\)"),
            ({"positions": jnp.zeros((B, 3))}, "positions has dtype float32"),
            ({"cache": (1, 2)}, "cache is a tuple"),
            (
                {"cache": kv_cache(B, 8, 2, 32)},
                r"cache.k has shape \(2, 8, 2, 32\)",
            ),
            ({"cache": kv_cache(3, 8, 1, 32)}, r"cache.v has shape"),
            ({"cache": kv_cache(B, 8, 1, 32, dtype=jnp.int8)}, "cache.k is .* of dtype int8; acc"),
            ({"cache": kv_cache(B, 8, 1, 32, dtype=FLOAT8)}, "together with cache.scale"),
            (
                {"cache": kv_cache(B, 8, 1, 32, dtype=FLOAT8, scale=jnp.ones(3))},
                r"cache.scale has shape \(3,\)",
            ),
            (
                {"cache": KVCache(None, None)},
                "cache.k is a NoneType of dtype None",
            ),
            (
                {"x": jnp.zeros((B, 0, 48)), "positions": positions_to(0), "cache": None},
                "x has sha",
            ),
            (
                {"cache": KVCache(jnp.zeros((B, 8, 1, 32)), jnp.zeros((B, 9, 1, 32)))},
                r"the arrays of cache have .*'k': \(2, 8, 1\), 'v': \(2, 9, 1\)",
            ),
            (
                {"cache": CompactKVCache(jnp.zeros((B, 8, 1, 32)), jnp.zeros((B, 8, 1, 32)))},
                r"cache.k_rot has shape \(2, 8, 1, 32\)",
            ),
            (
                {"cache": ReadableCache(kv_cache(B, 8, 1, 32), jnp.ones(32))},
                "cache is a ReadableCache; layer 1 is QK_ONLY",
            ),
            (
                {
                    "positions": plan_step(
                        K_EQ_V.attention_spec(0), positions_to(3), Contiguous(B, 8)
                    )
                },
                "the plan is for layers of LayerType.*; layer 1 is of LayerType",
            ),
            (
                {
                    "positions": plan_step(
                        K_EQ_V.attention_spec(1), positions_to(2), Contiguous(B, 8)
                    )
                },
                r"plan\.positions has shape \(2, 2\); accepted: \(2, 3\)",
            ),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.call(**changes)

    @pytest.mark.parametrize(
        ("qkv", "message"),
        [
            (jnp.zeros((B, 3, 1, 5, 31)), r"qkv has shape \(2, 3, 1, 5, 31\).*\[B, T, 1, 5, 32\]"),
            (jnp.zeros((B, 3, 1, 5, 32), jnp.bfloat16), "qkv has dtype bfloat16"),
            (jnp.zeros((2, 1, B, 3, 1, 5, 32)), "partial sums, B, T, 1, 5, 32"),
            (jnp.zeros((0, B, 3, 1, 5, 32)), "one or more partial sums"),
            (jnp.zeros((2, B, 3, 1, 5, 32), int), "qkv has dtype int32"),
        ],
    )
    def test_refused_projections(self, qkv, message):
        with pytest.raises(ValueError, match=message):
            self.attention.attend(qkv, positions_to(3), self.attention.init_cache(Contiguous(B, 8)))

    @pytest.mark.parametrize("shape", [(0, 3, 1, 5, 32), (B, 0, 1, 5, 32), (2, 0, 3, 1, 5, 32)])
    def test_a_projection_of_no_tokens_without_a_cache(self, shape):
        tokens = shape[-5:-3]
        with pytest.raises(ValueError, match=f"qkv has shape {re.escape(str(shape))}"):
            self.attention.attend(jnp.zeros(shape), jnp.zeros(tokens, jnp.int32))

    def test_a_shared_layer_needs_its_producers_cache(self):
        attention = layer_of(KV_SHARED, 3)
        with pytest.raises(ValueError, match="layer 3 is Q_ONLY: it reads the cache of layer 1"):
            attention(hidden(KV_SHARED, 3), positions_to(3))
        with pytest.raises(ValueError, match="layer 3 is Q_ONLY"):
            attention.init_cache(Contiguous(1, 8))

    def test_caches_that_a_layer_cannot_have(self):
        with pytest.raises(ValueError, match="capacity is 0"):
            Contiguous(1, 0)
        with pytest.raises(ValueError, match="dtype is bfloat16"):
            self.attention.init_cache(Contiguous(1, 8), dtype=jnp.bfloat16)
        with pytest.raises(ValueError, match=r"CompactKVCache .* QKV_FULL layers have none such"):
            layer_of(K_EQ_V, 0).init_cache(Contiguous(1, 8), CompactKVCache)

    def test_dtypes(self):
        for name in ("dtype", "param_dtype"):
            with pytest.raises(ValueError, match=f"{name} has dtype .*"):
                Gemma4Attention(K_EQ_V, 0, rngs=nnx.Rngs(0), **{name: jnp.int32})

    def test_implementation(self):
        with pytest.raises(ValueError, match="implementation is 'gpu'"):
            Gemma4Attention(K_EQ_V, 0, rngs=nnx.Rngs(0), implementation="gpu")
        if jax.default_backend() != "gpu":
            with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
                Gemma4Attention(K_EQ_V, 0, rngs=nnx.Rngs(0), implementation="triton")


class TestLoadHf:
    def state_dict(self, config, layer):
        spec, embed = config.attention_spec(layer), config.hidden_size
        rng = np.random.default_rng(layer)
        state = {
            "q_proj.weight": (spec.num_q_heads * spec.head_dim, embed),
            "o_proj.weight": (embed, spec.num_q_heads * spec.head_dim),
            "q_norm.weight": (spec.head_dim,),
        }
        kv = (spec.num_kv_heads * spec.head_dim, embed)
        if spec.mode is not ProjectionMode.Q_ONLY:
            state |= {"k_proj.weight": kv, "k_norm.weight": (spec.head_dim,)}
        if spec.mode is ProjectionMode.QKV_FULL:
            state["v_proj.weight"] = kv
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in state.items()}

    def new(self, config, layer):
        return Gemma4Attention(
            config, layer, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32
        )

    @on_every_layer
    def test_heads_land_in_their_groups(self, config, layer):
        attention, state = self.new(config, layer), self.state_dict(config, layer)
        attention.load_hf(state)
        spec = attention.spec
        d, group = spec.head_dim, spec.group_size
        packed = np.asarray(attention.qkv_proj.weight[...])
        for head in range(spec.num_q_heads):
            rows = state["q_proj.weight"][head * d : (head + 1) * d]
            np.testing.assert_array_equal(packed[:, head // group, head % group], rows.T)
            columns = state["o_proj.weight"][:, head * d : (head + 1) * d]
            np.testing.assert_array_equal(attention.o_proj.weight[...][head], columns.T)
        names = ["k_proj.weight", "v_proj.weight"][: spec.mode.num_kv_projections]
        for row, name in enumerate(names, start=group):
            for head in range(spec.num_kv_heads):
                rows = state[name][head * d : (head + 1) * d]
                np.testing.assert_array_equal(packed[:, head, row], rows.T)
        np.testing.assert_array_equal(attention.q_norm[...], state["q_norm.weight"])
        if names:
            np.testing.assert_array_equal(attention.k_norm[...], state["k_norm.weight"])

    @on_every_layer
    def test_jax_arrays_and_dtypes(self, config, layer):
        state = self.state_dict(config, layer)
        ours, theirs = self.new(config, layer), self.new(config, layer)
        ours.load_hf({k: jnp.asarray(v, jnp.bfloat16) for k, v in state.items()})
        theirs.load_hf({k: v.astype(jnp.bfloat16) for k, v in state.items()})
        chex.assert_trees_all_equal(nnx.state(ours), nnx.state(theirs))
        assert ours.qkv_proj.weight.dtype == jnp.float32

    @pytest.mark.parametrize(
        ("layer", "changes", "message"),
        [
            (0, {"v_proj.weight": None}, r"lacks v_proj.weight of layer 0 \(QKV_FULL\)"),
            (1, {"q_norm.weight": None}, r"lacks q_norm.weight of layer 1 \(QK_ONLY\)"),
            (
                1,
                {"v_proj.weight": np.ones((32, 48))},
                r"has v_proj.weight; layer 1 \(QK_ONLY\) has",
            ),
            (1, {"q_proj.bias": np.ones(4)}, "has q_proj.bias"),
            (
                1,
                {"k_proj.weight": np.ones((48, 32))},
                r"k_proj.weight has shape \(48, 32\); accept",
            ),
            (1, {"k_norm.weight": np.ones(32, int)}, "k_norm.weight has dtype int.*"),
            (1, {"k_norm.weight": [1.0] * 32}, "k_norm.weight is a list that cannot be read"),
        ],
    )
    def test_wrong_tensors_are_named_and_change_nothing(self, layer, changes, message):
        attention = self.new(K_EQ_V, layer)
        before = jax.tree.map(jnp.copy, nnx.state(attention))
        state = self.state_dict(K_EQ_V, layer) | changes
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            attention.load_hf(state)
        chex.assert_trees_all_equal(nnx.state(attention), before)

    def test_a_shared_layer_has_no_k_or_v(self):
        state = self.state_dict(KV_SHARED, 3) | {"k_norm.weight": np.ones(32, np.float32)}
        with pytest.raises(ValueError, match=r"has k_norm.weight; layer 3 \(Q_ONLY\) has no such"):
            self.new(KV_SHARED, 3).load_hf(state)

    @everyday()
    def test_torch_tensors(self):
        torch = pytest.importorskip("torch")
        state = self.state_dict(K_EQ_V, 1)
        ours, theirs = self.new(K_EQ_V, 1), self.new(K_EQ_V, 1)
        tensors = {k: torch.from_numpy(v).bfloat16() for k, v in state.items()}
        ours.load_hf({k: torch.nn.Parameter(v) for k, v in tensors.items()})
        theirs.load_hf({k: v.astype(jnp.bfloat16) for k, v in state.items()})
        chex.assert_trees_all_equal(nnx.state(ours), nnx.state(theirs))
