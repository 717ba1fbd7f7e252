"""Files with more than the model's tensors, with other names, and with heads of their own."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous
from g4attn_jax.checkpoint import CheckpointError, load_hf_into, save_hf
from g4attn_jax.checkpoint.loading import parameters
from tests.checkpoint.directories import (
    FIXTURES,
    abstract,
    assert_same_bytes,
    in_two,
    read_config,
    read_tensors,
    write,
)
from tests.everyday import everyday

DENSE, K_EQ_V, EXPERTS = "gemma-4-e4b", "gemma-4-31b", "gemma-4-26b-a4b"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
V_PROJ = "model.layers.2.self_attn.v_proj.weight"  # of a full layer of K_EQ_V


def loaded(folder, name, extra=None, *, config=None, without=()):
    """(model, report) of a fixture with more tensors, without some and under another config."""
    config = read_config(FIXTURES / name) | (config or {})
    tensors = {n: t for n, t in read_tensors(FIXTURES / name).items() if n not in without}
    return load_hf_into(write(folder, config, tensors | (extra or {})), abstract(config))


def assert_same(model, other):
    ours, theirs = (
        {path: np.asarray(variable[...]) for path, variable in parameters(m).items()}
        for m in (model, other)
    )
    assert_same_bytes(ours, theirs)


def full(value, *shape, dtype=jnp.bfloat16):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("tensor", "value", "heading"),
    [
        (
            "model.layers.1.self_attn.v_norm.weight",
            full(1, 16),
            "model.layers.*.self_attn.v_norm.weight (1 throughout)",
        ),
        (
            "model.layers.0.self_attn.k_scale",
            full(1, dtype=np.float32),
            "model.layers.*.self_attn.k_scale (1 throughout)",
        ),
        (
            "model.layers.0.self_attn.attn.v_scale",
            full(1, 1),
            "model.layers.*.self_attn.attn.v_scale (1 throughout)",
        ),
        (
            "model.embed_tokens.embed_scale",
            full(48**0.5),
            "model.embed_tokens.embed_scale (6.9282 throughout)",
        ),
        (
            "model.embed_tokens_per_layer.embed_scale",
            full(4, dtype=np.float32),
            "model.embed_tokens_per_layer.embed_scale (4 throughout)",
        ),
    ],
)
def test_numbers_that_say_nothing_are_skipped(tensor, value, heading, tmp_path):
    model, report = loaded(tmp_path / "given", DENSE, {tensor: value})
    assert report.skipped == {heading: 1}
    assert report.loaded == len(read_tensors(FIXTURES / DENSE))
    assert_same(model, load_hf_into(FIXTURES / DENSE, abstract(read_config(FIXTURES / DENSE)))[0])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(tensor)} is not .* throughout; acce"):
        loaded(tmp_path / "other", DENSE, {tensor: np.asarray(2 * value)})
    with pytest.raises(CheckpointError, match=rf"^{re.escape(tensor)} has dtype I8"):
        loaded(tmp_path / "integer", DENSE, {tensor: value.astype(np.int8)})


@pytest.mark.parametrize(
    "tensor",
    ["rotary_emb.full_attention_inv_freq", "layers.3.self_attn.rotary_emb.inv_freq"],
)
def test_rotary_buffers_are_skipped(tensor, tmp_path):
    _, report = loaded(tmp_path, DENSE, {f"model.{tensor}": full(0.5, 8)})
    assert report.skipped == {f"model.{tensor}".replace(".3.", ".*."): 1}


def test_a_scalar_without_an_axis(tmp_path):
    scalar = "model.layers.1.layer_scalar"
    value = read_tensors(FIXTURES / DENSE)[scalar]
    model, report = loaded(tmp_path, DENSE, {scalar: value.reshape(())})
    assert not report.skipped
    assert model.layers[1].layer_scalar[...] == value[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", "language_model.model."),
        ("", "_orig_mod."),
        ("model.layers.1.", "model.layers.1._orig_mod."),
        ("", "base_model.model."),
        ("", "base_model.model._orig_mod."),
    ],
)
def test_names_that_tools_wrap(old, new, tmp_path):
    config, tensors = read_config(FIXTURES / DENSE), read_tensors(FIXTURES / DENSE)
    renamed = {re.sub(rf"^{re.escape(old)}", new, name): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    renamed[("" if old else new) + HEAD] = tensors[TABLE]
    model, report = load_hf_into(write(tmp_path, config, *in_two(renamed)), abstract(config))
    assert (report.loaded, report.skipped) == (len(tensors), {HEAD: 1})
    assert_same(model, load_hf_into(FIXTURES / DENSE, abstract(config))[0])


def test_one_tensor_under_two_names(tmp_path):
    norm = read_tensors(FIXTURES / DENSE)["model.norm.weight"]
    message = r"^the checkpoint has model\.norm\.weight twice, once as "
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, DENSE, {"_orig_mod.model.norm.weight": norm})


def test_a_value_projection_beside_one_that_is_both(tmp_path):
    key = read_tensors(FIXTURES / K_EQ_V)[V_PROJ.replace("v_proj", "k_proj")]
    _, report = loaded(tmp_path / "equal", K_EQ_V, {V_PROJ: key})
    assert report.skipped == {"model.layers.*.self_attn.v_proj.weight (equals k_proj)": 1}
    other = key.copy()
    other[-1, -1] += 1
    message = rf"^{re.escape(V_PROJ)} differs from model\.layers\.2\.self_attn\.k_proj\.weight; acc"
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "other", K_EQ_V, {V_PROJ: other})


def experts_one_by_one():
    """(tensors of experts, names of those that they replace)."""
    single, packed = {}, []
    for name, tensor in read_tensors(FIXTURES / EXPERTS).items():
        at, dot, which = name.rpartition(".experts.")
        if not dot:
            continue
        packed.append(name)
        for expert, rows in enumerate(tensor):
            halves = np.split(rows, 2) if which == "gate_up_proj" else [rows]
            names = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
            for one, half in zip(names, halves, strict=True):
                single[f"{at}.experts.{expert}.{one}.weight"] = half.copy()
    return single, packed


def test_experts_one_by_one_are_packed(tmp_path):
    single, packed = experts_one_by_one()
    model, report = loaded(tmp_path, EXPERTS, single, without=packed)
    assert report.loaded == len(read_tensors(FIXTURES / EXPERTS)) - len(packed) + len(single)
    assert_same(
        model, load_hf_into(FIXTURES / EXPERTS, abstract(read_config(FIXTURES / EXPERTS)))[0]
    )


def test_experts_that_are_not_all_there(tmp_path):
    single, packed = experts_one_by_one()
    name = "model.layers.1.experts.3.up_proj.weight"
    for changes, message in (
        ({name: None}, f"lacks {name}"),
        ({name.replace(".3.", ".16."): single[name]}, r"has .*\.16\..*; num_experts is 16"),
        ({name: single[name][1:]}, rf"{name} has shape \(23, 32\)"),
        ({name: single[name].astype(np.int8)}, "experts.gate_up_proj has dtype I8"),
    ):
        given = {n: t for n, t in (single | changes).items() if t is not None}
        with pytest.raises(CheckpointError, match=message):
            loaded(tmp_path, EXPERTS, given, without=packed)
    with pytest.raises(CheckpointError, match="twice, once expert by expert"):
        loaded(tmp_path, EXPERTS, single)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"quant_method": "fp8", "kv_cache_scheme": None},
            "says quant_method 'fp8'; accepted",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8}},
            "says quant_method 'modelopt', quant_algo 'FP8'; accepted",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "says quant_method 'gptq', bits 4, group_size 128; accepted: weights in bfloat16",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "quant_method 'compressed-tensors', format 'pack-quantized', group_0 int of 4 bits;",
        ),
        ({"load_in_4bit": True, "load_in_8bit": False}, "says load_in_4bit True;"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_quantised_files_are_refused_as_such(said, message, inside, tmp_path):
    config = read_config(FIXTURES / DENSE)
    given = config | {"quantization_config": said}
    if inside:
        given = {"model_type": "gemma4", "text_config": given}
    # With the weights of none of its layers under the usual names.
    folder = write(tmp_path, given, {TABLE: read_tensors(FIXTURES / DENSE)[TABLE]})
    with pytest.raises(
        CheckpointError, match="^the checkpoint is quantised, quantization_config.*" + message
    ):
        load_hf_into(folder, abstract(config))


def test_quantised_tensors_that_no_config_explains(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with pytest.raises(CheckpointError, match=rf"^the checkpoint is quantised: it has {name}, and"):
        loaded(tmp_path, DENSE, {name: full(1, 1)})


def test_a_quantised_cache_is_no_quantised_weight(tmp_path):
    said = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    scale = {"model.layers.0.self_attn.k_scale": full(1, 1)}
    _, report = loaded(tmp_path, DENSE, scale, config={"quantization_config": said})
    assert sum(report.skipped.values()) == 1


def other_head(name=DENSE):
    table = read_tensors(FIXTURES / name)[TABLE]
    return np.random.default_rng(0).normal(size=table.shape).astype(table.dtype)


def logits_of(model):
    layouts = dict.fromkeys(("sliding_attention", "full_attention"), Contiguous(1, 4))
    tokens, positions = jnp.array([[5, 7, 9]]), jnp.arange(3)[None]
    cache = model.init_cache(layouts)
    return model(tokens, model.plan(positions, cache), cache)[0]


@everyday()
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_used_and_saved(tied, tmp_path):
    """Whatever the config says, as by transformers."""
    head, config = other_head(), {"tie_word_embeddings": tied}
    model, report = loaded(tmp_path / "given", DENSE, {HEAD: head}, config=config)
    assert model.config.tie_word_embeddings is False
    assert report.loaded == len(read_tensors(FIXTURES / DENSE)) + 1
    assert not report.skipped
    cap = model.config.final_logit_softcapping
    hidden = jax.random.normal(jax.random.key(0), (1, 2, 48))
    expected = cap * np.tanh(np.asarray(hidden) @ head.T.astype(np.float32) / cap)
    np.testing.assert_allclose(model.logits(hidden), expected, rtol=1e-5, atol=1e-4)
    save_hf(tmp_path / "saved", model, tmp_path / "given" / "config.json")
    assert read_config(tmp_path / "saved")["tie_word_embeddings"] is False
    assert_same_bytes(read_tensors(tmp_path / "saved"), read_tensors(tmp_path / "given"))
    again, _ = load_hf_into(tmp_path / "saved", abstract(read_config(tmp_path / "saved")))
    np.testing.assert_array_equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_a_head_that_equals_the_table_is_skipped(dtype, tmp_path):
    table = read_tensors(FIXTURES / DENSE)[TABLE]
    model, report = loaded(tmp_path, DENSE, {HEAD: table.astype(dtype)})
    assert report.skipped == {HEAD: 1}
    assert model.config.tie_word_embeddings is True


def test_a_head_that_differs_at_its_end_alone(tmp_path, monkeypatch):
    """The tables are compared in parts, of which the last is the shortest."""
    monkeypatch.setattr("g4attn_jax.checkpoint.hf_tensors._COMPARED_AT_ONCE", 100)
    head = read_tensors(FIXTURES / DENSE)[TABLE].copy()
    head[-1, -1] += 1
    model, _ = loaded(tmp_path, DENSE, {HEAD: head})
    assert model.config.tie_word_embeddings is False


def test_a_tied_model_given_stays_tied(tmp_path):
    config = read_config(FIXTURES / DENSE)
    model = abstract(config)
    load_hf_into(
        write(tmp_path, config, read_tensors(FIXTURES / DENSE) | {HEAD: other_head()}), model
    )
    assert model.config.tie_word_embeddings is True
    assert not hasattr(model, "lm_head")


def test_heads_that_do_not_fit(tmp_path):
    untied = {"tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match=r"^the checkpoint lacks lm_head\.weight"):
        loaded(tmp_path / "lacks", DENSE, config=untied)
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight has shape \(127, 48\)"):
        loaded(tmp_path / "shape", DENSE, {HEAD: other_head()[1:]})
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight has dtype I8"):
        loaded(tmp_path / "dtype", DENSE, {HEAD: other_head().astype(np.int8)})


def test_a_head_of_its_own_is_trained(tmp_path):
    model, _ = loaded(tmp_path, DENSE, {HEAD: other_head()})

    def loss(model):
        hidden = jnp.ones((1, 2, 48))
        return -jax.nn.log_softmax(model.logits(hidden))[..., 3].mean()

    before = loss(model)
    gradients = nnx.grad(loss)(model)
    of_head = gradients["lm_head"]["weight"][...]
    assert np.abs(of_head.astype(np.float32)).max() > 1e-3
    assert not np.any(gradients["embed_tokens"]["weight"][...])
    model.lm_head.weight[...] -= of_head
    assert loss(model) < before


def test_a_tied_head_has_no_parameter():
    config = read_config(FIXTURES / DENSE)
    assert "lm_head.weight" not in parameters(abstract(config))
    untied = abstract(config | {"tie_word_embeddings": False})
    assert parameters(untied)["lm_head.weight"].get_value().shape == (128, 48)
    replaced = dataclasses.replace(untied.config, tie_word_embeddings=True)
    assert replaced == abstract(config).config
