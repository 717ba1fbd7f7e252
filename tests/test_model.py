"""Our decoder against Hugging Face's, and against itself."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, Gemma4Config, Gemma4Decoder, Paged, Ring, split_weights
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache
from g4attn_jax.checkpoint import load_hf_into
from g4attn_jax.model import Gemma4MoE, ModuleOptions
from tests.everyday import everyday

GOLDEN = Path(__file__).parent / "golden_model"
MODELS = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
PROMPT, LENGTH = 24, 88  # of make_golden.py; the window is 8
ATOL = 2e-4


@functools.cache
def model_of(name, dtype=jnp.float32):
    """(decoder, fixture)."""
    config = Gemma4Config.from_hf(GOLDEN / name / "config.json")
    abstract = nnx.eval_shape(
        lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )
    decoder, _ = load_hf_into(GOLDEN / name, abstract)
    return decoder, np.load(GOLDEN / name / "golden.npz")


def layouts_of(kind, config, batch=2, max_new_tokens=LENGTH):
    """A layout for each layer type; full layers beside a ring are contiguous."""
    if kind == "paged":
        # Pages from the end of the pool, every other one another's.
        pages = -(-LENGTH // 16)
        table = 2 * (batch * pages - 1 - np.arange(batch * pages)).reshape(batch, pages)
        layout = Paged(2 * batch * pages, 16, jnp.asarray(table, jnp.int32))
        return {"sliding_attention": layout, "full_attention": layout}
    full = Contiguous(batch, LENGTH)
    ring = Ring(batch, config.sliding_window, max_new_tokens)
    return {"sliding_attention": ring if kind == "ring" else full, "full_attention": full}


def page_tables_of(layouts):
    return {key: x.page_table for key, x in layouts.items() if isinstance(x, Paged)}


def step_of(decoder, layouts):
    """The decoder's step, compiled; page tables are constants."""
    merge, weights = split_weights(decoder)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(weights, tokens, positions, cache, logits_at=None):
        with jax.default_matmul_precision("highest"):
            decoder = merge(weights)
            step = decoder.plan(positions, cache, page_tables_of(layouts))
            return decoder(tokens, step, cache, logits_at=logits_at)

    return functools.partial(step, weights)


def decode_of(decoder, layouts):
    """Tokens one by one: those of a prompt, then the likeliest."""
    step = step_of(decoder, layouts)

    @jax.jit
    def decode(prompt, start, cache):
        def one(carry, position):
            token, cache = carry
            given = prompt[:, jnp.minimum(position, prompt.shape[1] - 1)]
            token = jnp.where(position < prompt.shape[1], given, token)
            positions = jnp.broadcast_to(position, token.shape)[:, None]
            logits, cache = step(token[:, None], positions, cache)
            return (jnp.argmax(logits[:, 0], axis=-1), cache), (token, logits[:, 0])

        first = jnp.zeros(prompt.shape[0], jnp.int32)
        steps = start + jnp.arange(LENGTH)
        _, (tokens, logits) = jax.lax.scan(one, (first, cache), steps)
        return tokens.T, logits.swapaxes(0, 1)

    return decode


def positions_to(length, batch=2):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))


def k_eq_v(name):
    return name in ("gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")


CACHES = [
    pytest.param(name, kind, form, id=f"{name}-{kind}-{form.__name__}")
    for name in MODELS
    for kind in ("contiguous", "ring", "paged")
    for form in (KVCache, CompactKVCache)
    if form is KVCache or k_eq_v(name)
]


@everyday(
    "e2b-ring-KVCache",
    "e4b-contiguous-KVCache",
    "12b-paged-CompactKVCache",
    "26b-a4b-contiguous-CompactKVCache",
    "31b-paged-KVCache",
)
@pytest.mark.parametrize(("name", "kind", "form"), CACHES)
def test_every_position_of_a_prompt(name, kind, form):
    decoder, golden = model_of(name)
    layouts = layouts_of(kind, decoder.config)
    cache = decoder.init_cache(layouts, {"full_attention": form})
    logits, _ = step_of(decoder, layouts)(golden["tokens"], positions_to(LENGTH), cache)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=ATOL)


