import copy
import json
import re
from importlib import resources

import pytest

from g4attn_jax import AttentionSpec, Gemma4Config, ProjectionMode
from g4attn_jax.config import _CONFIGS

Q_ONLY, QK_ONLY, QKV_FULL = ProjectionMode
S, F = "sliding_attention", "full_attention"


def published(name="gemma-4-e2b"):
    return json.loads((_CONFIGS / f"{name}.json").read_text())


def text(name="gemma-4-e2b", **changes):
    return published(name)["text_config"] | changes


# Of the model cards' configs: E, layers, G = full every, Nq, sliding Nkv, window, full Nkv, K = V,
# shared tail.
MODELS = {
    "e2b": (1536, 35, 5, 8, 1, 512, 1, False, 20),
    "e4b": (2560, 42, 6, 8, 2, 512, 2, False, 18),
    "12b": (3840, 48, 6, 16, 8, 1024, 1, True, 0),
    "26b-a4b": (2816, 30, 6, 16, 8, 1024, 2, True, 0),
    "31b": (5376, 60, 6, 32, 16, 1024, 4, True, 0),
}


@pytest.mark.parametrize("size", MODELS)
def test_every_layer_of_every_size(size):
    embed, layers, period, nq, sliding_nkv, window, full_nkv, k_eq_v, shared = MODELS[size]
    config = Gemma4Config.preset(f"gemma-4-{size}")
    assert (config.hidden_size, config.num_hidden_layers) == (embed, layers)
    last_producer = {}
    for layer in range(layers):
        full = layer % period == period - 1
        is_shared = layer >= layers - shared
        if not is_shared:
            last_producer[full] = layer
        expected = AttentionSpec(
            mode=Q_ONLY if is_shared else QK_ONLY if full and k_eq_v else QKV_FULL,
            num_q_heads=nq,
            num_kv_heads=full_nkv if full else sliding_nkv,
            head_dim=512 if full else 256,
            sliding_window=None if full else window,
            rope_theta=1e6 if full else 1e4,
            rotary_dim=128 if full else 256,
            eps=1e-6,
            kv_layer=last_producer[full] if is_shared else layer,
        )
        assert config.attention_spec(layer) == expected


def test_preset_names():
    assert {name.removeprefix("gemma-4-") for name in Gemma4Config.preset_names()} == set(MODELS)
    assert Gemma4Config.preset("31b") == Gemma4Config.preset("gemma-4-31b")
    with pytest.raises(ValueError, match="unknown preset '32b'"):
        Gemma4Config.preset("32b")


def test_from_hf_takes_paths_dicts_and_bare_text_configs(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published()))
    expected = Gemma4Config.preset("e2b")
    assert Gemma4Config.from_hf(path) == expected
    assert Gemma4Config.from_hf(str(path)) == expected
    assert Gemma4Config.from_hf(published()) == expected
    assert Gemma4Config.from_hf(text()) == expected


@pytest.mark.parametrize("name", ["gemma-4-12b", "gemma-4-31b"])
def test_both_text_model_types_are_taken(name):
    assert Gemma4Config.from_hf(published(name)) == Gemma4Config.preset(name)
    model_types = {published(n)["text_config"]["model_type"] for n in Gemma4Config.preset_names()}
    assert model_types == {"gemma4_text", "gemma4_unified_text"}


def test_from_hf_keeps_no_reference_and_changes_nothing():
    given = published("gemma-4-31b")
    before = copy.deepcopy(given)
    config = Gemma4Config.from_hf(given)
    assert given == before
    given["text_config"]["rope_parameters"]["full_attention"]["rope_theta"] = 1.0
    assert config == Gemma4Config.preset("31b")
    assert hash(config) == hash(Gemma4Config.preset("31b"))


