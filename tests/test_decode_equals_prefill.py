"""Decode, step by step, gives what a prefill of the same tokens gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import CompactKVCache, Contiguous, Gemma4Attention, Gemma4Config, KVCache
from tests.everyday import everyday
from tests.ops.kernel import kernel_of
from tests.test_attention import K_EQ_V, KV_SHARED

PRESETS = {name: Gemma4Config.preset(name) for name in ("gemma-4-e2b", "gemma-4-12b")}
SMALL = {"k_eq_v": K_EQ_V, "kv_shared": KV_SHARED}
CASES = [
    ("k_eq_v", 0, KVCache),
    ("k_eq_v", 1, KVCache),
    ("k_eq_v", 1, CompactKVCache),
    ("kv_shared", 1, KVCache),
    ("kv_shared", 2, KVCache),
    ("kv_shared", 3, KVCache),
]
REAL_CASES = [
    ("gemma-4-12b", 0, KVCache),
    ("gemma-4-12b", 5, KVCache),
    ("gemma-4-12b", 5, CompactKVCache),
    ("gemma-4-e2b", 15, KVCache),
    ("gemma-4-e2b", 19, KVCache),
]


def prefill_and_decode(config, layer, form, batch, tokens, implementation):
    """Outputs of both, float32 [B, T, E]."""
    make = functools.partial(
        Gemma4Attention,
        config,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        implementation=implementation,
    )
    attention = make(layer, rngs=nnx.Rngs(0))
    # Scores of normalised queries and keys have the deviation sqrt(D); here 1, as trained ones.
    attention.q_norm[...] *= attention.spec.head_dim**-0.5
    x = jax.random.normal(jax.random.key(0), (batch, tokens, config.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    producer = attention
    if attention.spec.kv_layer != layer:
        producer = make(attention.spec.kv_layer, rngs=nnx.Rngs(1))
    cache = producer.init_cache(Contiguous(batch, tokens), form)
    if producer is not attention:
        _, cache = producer(x, positions, cache)
    graph, params = nnx.split(attention)

    @jax.jit
    def prefill(params, cache):
        return nnx.merge(graph, params)(x, positions, cache)[0]

    @jax.jit
    def decode(params, cache):
        def step(cache, t):
            token = jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
            y, cache = nnx.merge(graph, params)(token, jnp.full((batch, 1), t), cache)
            return cache, y[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(tokens))[1].swapaxes(0, 1)

    with jax.default_matmul_precision("highest"):
        return np.asarray(prefill(params, cache)), np.asarray(decode(params, cache))


@everyday("k_eq_v-1-CompactKVCache-None", "kv_shared-2-KVCache-None", "k_eq_v-0-KVCache-None")
@pytest.mark.parametrize(
    "implementation",
    [None, *kernel_of("qkv_norm_rope_write", "decode_attention", "prefill_attention")],
)
@pytest.mark.parametrize(("config", "layer", "form"), CASES)
def test_past_four_windows(config, layer, form, implementation):
    prefill, decode = prefill_and_decode(SMALL[config], layer, form, 2, 23, implementation)
    np.testing.assert_allclose(decode, prefill, rtol=0, atol=1e-5)


@pytest.mark.gpu("qkv_norm_rope_write", "decode_attention", "prefill_attention")
@pytest.mark.parametrize(("config", "layer", "form"), REAL_CASES)
def test_real_layers_past_two_windows(config, layer, form):
    prefill, decode = prefill_and_decode(PRESETS[config], layer, form, 1, 2100, "triton")
    assert PRESETS[config].attention_spec(0).sliding_window * 2 < 2100
    np.testing.assert_allclose(decode, prefill, rtol=0, atol=1e-4 * np.abs(prefill).max())