@everyday("e2b-paged-KVCache", "31b-contiguous-CompactKVCache")
@pytest.mark.parametrize(("name", "kind", "form"), CACHES)
def test_every_position_one_by_one_and_greedy_tokens(name, kind, form):
    decoder, golden = model_of(name)
    layouts = layouts_of(kind, decoder.config, max_new_tokens=1)
    cache = decoder.init_cache(layouts, {"full_attention": form})
    decode = decode_of(decoder, layouts)
    tokens, logits = decode(golden["tokens"][:, :PROMPT], 0, cache)
    np.testing.assert_array_equal(tokens, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=ATOL)


@everyday("12b")
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_no_worse_than_hugging_face(name):
    decoder, golden = model_of(name, jnp.bfloat16)
    layouts = layouts_of("ring", decoder.config, max_new_tokens=PROMPT)
    tokens = golden["tokens"][:, :PROMPT]
    logits, cache = step_of(decoder, layouts)(
        tokens, positions_to(PROMPT), decoder.init_cache(layouts)
    )
    assert all(of_layer.v.dtype == jnp.bfloat16 for of_layer in cache.layers)
    exact = golden["logits"][:, :PROMPT].astype(np.float64)
    theirs = golden["logits_bfloat16"].view(jnp.bfloat16).astype(np.float64)
    # Where a rounding gives a token another expert it is far off, and so is one of 48 positions of
    # E2B and of E4B: theirs as ours, by how much is chance.
    shares = (0.25, 0.5) if decoder.config.enable_moe_block else (0.25, 0.5, 0.75, 0.9)
    ours, theirs = (
        np.quantile(np.linalg.norm(x - exact, axis=-1), shares) for x in (logits, theirs)
    )
    assert (ours <= theirs).all()


@everyday("12b")
@pytest.mark.parametrize("name", MODELS)
def test_unequal_prompts_in_chunks_with_padding_anywhere(name):
    """Sequences are alone: each gets the logits of the fixture, whatever the other is doing."""
    decoder, golden = model_of(name)
    layouts = layouts_of("ring", decoder.config, max_new_tokens=20)
    step, cache = step_of(decoder, layouts), decoder.init_cache(layouts)
    seen = np.zeros((2, LENGTH), bool)
    begun = [0, 0]
    # New tokens of each sequence in each step, and where padding goes.
    for lengths, front in (((20, 7), 0), ((3, 20), 1), ((1, 1), 0), ((0, 1), 0), ((1, 0), 1)):
        width = 20 if max(lengths) > 1 else 1
        tokens = np.full((2, width), -1, np.int32)
        positions = np.full((2, width), -1, np.int32)
        where = []
        for row, length in enumerate(lengths):
            at = slice(width - length, width) if front else slice(length)
            positions[row, at] = begun[row] + np.arange(length)
            tokens[row, at] = golden["tokens"][row, begun[row] : begun[row] + length]
            begun[row] += length
            where.append(at)
        logits, cache = step(tokens, positions, cache)
        for row, at in enumerate(where):
            mine = positions[row, at]
            exact = golden["logits"][row, mine]
            np.testing.assert_allclose(logits[row, at], exact, rtol=0, atol=ATOL)
            seen[row, mine] = True
    assert begun == [25, 29] and seen.sum() == 54


@everyday()
@pytest.mark.parametrize(
    ("name", "kind"),
    [(MODELS[0], "contiguous"), (MODELS[0], "paged"), *((name, "ring") for name in MODELS)],
)
def test_logits_at(name, kind):
    """Layers that share K and V see these tokens alone, and nothing else changes."""
    decoder, golden = model_of(name)
    layouts = layouts_of(kind, decoder.config, max_new_tokens=PROMPT)
    tokens, positions = golden["tokens"][:, :PROMPT], positions_to(PROMPT)
    step = step_of(decoder, layouts)
    _, whole = step(tokens, positions, decoder.init_cache(layouts))
    for at in ([[23], [10]], [[3, 17, 5], [23, 0, 0]]):
        logits, cache = step(tokens, positions, decoder.init_cache(layouts), jnp.asarray(at))
        exact = np.take_along_axis(golden["logits"], np.asarray(at)[..., None], axis=1)
        np.testing.assert_allclose(logits, exact, rtol=0, atol=ATOL)
        jax.tree.map(np.testing.assert_array_equal, cache, whole)
    none, cache = step(tokens, positions, decoder.init_cache(layouts), jnp.zeros((2, 0), int))
    assert none.shape == (2, 0, decoder.config.vocab_size)
    jax.tree.map(np.testing.assert_array_equal, cache, whole)