# Of transformers 5.24.0, `Gemma4TextConfig()` and `Gemma4UnifiedTextConfig()`.
DEFAULTS = {
    "hidden_size": 2304,
    "num_hidden_layers": 30,
    "layer_types": ((S,) * 5 + (F,)) * 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "sliding_window": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        S: {"rope_type": "default", "rope_theta": 1e4},
        F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "vocab_size": 262144,
    "tie_word_embeddings": True,
    "final_logit_softcapping": None,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
UNIFIED_DEFAULTS = DEFAULTS | {
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": None,
}


@pytest.mark.parametrize(
    ("model_type", "defaults"),
    [("gemma4_text", DEFAULTS), ("gemma4_unified_text", UNIFIED_DEFAULTS)],
)
def test_absent_fields_have_the_defaults_of_transformers(model_type, defaults):
    config = Gemma4Config.from_hf({"model_type": model_type})
    assert vars(config) == defaults
    config.check_decoder()
    nulls = {"layer_types": None, "rope_parameters": None}
    assert Gemma4Config.from_hf({"model_type": model_type} | nulls) == config


def test_a_text_config_has_its_type_from_the_outer_one():
    given = published("gemma-4-12b")
    del given["text_config"]["model_type"]
    assert Gemma4Config.from_hf(given) == Gemma4Config.preset("12b")


def test_the_tie_is_that_of_the_outer_config():
    given = published() | {"tie_word_embeddings": False}
    assert Gemma4Config.from_hf(given).tie_word_embeddings is False


def test_a_last_layer_that_slides_is_made_full():
    types = [F, *[S] * 34]
    with pytest.warns(
        UserWarning, match=r"^layer_types\[34\], the last, is 'sliding_attention'; it"
    ):
        config = Gemma4Config.from_hf(text(layer_types=types, num_kv_shared_layers=0))
    assert config.layer_types == (F, *[S] * 33, F)
    assert types[-1] == S


def in_new_form(given):
    """The text config as transformers 5.24.0 writes it."""
    given = dict(given)
    overrides = {"head_dim": given.pop("global_head_dim")}
    heads = given.pop("num_global_key_value_heads", None)
    if given["attention_k_eq_v"] and heads is not None:
        overrides["num_key_value_heads"] = heads
    width = len(str(given["num_hidden_layers"] - 1))
    given["per_layer_config"] = {
        f"{layer:0{width}d}": dict(overrides)
        for layer, layer_type in enumerate(given["layer_types"])
        if layer_type == F
    }
    return given


@pytest.mark.parametrize("size", MODELS)
def test_both_forms_are_read(size):
    given = published(f"gemma-4-{size}")
    old, new = given["text_config"], in_new_form(given["text_config"])
    expected = Gemma4Config.preset(size)
    for text_config in (new, old | new):
        assert Gemma4Config.from_hf(text_config) == expected
        assert Gemma4Config.from_hf(given | {"text_config": text_config}) == expected


def test_what_the_new_form_lacks_is_the_common_value():
    """Only there can full layers have KV heads of their own without K = V."""
    given = in_new_form(text("gemma-4-31b", attention_k_eq_v=False))
    for of_layer in given["per_layer_config"].values():
        of_layer["num_key_value_heads"] = 8
    spec = Gemma4Config.from_hf(given).attention_spec(5)
    assert (spec.mode, spec.num_kv_heads, spec.head_dim) == (QKV_FULL, 8, 512)
    for common in ({}, None):
        spec = Gemma4Config.from_hf(given | {"per_layer_config": common}).attention_spec(5)
        assert (spec.num_kv_heads, spec.head_dim) == (16, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_head_dim": 256}, "^global_head_dim is 256, and per_layer_config makes it 512"),
        (
            {"num_global_key_value_heads": 2},
            "^num_global_key_value_heads is 2, and per_layer_config makes it 4",
        ),
        ({"per_layer_config": [512]}, r"^per_layer_config must be an object, not \[512\]"),
        ({"per_layer_config": {"5": 512}}, r"^per_layer_config\['5'\] must be an object, not 512"),
        ({"per_layer_config": {"60": {}}}, "^per_layer_config has layer '60'; .* 0 to num_hidden"),
        ({"per_layer_config": {"-1": {}}}, "^per_layer_config has layer '-1'"),
        ({"per_layer_config": {"5": {}, "05": {}}}, "^per_layer_config has layer 5 twice"),
        (
            {"per_layer_config": {"05": {"head_dim": 512}}},
            "^per_layer_config makes head_dim of layer 11 256, .* full_attention layer 512",
        ),
        (
            {"per_layer_config": {"03": {"num_key_value_heads": 4}}},
            "^per_layer_config makes num_key_value_heads of layer 3 4, .* sliding_att.* layer 16",
        ),
        (
            {"per_layer_config": {"05": {"sliding_window": 4}}},
            "^per_layer_config gives layer 5 sliding_window = 4; accepted: head_dim and num_key",
        ),
    ],
)
def test_new_forms_that_contradict_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Gemma4Config.from_hf(in_new_form(text("gemma-4-31b")) | changes)


