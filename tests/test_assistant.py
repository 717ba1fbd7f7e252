"""Our assistant against Hugging Face's, over caches that our decoder filled."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from g4attn_jax import Contiguous, Gemma4Config, Gemma4Decoder, Paged, Ring
from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.cache import CompactKVCache, KVCache, ReadableCache
from g4attn_jax.checkpoint import CheckpointError, load_assistant_into, load_hf_into
from g4attn_jax.model import Gemma4Assistant, ModelCache, split_weights
from tests.everyday import everyday
from tests.test_model import page_tables_of

GOLDEN = Path(__file__).parent / "golden_assistant"
TARGETS = Path(__file__).parent / "golden_model"
NAMES = ("gemma-4-e4b", "gemma-4-31b")  # the first has ordered embeddings, the second K = V
LENGTHS = np.array([5, 80], np.int32)  # of make_golden.py; the window is 8
DRAFTS, CAPACITY, CHUNK, REJECTED = 4, 88, 40, 5
ATOL = 2e-4


@functools.cache
def target_of(name):
    config = Gemma4Config.from_hf(TARGETS / name / "config.json")
    abstract = nnx.eval_shape(
        lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    )
    return load_hf_into(TARGETS / name, abstract)[0], np.load(TARGETS / name / "golden.npz")[
        "tokens"
    ]


@functools.cache
def abstract_of(folder, implementation=None):
    config = AssistantConfig.from_hf(folder / "config.json")
    return nnx.eval_shape(
        lambda: Gemma4Assistant(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            implementation=implementation,
        )
    )


@functools.cache
def assistant_of(name, implementation=None):
    """(assistant, fixture)."""
    assistant, _ = load_assistant_into(GOLDEN / name, abstract_of(GOLDEN / name, implementation))
    return assistant, np.load(GOLDEN / name / "golden.npz")


def layouts_of(kind, window):
    if kind == "paged":
        # Pages from the end of the pool, every other one another's.
        pages = -(-CAPACITY // 16)
        table = 2 * (2 * pages - 1 - np.arange(2 * pages)).reshape(2, pages)
        layout = Paged(4 * pages, 16, jnp.asarray(table, jnp.int32))
        return {"sliding_attention": layout, "full_attention": layout}
    full = Contiguous(2, CAPACITY)
    sliding = Ring(2, window, CHUNK) if kind == "ring" else full
    return {"sliding_attention": sliding, "full_attention": full}


def sizes_of(layouts):
    """Sizes of a cache, which a plan looks at."""
    return ModelCache((), {key: layout.sizes() for key, layout in layouts.items()})


@functools.cache
def prompt_of(name):
    """(caches of the first LENGTHS tokens, contiguous, hidden states of the last of them)."""
    target, tokens = target_of(name)
    layouts = layouts_of("contiguous", target.config.sliding_window)
    merge, weights = split_weights(target)

    @jax.jit
    def fill(weights, tokens, positions, cache):
        with jax.default_matmul_precision("highest"):
            target = merge(weights)
            return target.hidden(tokens, target.plan(positions, cache), cache)

    positions = np.broadcast_to(np.arange(LENGTHS.max()), (2, LENGTHS.max()))
    positions = np.where(positions < LENGTHS[:, None], positions, -1)
    hidden, cache = fill(weights, tokens[:, : LENGTHS.max()], positions, target.init_cache(layouts))
    return cache, hidden[np.arange(2), LENGTHS - 1][:, None]


@functools.cache
def caches_of(name, kind, form):
    """(layouts, what the assistant reads)."""
    target, _ = target_of(name)
    filled = target.readable(prompt_of(name)[0])
    layouts, caches = layouts_of(kind, target.config.sliding_window), {}
    for layer_type, (full, k_norm) in filled.items():
        layout = layouts[layer_type]
        attention = next(
            layer.attention
            for layer, own_type in zip(target.layers, target.config.layer_types, strict=True)
            if own_type == layer_type
        )
        of_type = form if layer_type == "full_attention" else KVCache
        cache = attention.init_cache(layout, of_type)
        for start in range(0, LENGTHS.max(), CHUNK):
            at = np.broadcast_to(start + np.arange(CHUNK), (2, CHUNK))
            slots = layout.slots(jnp.asarray(np.where(at < LENGTHS[:, None], at, -1)))
            cache = cache.write(slots, *(x[:, start : start + CHUNK] for x in (full.k, full.v)))
        caches[layer_type] = ReadableCache(cache, k_norm)
    return layouts, caches


def with_rejected(caches, layouts):
    """The caches with other keys and values at positions that are to be seen by no draft."""
    written = {}
    for layer_type, (cache, k_norm) in caches.items():
        slots = layouts[layer_type].slots(jnp.asarray(LENGTHS[:, None] + np.arange(REJECTED)))
        shape = (2, REJECTED, *cache.v.shape[2:])
        k, v = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        written[layer_type] = ReadableCache(cache.write(slots, k, v), k_norm)
    return written


def drafter_of(name, kind, implementation=None):
    """From readable caches to (logits [B, DRAFTS, V], hidden [B, DRAFTS, A], tokens)."""
    target, tokens = target_of(name)
    assistant, _ = assistant_of(name, implementation)
    layouts = layouts_of(kind, target.config.sliding_window)
    merge, weights = split_weights(assistant)
    sizes, page_tables = sizes_of(layouts), page_tables_of(layouts)

    @jax.jit
    def one(weights, token, hidden, positions, readable):
        with jax.default_matmul_precision("highest"):
            assistant = merge(weights)
            step = assistant.plan(positions, sizes, page_tables)
            return assistant(target.embed_tokens(token), hidden, step, readable)

    def draft(readable):
        token, hidden = tokens[np.arange(2), LENGTHS][:, None], prompt_of(name)[1]
        drafts = []
        for _ in range(DRAFTS):
            logits, hidden = one(weights, token, hidden, LENGTHS[:, None], readable)
            token = np.argmax(logits, axis=-1)
            drafts.append((logits, hidden, token))
        return [np.concatenate(values, axis=1) for values in zip(*drafts, strict=True)]

    return draft


CACHES = [
    pytest.param(name, kind, form, id=f"{name}-{kind}-{form.__name__}")
    for name, kind, form in (
        ("gemma-4-e4b", "contiguous", KVCache),
        ("gemma-4-e4b", "ring", KVCache),
        ("gemma-4-31b", "contiguous", KVCache),
        ("gemma-4-31b", "ring", KVCache),
        ("gemma-4-31b", "paged", KVCache),
        ("gemma-4-31b", "contiguous", CompactKVCache),
        ("gemma-4-31b", "ring", CompactKVCache),
        ("gemma-4-31b", "paged", CompactKVCache),
    )
]


def assert_golden(drafted, golden):
    logits, hidden, tokens = drafted
    assert logits.dtype == jnp.float32
    # transformers gives the tokens of other centroids 1 less than the least of all.
    others = np.isneginf(logits)
    least = np.where(others, np.inf, logits).min(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        np.where(others, least - 1, logits), golden["logits"], rtol=0, atol=ATOL
    )
    np.testing.assert_allclose(hidden, golden["hidden"], rtol=0, atol=ATOL)
    np.testing.assert_array_equal(tokens, golden["tokens"])


@everyday("31b-paged-CompactKVCache", "31b-ring-KVCache")
@pytest.mark.parametrize(("name", "kind", "form"), CACHES)
def test_drafts_are_those_of_hugging_face(name, kind, form):
    golden = assistant_of(name)[1]
    hidden = prompt_of(name)[1][:, 0]
    np.testing.assert_allclose(hidden, golden["target_hidden"], rtol=0, atol=ATOL)
    layouts, readable = caches_of(name, kind, form)
    draft = drafter_of(name, kind)
    assert_golden(draft(readable), golden)
    # A rejected draft leaves its keys and values in the slots after the last accepted token's.
    assert_golden(draft(with_rejected(readable, layouts)), golden)


def test_the_fixture_has_ordered_embeddings():
    assistant, golden = assistant_of("gemma-4-e4b")
    assert assistant.config.use_ordered_embeddings
    assert (golden["logits"] == golden["logits"].min(axis=-1, keepdims=True)).sum(
        axis=-1
    ).min() > 90
    logits = np.asarray(assistant.logits(jnp.ones((1, 2, 24))))
    assert (np.isfinite(logits).sum(axis=-1) == 4 * 8).all()


@everyday()
def test_kernels():
    _, readable = caches_of("gemma-4-31b", "contiguous", CompactKVCache)
    draft = drafter_of("gemma-4-31b", "contiguous", "triton_interpret")
    assert_golden(draft(readable), assistant_of("gemma-4-31b")[1])


def test_tokens_of_a_call_and_padding_are_on_their_own():
    target, tokens = target_of("gemma-4-31b")
    assistant, golden = assistant_of("gemma-4-31b")
    layouts, readable = caches_of("gemma-4-31b", "contiguous", KVCache)
    newest = target.embed_tokens(tokens[np.arange(2), LENGTHS][:, None])
    repeated = (jnp.tile(x, (1, 3, 1)) for x in (newest, prompt_of("gemma-4-31b")[1]))
    positions = np.stack([LENGTHS - 1, LENGTHS, np.full(2, -1)], axis=1)
    step = assistant.plan(positions, sizes_of(layouts))
    logits, _ = jax.jit(assistant)(*repeated, step, readable)
    np.testing.assert_allclose(logits[:, 1], golden["logits"][:, 0], rtol=0, atol=ATOL)
    assert np.abs(logits[:, 0] - logits[:, 1]).max() > 0.01
    assert np.isfinite(logits).all()


def test_the_caches_are_only_read():
    target, _ = target_of("gemma-4-31b")
    assistant, _ = assistant_of("gemma-4-31b")
    assert {layer.attention.k_norm for layer in assistant.layers} == {None}
    with pytest.raises(ValueError, match="reads the cache of the target's last layer"):
        assistant.layers[1].attention.init_cache(Contiguous(2, 88))
    cache, _ = prompt_of("gemma-4-31b")
    readable = target.readable(cache)
    assert readable["sliding_attention"].cache is cache.layers[4]
    assert readable["full_attention"].cache is cache.layers[5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": jnp.zeros((2, 1, 24))}, r"embeddings .* \[B, T, 64\]"),
        ({"hidden": jnp.zeros((2, 1, 64), int)}, "hidden .* int32; accepted: floating"),
        ({"hidden": jnp.zeros((2, 2, 64))}, r"hidden .* \(2, 2, 64\).*\(2, 1, 64\)"),
        ({"step": {}}, "step is a dict"),
        ({"readable": {}}, "readable lacks full_attention, sliding_attention"),
    ],
)
def test_a_draft_that_makes_no_sense(changes, message):
    assistant, _ = assistant_of("gemma-4-31b")
    hidden = prompt_of("gemma-4-31b")[1]
    layouts, readable = caches_of("gemma-4-31b", "contiguous", CompactKVCache)
    arguments = {
        "embeddings": hidden,
        "hidden": hidden,
        "step": assistant.plan(LENGTHS[:, None], sizes_of(layouts)),
        "readable": readable,
    }
    with pytest.raises(ValueError, match=message):
        assistant(**arguments | changes)


@pytest.mark.parametrize(
    ("positions", "layouts", "message"),
    [
        (LENGTHS, {}, r"positions has shape \(2,\)"),
        (np.array([[5], [90]]), {}, "positions has 89, for which sequence 1 has no slot"),
        (LENGTHS[:, None], {"sliding_attention": None}, "layouts lacks sliding_attention"),
    ],
)
def test_a_plan_that_makes_no_sense(positions, layouts, message):
    assistant, _ = assistant_of("gemma-4-31b")
    layouts = layouts_of("contiguous", 8) | layouts
    layouts = {key: layout for key, layout in layouts.items() if layout is not None}
    with pytest.raises(ValueError, match=message):
        assistant.plan(positions, sizes_of(layouts))


def config_of(name="gemma-4-e4b"):
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_a_config_without_a_text_config():
    config = config_of()
    del config["text_config"]
    with pytest.raises(ValueError, match="text_config is missing"):
        AssistantConfig.from_hf(config)


@pytest.mark.parametrize(
    ("model_type", "backbone_hidden_size"),
    [("gemma4_assistant", 1536), ("gemma4_unified_assistant", 3840)],
)
def test_absent_fields_have_the_defaults_of_transformers(model_type, backbone_hidden_size):
    text = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    if model_type == "gemma4_unified_assistant":
        text = {}  # its text config has no such fields
    config = AssistantConfig.from_hf({"model_type": model_type, "text_config": text})
    assert config.backbone_hidden_size == backbone_hidden_size
    assert (config.use_ordered_embeddings, config.num_centroids) == (False, None)
    assert config.text.num_kv_shared_layers == config.text.num_hidden_layers == 30
    ordered = {"model_type": model_type, "text_config": text, "use_ordered_embeddings": True}
    config = AssistantConfig.from_hf(ordered)
    assert (config.num_centroids, config.centroid_intermediate_top_k) == (2048, 32)


def test_the_new_form_of_a_config_says_the_same():
    old = config_of("gemma-4-31b")
    new = config_of("gemma-4-31b")
    overrides = {
        "head_dim": new["text_config"].pop("global_head_dim"),
        "num_key_value_heads": new["text_config"].pop("num_global_key_value_heads"),
    }
    types = new["text_config"]["layer_types"]
    new["text_config"]["per_layer_config"] = {
        str(layer): overrides for layer, t in enumerate(types) if t == "full_attention"
    }
    assert AssistantConfig.from_hf(new) == AssistantConfig.from_hf(old)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma4"}, "model_type is 'gemma4'; an assistant's config has one of"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"backbone_hidden_size": 0}, "backbone_hidden_size is 0; accepted: an integer of 1"),
        ({"use_ordered_embeddings": 1}, "use_ordered_embeddings must be true or false, not 1"),
        ({"num_centroids": 12}, "num_centroids = 12 does not divide vocab_size = 128"),
        ({"num_centroids": True}, "num_centroids is True; accepted: an integer of 1"),
        ({"centroid_intermediate_top_k": 17}, "_top_k = 17 exceeds num_centroids = 16"),
        ({"text_config": None}, "text_config must be an object"),
    ],
)
def test_a_config_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        AssistantConfig.from_hf(config_of() | changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size_per_layer_input", 16),
        ("enable_moe_block", True),
        ("use_double_wide_mlp", True),
        ("num_kv_shared_layers", 2),
    ],
)
def test_a_text_config_of_no_assistant(field, value):
    config = config_of()
    config["text_config"][field] = value
    with pytest.raises(ValueError, match=rf"text_config\.{field} = {value}"):
        AssistantConfig.from_hf(config)


def test_configs_that_say_the_same():
    given = config_of()
    config = AssistantConfig.from_hf(given)
    given["text_config"]["num_kv_shared_layers"] = 0
    assert AssistantConfig.from_hf(given) == config
    without = AssistantConfig.from_hf(config_of("gemma-4-31b"))
    assert (without.num_centroids, without.centroid_intermediate_top_k) == (None, None)


def test_targets():
    config = AssistantConfig.from_hf(config_of())
    target = json.loads((TARGETS / "gemma-4-e4b" / "config.json").read_text())
    config.check_target(Gemma4Config.from_hf(target))
    for changes, message in (
        ({"hidden_size": 64}, "backbone_hidden_size is 48"),
        ({"vocab_size": 256}, "vocab_size is 128"),
        ({"sliding_window": 16}, "sliding_window of sliding_attention layers is 8; .* has 16"),
        ({"global_head_dim": 64}, "head_dim of full_attention layers is 32"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check_target(Gemma4Config.from_hf(target | changes))


@pytest.fixture
def folder(tmp_path):
    """(a directory, a function that writes it with changed tensors)."""
    source = GOLDEN / "gemma-4-e4b"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    def write(changes):
        tensors = load_file(source / "model.safetensors") | changes
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            tmp_path / "model.safetensors",
        )
        return tmp_path

    return write


ORDERING = "masked_embedding.token_ordering"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_projection.weight": None}, "the checkpoint lacks pre_projection.weight"),
        ({"post_projection.bias": np.zeros(48, np.float32)}, "the checkpoint has post_proj.*bias"),
        (
            {"masked_embedding.centroids.weight": np.zeros((24, 16), np.float32)},
            r"centroids.weight has shape \(24, 16\)",
        ),
        ({ORDERING: None}, f"the checkpoint lacks {ORDERING}"),
        ({ORDERING: np.arange(64)}, rf"{ORDERING} has shape \(64,\)"),
        ({ORDERING: np.arange(128, dtype=np.float32)}, f"{ORDERING} has dtype F32"),
        (
            {ORDERING: np.zeros(128, np.int64)},
            f"{ORDERING} does not have every token from 0 to 127",
        ),
        (
            {"model.norm.weight": np.zeros(24, np.int32)},
            "model.norm.weight has dtype I32",
        ),
    ],
)
def test_a_corrupt_checkpoint(folder, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_assistant_into(folder(changes), abstract_of(GOLDEN / "gemma-4-e4b"))


def test_what_is_skipped(folder):
    stored = load_file(GOLDEN / "gemma-4-e4b" / "model.safetensors")
    changes = {
        "lm_head.weight": stored["model.embed_tokens.weight"],
        "model.layers.0.self_attn.k_norm.weight": np.zeros(16, np.float32),
    }
    _, report = load_assistant_into(folder(changes), abstract_of(GOLDEN / "gemma-4-e4b"))
    assert report.skipped == {
        "lm_head.weight": 1,
        "model.layers.*.self_attn.k_norm (KV-shared)": 1,
    }
    assert report.loaded == len(stored)


def test_a_head_of_its_own(folder):
    changes = {"lm_head.weight": np.zeros((128, 24), np.float32)}
    message = r"^lm_head\.weight differs from model\.embed_tokens\.weight; accepted: equal ones"
    with pytest.raises(CheckpointError, match=message):
        load_assistant_into(folder(changes), abstract_of(GOLDEN / "gemma-4-e4b"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model."])
def test_names_that_tools_wrap(prefix, tmp_path):
    stored = load_file(GOLDEN / "gemma-4-e4b" / "model.safetensors")
    save_file({prefix + name: t for name, t in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    _, report = load_assistant_into(tmp_path, abstract_of(GOLDEN / "gemma-4-e4b"))
    assert report.loaded == len(stored)


def test_another_prefix_than_an_assistant_has(tmp_path):
    stored = load_file(GOLDEN / "gemma-4-e4b" / "model.safetensors")
    renamed = {name.removeprefix("model."): t for name, t in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    with pytest.raises(CheckpointError, match=r"^the checkpoint has embed_tokens\.weight; an ass"):
        load_assistant_into(tmp_path, abstract_of(GOLDEN / "gemma-4-e4b"))


def test_a_real_model_is_left_as_it_is():
    source = GOLDEN / "gemma-4-e4b"
    model, _ = load_assistant_into(source, abstract_of(source))
    before = jax.tree.leaves(nnx.state(model))
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
    loaded, _ = load_assistant_into(source, model)
    assert not any(leaf.any() for leaf in jax.tree.leaves(nnx.state(model)))
    for leaf, expected in zip(jax.tree.leaves(nnx.state(loaded)), before, strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_another_assistants_checkpoint():
    with pytest.raises(CheckpointError, match=r"config\.json has backbone_hidden_size = 64"):
        load_assistant_into(GOLDEN / "gemma-4-31b", abstract_of(GOLDEN / "gemma-4-e4b"))


def test_the_parameter_tree_can_be_known_without_arrays():
    assistant, _ = assistant_of("gemma-4-e4b")
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(assistant))
    abstract = abstract_of(GOLDEN / "gemma-4-e4b")
    assert jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(abstract)) == shapes


def test_fixtures_are_small():
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(sizes) < 300_000
