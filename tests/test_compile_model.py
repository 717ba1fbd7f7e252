"""The decoder's step compiled for a GPU that is not there: what it launches, what it copies."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from g4attn_jax import CompactKVCache, Contiguous, Gemma4Config, Gemma4Decoder, KVCache, Ring, ops
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches, entry_opcodes

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

on_every_gpu = pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)
BATCH = 8


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def opcodes_of(gpu, f, *arguments):
    opcodes = entry_opcodes(gpu_target.compile_for(gpu, f, *arguments))
    return {name: count for name, count in opcodes.items() if name not in FREE_OPCODES}


@on_every_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tokens", [1, 64])
def test_matmuls_of_few_tokens_are_one_launch(gpu, tokens, dtype):
    x = struct(tokens, 1, 5376, dtype=dtype)
    for f, w in [
        (ops.linear, (5376, 16384)),
        (ops.linear_partial_sums, (5376, 5376)),
        (ops.geglu, (5376, 2, 21504)),
    ]:
        assert opcodes_of(gpu, f, x, struct(*w, dtype=dtype)) == {"custom-call": 1}
    # Tiles that are not whole: 26B-A4B's dense MLP.
    x, w = struct(tokens, 2112, dtype=dtype), struct(2112, 2816, dtype=dtype)
    assert opcodes_of(gpu, ops.linear_partial_sums, x, w) == {"custom-call": 1}


@on_every_gpu
@pytest.mark.parametrize("parts", [None, 3])
def test_residual_sum_and_norms_are_one_launch(gpu, parts):
    y = struct(8, 5376) if parts is None else struct(parts, 8, 5376, dtype=jnp.float32)
    arguments = struct(8, 5376), y, struct(5376), [struct(5376)] * 2, struct()
    assert opcodes_of(gpu, ops.add_rms_norm, *arguments) == {"custom-call": 1}


def compiled_step(model, layers, tokens):
    config = Gemma4Config.preset(model).truncated(layers)
    decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(decoder)
    layouts = {
        "full_attention": Contiguous(BATCH, 4096),
        "sliding_attention": Ring(BATCH, config.sliding_window, tokens),
    }
    forms = {"full_attention": CompactKVCache if config.attention_k_eq_v else KVCache}
    caches = nnx.eval_shape(
        lambda params: nnx.merge(graph, params).init_caches(layouts, forms), params
    )

    def step(params, tokens, positions, caches):
        logits, caches = nnx.merge(graph, params)(tokens, positions, caches, layouts)
        return jnp.argmax(logits[:, -1], axis=-1), caches

    token = struct(BATCH, tokens, dtype=jnp.int32)
    compiled = gpu_target.compile_for("9.0", step, params, token, token, caches, donate_argnums=3)
    return compiled, caches


NAMES = ("linear", "geglu", "norm_rope", "decode_attention", "add_rms_norm", "grouped_matmul")


@pytest.mark.parametrize(
    ("model", "layers", "of_a_layer", "around"),
    [
        # QKV, output and down projection; gate and up; prologue; attention; two sums.
        ("gemma-4-31b", 6, (3, 1, 1, 1, 2, 0), 1),
        # The narrow dense MLP's gate is XLA's; beside it a router and experts.
        ("gemma-4-26b-a4b", 6, (3, 0, 1, 1, 2, 1), 20),
    ],
)
def test_a_step_of_the_decoder(model, layers, of_a_layer, around):
    """A kernel for everything that a layer does; `around` bounds what XLA adds to a layer."""
    compiled, caches = compiled_step(model, layers, tokens=1)
    text = compiled.as_text()
    counts = tuple(count_launches(text, name) / layers for name in NAMES)
    assert counts == of_a_layer
    opcodes = entry_opcodes(compiled)
    others = sum(opcodes[name] for name in set(opcodes) - FREE_OPCODES)
    others -= layers * sum(of_a_layer) + count_launches(text, "combine_splits")
    others -= count_launches(text, "grouped_gated_matmul")
    assert others <= 12 + around * layers  # 12: embedding, plans of both layer types, head
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < 32 * 2**20


def test_a_chunk_of_a_prompt_leaves_matmuls_to_xla():
    compiled, _ = compiled_step("gemma-4-31b", 6, tokens=64)
    counts = {
        name: count_launches(compiled.as_text(), name) for name in (*NAMES, "prefill_attention")
    }
    assert counts == dict.fromkeys(NAMES, 0) | {
        "norm_rope": 6, "add_rms_norm": 12, "prefill_attention": 6,
    }  # fmt: skip
