"""Weights of a model: names of their axes, products, options; and scopes in a profile."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import AssistantConfig, Gemma4Assistant
from g4attn_jax.checkpoint.loading import parameters
from g4attn_jax.layout import Contiguous
from g4attn_jax.model.linear import (
    Embedding,
    GatedGroupedLinear,
    GatedLinear,
    GroupedLinear,
    Linear,
    ModuleOptions,
)
from g4attn_jax.model.logical_axes import weight_axes
from tests.checkpoint.directories import FIXTURES, abstract, read_config
from tests.everyday import everyday

ASSISTANTS = Path(__file__).parent / "golden_assistant"
OF_EVERY_LAYER = {"qkv_proj", "qkv_norm_rope", "attention", "o_proj", "norms"}
SCOPES = {
    "gemma-4-31b": OF_EVERY_LAYER | {"embed", "mlp/gate_up", "mlp/down", "logits"},
    "gemma-4-26b-a4b": {"moe/router", "moe/experts"},
    "gemma-4-e4b": {"per_layer_inputs", "layer_0/per_layer_input"},
}


def options(dtype=jnp.float32, **changes):
    return ModuleOptions(nnx.Rngs(0), dtype=dtype, param_dtype=jnp.float32, **changes)


def random(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize("name", ["gemma-4-e4b", "gemma-4-26b-a4b"])
def test_every_weight_names_its_axes(name):
    model = abstract(read_config(FIXTURES / name) | {"tie_word_embeddings": False})
    assert_named(model)
    axes = weight_axes(model)
    assert axes["lm_head.weight"] == ("vocab", "embed")
    of_qkv = axes["layers.0.attention.qkv_proj.weight"]
    assert of_qkv == ("embed", "kv_heads", "heads_per_group", "head_dim")


def test_every_weight_of_an_assistant_names_its_axes():
    config = AssistantConfig.from_hf(ASSISTANTS / "gemma-4-e4b" / "config.json")
    assert_named(nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0))))


def assert_named(model):
    """All parameters of several axes are weights, and no name is there twice in one."""
    axes = weight_axes(model)
    for path, variable in parameters(model).items():
        if path in axes:
            assert len(set(axes[path])) == len(axes[path]) == len(variable.shape), path
        else:
            assert len(variable.shape) < 2, path


def test_linear_sums_over_its_inputs():
    linear = Linear({"heads": 3, "head_dim": 4}, {"layers": 2, "per_layer": 5}, options())
    x = random(6, 7, 3, 4)
    exact = np.einsum("abhd,hdlp->ablp", x, linear.weight[...])
    for y in (linear(x), linear.float32(x)):
        np.testing.assert_allclose(y, exact, atol=1e-5)
    sums = linear.partial_sums(x).sum(axis=0)
    np.testing.assert_allclose(sums, exact.reshape(6, 7, 10), atol=1e-5)
    # Uniform, of variance 1 / 12.
    assert np.abs(linear.weight[...]).max() <= math.sqrt(3 / 12)


def test_products_are_of_the_dtype_and_float32_is_not_rounded():
    linear = Linear({"embed": 8}, {"mlp": 16}, options(jnp.bfloat16))
    x = random(2, 8)
    assert linear.weight.dtype == jnp.float32
    assert linear.operand().dtype == linear(x).dtype == jnp.bfloat16
    rounded = (np.asarray(a.astype(jnp.bfloat16), np.float32) for a in (x, linear.weight[...]))
    np.testing.assert_allclose(linear.float32(x), np.matmul(*rounded), rtol=1e-6, atol=1e-6)
    assert linear.float32(x).dtype == jnp.float32


@everyday()
def test_gated_products():
    embed, width, experts = {"embed": 8}, {"mlp": 16}, {"experts": 2}
    gated = GatedLinear(embed, width, options())
    x = random(5, 8)

    def formula(x, w):
        gate, up = np.einsum("te,ecf->ctf", x, w)
        return jax.nn.gelu(gate, approximate=True) * up

    np.testing.assert_allclose(gated(x), formula(x, gated.weight[...]), atol=1e-5)
    grouped = GatedGroupedLinear(experts, embed, width, options())
    down = GroupedLinear(experts, width, embed, options())
    rows = jnp.array([4, 0, 0, 1])
    y = grouped(x, jnp.array([1, 3]), rows)
    halves = [formula(x[rows[i]], grouped.weight[e]) for e, i in ((0, np.s_[:1]), (1, np.s_[1:]))]
    np.testing.assert_allclose(y, np.concatenate(halves), atol=1e-5)
    halves = y[:1] @ down.weight[0], y[1:] @ down.weight[1]
    np.testing.assert_allclose(down(y, jnp.array([1, 3])), np.concatenate(halves), atol=1e-5)


def test_an_embedding_is_scaled_and_its_logits_are_products():
    embedding = Embedding({"vocab": 12}, {"embed": 8}, options())
    tokens = jnp.array([[3, 12, 0]])
    x = embedding(tokens)
    np.testing.assert_allclose(x[0, ::2], embedding.weight[...][jnp.array([3, 0])] * math.sqrt(8))
    assert np.isnan(x[0, 1]).all()
    hidden = random(1, 2, 8)
    logits = embedding.logits(hidden)
    np.testing.assert_allclose(logits, hidden @ embedding.weight[...].T, atol=1e-5)
    chosen = jnp.array([[[5, 2], [0, 11]]])
    np.testing.assert_allclose(
        embedding.logits(hidden, chosen), jnp.take_along_axis(logits, chosen, axis=-1), atol=1e-5
    )


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_options_refuse_other_dtypes(name):
    with pytest.raises(ValueError, match=rf"^{name} has dtype .*int32.*accepted: "):
        ModuleOptions(nnx.Rngs(0), **{name: jnp.int32})


def test_options_refuse_other_implementations():
    with pytest.raises(ValueError, match=r"^implementation is 'cuda'"):
        options(implementation="cuda")


@everyday("gemma-4-31b")
@pytest.mark.parametrize("name", SCOPES)
def test_a_profile_reads_like_the_model(name):
    graph, params = nnx.split(abstract(read_config(FIXTURES / name)))
    lowered = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)).lower(
        params, jax.ShapeDtypeStruct((1, 4), jnp.int32)
    )
    assert_scopes(lowered, SCOPES[name])


def test_a_profile_reads_like_the_assistant():
    config = AssistantConfig.from_hf(ASSISTANTS / "gemma-4-e4b" / "config.json")
    target = abstract(read_config(FIXTURES / "gemma-4-e4b"))
    assistant = nnx.eval_shape(
        lambda: Gemma4Assistant(
            config, rngs=nnx.Rngs(0), dtype=target.dtype, param_dtype=target.dtype
        )
    )
    graph, params = nnx.split((target, assistant))

    def draft(params, embeddings, hidden, position):
        target, assistant = nnx.merge(graph, params)
        layouts = dict.fromkeys(target.config.layer_types, Contiguous(1, 8))
        cache = target.init_cache(layouts)
        step = assistant.plan(position, cache)
        return assistant(embeddings, hidden, step, target.readable(cache))

    width = jax.ShapeDtypeStruct((1, 1, config.backbone_hidden_size), target.dtype)
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    lowered = jax.jit(draft).lower(params, width, width, position)
    assert_scopes(lowered, {"pre_projection", "post_projection", "logits/centroids", "layer_0"})


def assert_scopes(lowered, wanted):
    scopes = " ".join(re.findall(r'loc\("([^"]+)"', lowered.as_text(debug_info=True)))
    for scope in wanted:
        assert f"/{scope}/" in scopes, scope
