"""The decoder's step compiled for a GPU that is not there: what it launches, what it copies."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from g4attn_jax import (
    CompactKVCache,
    Contiguous,
    Gemma4Config,
    Gemma4Decoder,
    KVCache,
    Ring,
    split_weights,
)
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches, entry_opcodes
from tests.everyday import everyday

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

on_every_gpu = pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)
BATCH = 8


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled_step(model, layers, tokens):
    config = Gemma4Config.preset(model).truncated(layers)
    decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
    merge, weights = split_weights(decoder)
    layouts = {
        "full_attention": Contiguous(BATCH, 4096),
        "sliding_attention": Ring(BATCH, config.sliding_window, tokens),
    }
    forms = {"full_attention": CompactKVCache if config.attention_k_eq_v else KVCache}
    layouts, forms = ({t: of[t] for t in of if t in config.layer_types} for of in (layouts, forms))
    cache = jax.eval_shape(lambda weights: merge(weights).init_cache(layouts, forms), weights)

    def step(weights, tokens, positions, cache):
        decoder = merge(weights)
        logits, cache = decoder(tokens, decoder.plan(positions, cache), cache)
        return jnp.argmax(logits[:, -1], axis=-1), cache

    token = struct(BATCH, tokens, dtype=jnp.int32)
    compiled = gpu_target.compile_for("9.0", step, weights, token, token, cache, donate_argnums=3)
    return compiled, cache


NAMES = ("linear", "geglu", "norm_rope", "decode_attention", "add_rms_norm", "grouped_matmul")


@everyday("gemma-4-31b-6-of_a_layer0-1")
@pytest.mark.parametrize(
    ("model", "layers", "of_a_layer", "around"),
    [
        # QKV, output and down projection; gate and up; prologue; attention; two sums.
        ("gemma-4-31b", 6, (3, 1, 1, 1, 2, 0), 1),
        # Two matmuls more, of the per-layer input, whose gate XLA makes, and a third sum; once a
        # step the projection to the per-layer inputs of these five layers.
        ("gemma-4-e2b", 5, (5 + 1 / 5, 1, 1, 1, 3, 0), 2),
        # Beside them the router in two launches, the experts' gated products, and the sum of both
        # branches.
        ("gemma-4-26b-a4b", 6, (3, 1, 1, 1, 1, 1), 3),
    ],
)
def test_a_step_of_the_decoder(model, layers, of_a_layer, around):
    """A kernel for everything that a layer does; `around` bounds what XLA adds to a layer."""
    compiled, cache = compiled_step(model, layers, tokens=1)
    text = compiled.as_text()
    counts = tuple(count_launches(text, name) / layers for name in NAMES)
    assert counts == of_a_layer
    opcodes = entry_opcodes(compiled)
    others = sum(opcodes[name] for name in set(opcodes) - FREE_OPCODES)
    others -= layers * sum(of_a_layer) + count_launches(text, "combine_splits")
    others -= count_launches(text, "grouped_gated_matmul")
    assert others <= 12 + around * layers  # 12: embedding, plans of both layer types, head
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < 32 * 2**20


@everyday()
def test_a_chunk_of_a_prompt_leaves_matmuls_to_xla():
    compiled, _ = compiled_step("gemma-4-31b", 6, tokens=64)
    counts = {
        name: count_launches(compiled.as_text(), name) for name in (*NAMES, "prefill_attention")
    }
    assert counts == dict.fromkeys(NAMES, 0) | {
        "norm_rope": 6, "add_rms_norm": 12, "prefill_attention": 6,
    }  # fmt: skip