@everyday()
def test_logits_are_of_the_hidden_states():
    decoder, golden = model_of("gemma-4-31b")
    layouts = layouts_of("contiguous", decoder.config)
    cache = decoder.init_cache(layouts)
    step = golden["tokens"][:, :PROMPT], decoder.plan(positions_to(PROMPT), cache), cache
    h, _ = decoder.hidden(*step)
    logits, _ = decoder(*step)
    assert h.shape == (2, PROMPT, decoder.config.hidden_size) and h.dtype == jnp.float32
    np.testing.assert_array_equal(decoder.logits(h), logits)
    # The norm of the last hidden state is that of the final norm's scale.
    scale = np.asarray(decoder.norm[...])
    np.testing.assert_allclose(np.mean(np.square(h / scale), axis=-1), 1, rtol=1e-4)


@everyday()
def test_compact_caches_of_shared_layers_use_the_scale_of_their_producer():
    """No published model has K = V and shared layers; the maths is the same."""
    fields = json.loads((GOLDEN / "gemma-4-12b" / "config.json").read_text())
    config = Gemma4Config.from_hf(fields | {"num_kv_shared_layers": 2})
    decoder = Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    key = jax.random.key(0)
    for layer in decoder.layers[: -config.num_kv_shared_layers]:
        scale = layer.attention.k_norm
        scale[...] = jax.random.uniform(key, scale.shape, minval=0.2, maxval=0.6)
    layouts = layouts_of("contiguous", config)
    tokens = np.arange(2 * PROMPT, dtype=np.int32).reshape(2, PROMPT)
    caches = [
        decoder.init_cache(layouts, {"full_attention": form}) for form in (KVCache, CompactKVCache)
    ]
    logits = [
        decoder(tokens, decoder.plan(positions_to(PROMPT), cache), cache)[0] for cache in caches
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)