def test_global_kv_heads_may_be_absent():
    """Transformers' default is null, which leaves `num_key_value_heads` in force."""
    config = text("gemma-4-31b")
    del config["num_global_key_value_heads"]
    assert Gemma4Config.from_hf(config).attention_spec(5).num_kv_heads == 16


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("e2b", {"layer_types": ["full_attention"] * 34}, "layer_types has 34 entries; .* = 35"),
        ("e2b", {"num_hidden_layers": 34}, "layer_types has 35 entries"),
        ("e2b", {"layer_types": "full_attention"}, "layer_types must be a list"),
        ("31b", {"layer_types": ["linear"] * 60}, r"layer_types\[0\] is 'linear'"),
        (
            "e2b",
            {"layer_types": ["sliding_attention"] * 15 + ["full_attention"] * 20},
            "num_kv_shared_layers = 20 makes layer 15 .* earlier full_attention layer",
        ),
        (
            "e2b",
            {"num_kv_shared_layers": 36},
            "num_kv_shared_layers = 36 exceeds num_hidden_layers",
        ),
        ("e2b", {"num_kv_shared_layers": 35}, "num_kv_shared_layers = 35 makes layer 0 read"),
        (
            "e2b",
            {"num_kv_shared_layers": -1},
            "num_kv_shared_layers is .*; accepted: an integer of 0 or more",
        ),
        ("e4b", {"num_attention_heads": 7}, "num_attention_heads = 7 is not divisible by num_key"),
        (
            "31b",
            {"num_global_key_value_heads": 5},
            "not divisible by num_global_key_value_heads = 5",
        ),
        ("31b", {"num_global_key_value_heads": 0}, "num_global_key_value_heads is 0; accepted: "),
        ("31b", {"head_dim": 255}, "head_dim = 255 is odd"),
        ("31b", {"global_head_dim": 511}, "global_head_dim = 511 is odd"),
        ("31b", {"head_dim": "256"}, "head_dim is '256'; accepted: an integer of 1"),
        ("31b", {"hidden_size": True}, "hidden_size is True; accepted: an integer"),
        ("31b", {"sliding_window": 0}, "sliding_window is 0; accepted: an integer of 1"),
        ("31b", {"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0, not 0"),
        ("31b", {"attention_k_eq_v": 1}, "attention_k_eq_v must be true or false, not 1"),
        ("31b", {"attention_bias": True}, "attention_bias = True is not supported"),
        (
            "31b",
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention = 'all' is not",
        ),
        ("31b", {"model_type": "gemma3_text"}, "model_type is 'gemma3_text'; .* gemma4_text"),
        ("31b", {"rope_parameters": []}, "rope_parameters must be an object"),
        ("31b", {"rope_parameters": {}}, "rope_parameters.full_attention is missing"),
    ],
)
def test_contradictions_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        Gemma4Config.from_hf(text(f"gemma-4-{name}", **changes))


@pytest.mark.parametrize(
    ("layer_type", "changes", "message"),
    [
        ("full_attention", {"rope_type": "yarn"}, "full_attention.rope_type is 'yarn'"),
        ("full_attention", {"rope_theta": None}, "full_attention.rope_theta must be a number"),
        (
            "full_attention",
            {"partial_rotary_factor": 2},
            "partial_rotary_factor must be a number fr",
        ),
        ("full_attention", {"factor": 8.0}, "full_attention.factor = 8.0 is not supported"),
        ("sliding_attention", {"partial_rotary_factor": 0.5}, "needs rope_type proportional"),
    ],
)
def test_rope_parameters_are_checked(layer_type, changes, message):
    rope = copy.deepcopy(text()["rope_parameters"])
    rope[layer_type] |= changes
    with pytest.raises(ValueError, match=message):
        Gemma4Config.from_hf(text(rope_parameters=rope))