@everyday()
def test_caches_are_updated_in_place():
    decoder, golden = model_of("gemma-4-e2b", jnp.bfloat16)
    layouts = layouts_of("ring", decoder.config, max_new_tokens=1)
    merge, weights = split_weights(decoder)
    cache = decoder.init_cache(layouts)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(weights, cache):
        decoder = merge(weights)
        return decoder(golden["tokens"][:, :1], decoder.plan(positions_to(1), cache), cache)

    memory = step.lower(weights, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@everyday()
def test_float8_caches():
    decoder, golden = model_of("gemma-4-e2b", jnp.bfloat16)
    layouts = layouts_of("contiguous", decoder.config)
    cache = decoder.init_cache(layouts, dtype=FLOAT8)
    assert {of_layer.v.dtype for of_layer in cache.layers} == {FLOAT8}
    tokens = golden["tokens"][:, :PROMPT]
    logits, _ = decoder(tokens, decoder.plan(positions_to(PROMPT), cache), cache)
    exact = golden["logits"][:, :PROMPT]
    # K and V of 4 significant bits.
    assert np.linalg.norm(logits - exact) < 0.25 * np.linalg.norm(exact)


@everyday("xla-7", "triton_interpret-7")
@pytest.mark.parametrize("tokens", [7, 100])  # 63 and 900 rows: compared, and sorted
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
def test_experts_are_a_loop_over_tokens(implementation, tokens):
    config = model_of("gemma-4-26b-a4b")[0].config
    moe = Gemma4MoE(config, ModuleOptions(nnx.Rngs(1), jnp.float32, jnp.float32, implementation))
    rng = np.random.default_rng(0)
    moe.router_scale[...] = jnp.asarray(1 + 0.3 * rng.normal(size=moe.router_scale.shape))
    moe.per_expert_scale[...] = jnp.asarray(1 + 0.3 * rng.normal(size=moe.per_expert_scale.shape))
    x, h = rng.normal(size=(2, 3, tokens, config.hidden_size)).astype(np.float32)
    # One token takes the same experts as another, most experts none.
    x[0, 1] = x[0, 0]
    weights = {
        path[0]: np.asarray(param[...], np.float64)
        for path, param in nnx.to_flat_state(nnx.state(moe))
    }
    exact = np.zeros(h.shape)
    for token in np.ndindex(x.shape[:2]):
        r = x[token] / np.sqrt(np.mean(np.square(x[token], dtype=np.float64)) + config.rms_norm_eps)
        scores = (r * weights["router_scale"] / np.sqrt(r.size)) @ weights["router_proj"]
        probabilities = np.exp(scores) / np.exp(scores).sum()
        best = np.argsort(-probabilities)[: config.top_k_experts]
        for expert in best:
            weight = probabilities[expert] / probabilities[best].sum()
            gate, up = np.einsum("e,ecf->cf", h[token], weights["gate_up_proj"][expert])
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            y = (gelu * up) @ weights["down_proj"][expert]
            exact[token] += weight * weights["per_expert_scale"][expert] * y
    with jax.default_matmul_precision("highest"):
        y = moe(jnp.asarray(x), jnp.asarray(h))
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_parameter_tree_can_be_known_without_arrays(name):
    decoder, _ = model_of(name)
    shapes = nnx.eval_shape(
        lambda: Gemma4Decoder(decoder.config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    )
    expected = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(decoder))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(shapes)) == expected


@everyday()
@pytest.mark.parametrize("layers", [1, 6])
def test_a_truncated_model_runs(layers):
    config = Gemma4Config.from_hf(GOLDEN / "gemma-4-e2b" / "config.json").truncated(layers)
    decoder = Gemma4Decoder(config, rngs=nnx.Rngs(0))
    layouts = dict.fromkeys(config.layer_types, Contiguous(2, LENGTH))
    tokens = np.zeros((2, 3), np.int32)
    cache = decoder.init_cache(layouts)
    logits, _ = decoder(tokens, decoder.plan(positions_to(3), cache), cache)
    assert logits.shape == (2, 3, 128) and np.isfinite(logits).all()


def test_a_token_that_is_none_is_loud():
    decoder, _ = model_of("gemma-4-e2b")
    layouts = layouts_of("contiguous", decoder.config)
    tokens = np.array([[5, 128], [5, 6]])  # the last of 128 is 127
    cache = decoder.init_cache(layouts)
    step = tokens, decoder.plan(positions_to(2), cache), cache
    with pytest.raises(ValueError, match="tokens has 128"):
        decoder(*step)
    logits, _ = jax.jit(lambda *step: decoder(*step))(*step)
    assert np.isnan(logits[0, 1]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros((2, 4))}, "tokens .* float64; accepted: integer"),
        ({"tokens": np.zeros(3, int)}, r"tokens .* \(3,\).*\[B, T\]"),
        ({"tokens": np.zeros((2, 4), int)}, r"step.positions .* \(2, 3\).*\(2, 4\)"),
        ({"step": positions_to(3)}, "step is a ndarray"),
        ({"step": None}, "cache is given and step is not"),
        ({"cache": {}}, "cache is a dict"),
        ({"cache": None}, "step is given and cache is not"),
        ({"segment_ids": np.ones((2, 3), int)}, "segment_ids is given with a cache"),
        ({"logits_at": np.zeros((2, 1))}, "logits_at .* float64; accepted: integer"),
        ({"logits_at": np.zeros((3, 1), int)}, r"logits_at .* \(3, 1\).*\[2, n\]"),
    ],
)
def test_a_step_that_makes_no_sense(changes, message):
    decoder, _ = model_of("gemma-4-12b")
    cache = decoder.init_cache(layouts_of("contiguous", decoder.config))
    step = {
        "tokens": np.zeros((2, 3), np.int32),
        "step": decoder.plan(positions_to(3), cache),
        "cache": cache,
    }
    with pytest.raises(ValueError, match=message):
        decoder(**step | changes)