@pytest.mark.parametrize("layer", [-1, 35, 1.0, True, "1"])
def test_there_is_no_such_layer(layer):
    with pytest.raises(ValueError, match=f"layer is {layer!r}"):
        Gemma4Config.preset("e2b").attention_spec(layer)


def test_not_a_config(tmp_path):
    with pytest.raises(FileNotFoundError):
        Gemma4Config.from_hf(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config is None"):
        Gemma4Config.from_hf(None)
    with pytest.raises(ValueError, match="unknown preset 5"):
        Gemma4Config.preset(5)
    with pytest.raises(ValueError, match="text_config must be an object"):
        Gemma4Config.from_hf({"text_config": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff\x00\x01", "is not JSON: 'utf-8' codec can't decode"),
        (b"[" * 10**5, "is not JSON: "),
        (b"[]", "is not a JSON object"),
        (b'{"a": [{"b": 1, "c": 2, "c": 2}]}', "has c more than once"),
    ],
)
def test_a_file_that_is_no_config_is_named(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
        Gemma4Config.from_hf(path)


@pytest.mark.parametrize("model_type", ["gemma4_assistant", "gemma4_unified_assistant"])
def test_the_config_of_an_assistant(model_type):
    config = published() | {"model_type": model_type}
    with pytest.raises(ValueError, match=f"'{model_type}', .* of an assistant; .* AssistantConfig"):
        Gemma4Config.from_hf(config)


def test_the_modes_count_their_kv_projections():
    assert [mode.num_kv_projections for mode in ProjectionMode] == [0, 1, 2]


def test_configs_ship_with_the_package():
    assert (resources.files("g4attn_jax") / "configs" / "gemma-4-31b.json").is_file()


def test_null_is_no_per_layer_embedding():
    assert text("gemma-4-31b")["hidden_size_per_layer_input"] is None
    assert Gemma4Config.preset("31b").hidden_size_per_layer_input == 0


@pytest.mark.parametrize("size", MODELS)
def test_presets_are_whole_models(size):
    Gemma4Config.preset(size).check_decoder()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0; accepted: an integer of 1"),
        ("intermediate_size", 2.5, "intermediate_size is 2.5; accepted: an integer"),
        (
            "hidden_size_per_layer_input",
            -1,
            "hidden_size_per_layer_input is -1; accepted: ",
        ),
        ("hidden_activation", "silu", "hidden_activation = 'silu' is not .* 'gelu_pytorch_tanh'"),
        ("tie_word_embeddings", 0, "tie_word_embeddings = 0 is not supported"),
        ("use_double_wide_mlp", 1, "use_double_wide_mlp = 1 is not supported"),
        ("enable_moe_block", "yes", "enable_moe_block = 'yes' is not supported"),
        ("final_logit_softcapping", 0, "final_logit_softcapping must be a number above 0, not 0"),
        ("top_k_experts", 129, "top_k_experts = 129 exceeds num_experts = 128"),
    ],
)
def test_fields_of_the_decoder_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        Gemma4Config.from_hf(text("gemma-4-26b-a4b", **{field: value}))


@pytest.mark.parametrize("size", MODELS)
def test_truncated(size):
    whole = Gemma4Config.preset(size)
    assert whole.truncated(whole.num_hidden_layers) == whole
    for layers in range(1, whole.num_hidden_layers):
        config = whole.truncated(layers)
        assert config.layer_types == whole.layer_types[:layers]
        assert config.num_kv_shared_layers <= whole.num_kv_shared_layers
        assert (config.hidden_size, config.vocab_size) == (whole.hidden_size, whole.vocab_size)


@pytest.mark.parametrize(
    ("size", "layers", "shared"),
    # Five layers of E2B are the first with a full one, which must then be a producer.
    [("e2b", 35, 20), ("e2b", 4, 2), ("e2b", 5, 0), ("e2b", 6, 1), ("e2b", 10, 5), ("31b", 6, 0)],
)
def test_truncated_models_share_what_they_can(size, layers, shared):
    assert Gemma4Config.preset(size).truncated(layers).num_kv_shared_layers == shared


@pytest.mark.parametrize("layers", [0, 36, True, 5.0])
def test_truncated_to_what_is_not_there(layers):
    with pytest.raises(ValueError, match=f"layers is {layers!r}"):
        Gemma4Config.preset("e2b").truncated(layers)