def test_another_models_cache():
    decoder, _ = model_of("gemma-4-12b")
    cache = decoder.init_cache(layouts_of("contiguous", decoder.config))
    step = decoder.plan(positions_to(3), cache)
    with pytest.raises(ValueError, match="cache has 5 layers"):
        decoder(np.zeros((2, 3), int), step, cache._replace(layers=cache.layers[1:]))


def test_a_page_table_is_of_a_step_and_needed():
    decoder, _ = model_of("gemma-4-12b")
    cache = decoder.init_cache(layouts_of("paged", decoder.config))
    assert {layout.page_table for layout in cache.layouts.values()} == {None}
    table = np.arange(12).reshape(2, 6)
    with pytest.raises(ValueError, match="page_tables lacks sliding_attention"):
        decoder.plan(positions_to(3), cache, {"full_attention": table})
    contiguous = decoder.init_cache(layouts_of("contiguous", decoder.config))
    with pytest.raises(ValueError, match="page_tables has 'full_attention'"):
        decoder.plan(positions_to(3), contiguous, {"full_attention": table})


def test_a_step_may_be_planned_outside_of_the_program():
    decoder, golden = model_of("gemma-4-e2b")
    layouts = layouts_of("paged", decoder.config)
    tokens, cache = golden["tokens"][:, :PROMPT], decoder.init_cache(layouts)
    step = decoder.plan(positions_to(PROMPT), cache, page_tables_of(layouts))
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(decoder)(tokens, step, cache)
    np.testing.assert_allclose(logits, golden["logits"][:, :PROMPT], rtol=0, atol=ATOL)


def test_caches_that_make_no_sense():
    decoder, _ = model_of("gemma-4-12b")
    layouts = layouts_of("contiguous", decoder.config)
    with pytest.raises(ValueError, match="layouts lacks full_attention"):
        decoder.init_cache({"sliding_attention": layouts["sliding_attention"]})
    with pytest.raises(ValueError, match="forms has 'full'"):
        decoder.init_cache(layouts, {"full": CompactKVCache})
    with pytest.raises(ValueError, match="CompactKVCache holds one projection as K and V"):
        decoder.init_cache(layouts, {"sliding_attention": CompactKVCache})
    sliding = nnx.eval_shape(lambda: Gemma4Decoder(decoder.config.truncated(1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="layouts has 'full_attention'; accepted: sliding"):
        sliding.init_cache(layouts)


@pytest.mark.parametrize("method", ["plan", "readable"])
def test_a_cache_that_is_none(method):
    decoder, _ = model_of("gemma-4-12b")
    arguments = {"positions": positions_to(3)} if method == "plan" else {}
    with pytest.raises(ValueError, match="cache is a tuple; accepted: ModelCache"):
        getattr(decoder, method)(**arguments, cache=())


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "tie_word_embeddings",
        "intermediate_size",
        "hidden_activation",
        "use_double_wide_mlp",
        "hidden_size_per_layer_input",
        "vocab_size_per_layer_input",
        "enable_moe_block",
    ],
)
def test_a_config_of_attention_alone_is_refused(field):
    whole = Gemma4Config.from_hf(GOLDEN / "gemma-4-e2b" / "config.json")
    with pytest.raises(ValueError, match=f"^{field} is missing from the config"):
        Gemma4Decoder(dataclasses.replace(whole, **{field: None}), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("field", ["num_experts", "top_k_experts", "moe_intermediate_size"])
def test_a_config_without_its_experts_is_refused(field):
    fields = json.loads((GOLDEN / "gemma-4-26b-a4b" / "config.json").read_text())
    with pytest.raises(ValueError, match=f"^{field} is missing from the config"):
        Gemma4Decoder(Gemma4Config.from_hf(fields | {field: None}), rngs=nnx.Rngs(0))


def test_fixtures_are_small():
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(sizes) < 3_000_000
