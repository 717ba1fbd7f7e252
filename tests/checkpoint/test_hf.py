"""Loading and saving Hugging Face directories; the fixtures come from transformers."""

import collections
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config
from g4attn_jax.checkpoint import CheckpointError, load_hf_into, save_hf
from g4attn_jax.checkpoint.loading import parameters
from tests.checkpoint.directories import (
    FIXTURES,
    MODELS,
    abstract,
    assert_same_bytes,
    in_two,
    read_config,
    read_index,
    read_tensors,
    write,
)
from tests.everyday import everyday


def values(model):
    return {name: np.asarray(variable[...]) for name, variable in parameters(model).items()}


def load_fixture(name, **kwargs):
    return load_hf_into(FIXTURES / name, abstract(read_config(FIXTURES / name), **kwargs))


@everyday()
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_byte_equal(name, tmp_path):
    model, report = load_fixture(name)
    expected = read_tensors(FIXTURES / name)
    assert report.loaded == len(expected)
    assert report.parameters == len(parameters(model))
    assert report.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert not report.skipped
    save_hf(tmp_path / "saved", model, FIXTURES / name / "config.json")
    assert_same_bytes(read_tensors(tmp_path / "saved"), expected)
    saved = read_config(tmp_path / "saved")
    assert saved.pop("architectures") == [
        "Gemma4UnifiedForCausalLM" if name == "gemma-4-12b" else "Gemma4ForCausalLM"
    ]
    assert saved.pop("dtype") == "bfloat16"
    assert saved == read_config(FIXTURES / name)


@everyday("12b")
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_in_shards(name, tmp_path):
    model, _ = load_fixture(name)
    expected = read_tensors(FIXTURES / name)
    limit = 40_000
    save_hf(tmp_path, model, read_config(FIXTURES / name), max_shard_bytes=limit)
    assert_same_bytes(read_tensors(tmp_path), expected)
    weight_map = read_index(tmp_path)
    assert weight_map.keys() == expected.keys()
    sizes = collections.Counter()
    for tensor, file in weight_map.items():
        sizes[file] += expected[tensor].nbytes
    largest = max(value.nbytes for value in values(model).values())
    assert len(sizes) > 3
    assert max(sizes.values()) <= max(limit, largest)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    again, _ = load_hf_into(tmp_path, abstract(read_config(tmp_path)))
    for path, value in values(again).items():
        np.testing.assert_array_equal(value, values(model)[path], err_msg=path)


@everyday("12b")
@pytest.mark.parametrize("name", MODELS)
def test_attention_as_its_own_loader_packs_it(name):
    model, _ = load_fixture(name)
    tensors = read_tensors(FIXTURES / name)
    for index, layer in enumerate(model.layers):
        attention = Gemma4Attention(model.config, index, rngs=nnx.Rngs(1))
        prefix = f"model.layers.{index}.self_attn."
        attention.load_hf(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        for path, value in values(attention).items():
            np.testing.assert_array_equal(value, values(layer.attention)[path], err_msg=path)


def test_the_rest_by_its_formula():
    """Mistakes that neither Gemma4Attention nor a round trip of load and save would show."""
    model, _ = load_fixture("gemma-4-26b-a4b")
    tensors = read_tensors(FIXTURES / "gemma-4-26b-a4b")
    layer, at = values(model.layers[1]), "model.layers.1."
    x = np.random.default_rng(0).normal(size=model.config.hidden_size).astype(np.float32)
    for i, row in enumerate(("gate", "up")):
        expected = tensors[f"{at}mlp.{row}_proj.weight"].astype(np.float32) @ x
        given = x @ layer["mlp.gate_up_proj.weight"][:, i].astype(np.float32)
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
    expert = 5
    gate_up = tensors[f"{at}experts.gate_up_proj"][expert].astype(np.float32) @ x
    given = np.einsum("e,ecf->cf", x, layer["moe.gate_up_proj.weight"][expert].astype(np.float32))
    np.testing.assert_allclose(given.ravel(), gate_up, rtol=1e-5, atol=1e-5)
    half = gate_up[: len(gate_up) // 2]
    down = tensors[f"{at}experts.down_proj"][expert].astype(np.float32) @ half
    given = half @ layer["moe.down_proj.weight"][expert].astype(np.float32)
    np.testing.assert_allclose(given, down, rtol=1e-5, atol=1e-5)


def multimodal(name):
    """A fixture as published files are: towers beside the text model, unused K and V in it."""
    config = read_config(FIXTURES / name)
    text = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in read_tensors(FIXTURES / name).items()
    }
    one = np.ones((2, 3), jnp.bfloat16)
    skipped = {"lm_head.weight": text["model.language_model.embed_tokens.weight"]}
    for i in range(3):
        skipped[f"model.vision_tower.encoder.layers.{i}.self_attn.k_proj.linear.weight"] = one
        skipped[f"model.audio_tower.layers.{i}.norm.weight"] = one
    skipped["model.embed_vision.embedding_projection.weight"] = one
    skipped["model.audio_tower.counter"] = np.ones(1, np.int64)
    parsed = Gemma4Config.from_hf(config)
    first_shared = parsed.num_hidden_layers - parsed.num_kv_shared_layers
    for layer in range(first_shared, parsed.num_hidden_layers):
        for unused in ("k_proj", "v_proj", "k_norm"):
            skipped[f"model.language_model.layers.{layer}.self_attn.{unused}.weight"] = one
    return {"model_type": "gemma4", "text_config": config}, text, skipped


@pytest.mark.parametrize("name", ["gemma-4-e2b", "gemma-4-26b-a4b"])
def test_multimodal_files(name, tmp_path):
    config, text, skipped = multimodal(name)
    write(tmp_path / "given", config, *in_two(text | skipped))
    model, report = load_hf_into(tmp_path / "given", abstract(config))
    shared = config["text_config"]["num_kv_shared_layers"]
    expected = {
        "lm_head.weight": 1,
        "model.vision_tower.": 3,
        "model.audio_tower.": 4,
        "model.embed_vision.": 1,
    }
    if shared:
        expected |= {
            f"model.language_model.layers.*.self_attn.{unused} (KV-shared)": shared
            for unused in ("k_proj", "v_proj", "k_norm")
        }
    assert report.skipped == expected
    assert report.loaded == len(text)
    save_hf(tmp_path / "saved", model, config)
    assert_same_bytes(
        {
            n.replace("model.", "model.language_model.", 1): t
            for n, t in read_tensors(tmp_path / "saved").items()
        },
        text,
    )
    assert read_config(tmp_path / "saved")["model_type"] == "gemma4_text"


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_files_of_models_without_head(prefix, tmp_path):
    config = read_config(FIXTURES / "gemma-4-e4b")
    tensors = read_tensors(FIXTURES / "gemma-4-e4b")
    renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    _, report = load_hf_into(write(tmp_path, config, renamed), abstract(config))
    assert report.loaded == len(tensors)


@everyday()
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float16])
def test_the_model_decides_dtypes(param_dtype):
    exact, _ = load_fixture("gemma-4-e4b")
    cast, _ = load_fixture("gemma-4-e4b", param_dtype=param_dtype)
    for path, value in values(cast).items():
        np.testing.assert_array_equal(value, values(exact)[path].astype(param_dtype))


def test_a_real_model_is_left_as_it_is():
    model, _ = load_fixture("gemma-4-e4b")
    before = values(model)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model))
    nnx.update(model, zeros)
    loaded, _ = load_hf_into(FIXTURES / "gemma-4-e4b", model)
    assert not values(model)["embed_tokens.weight"].any()
    for path, value in values(loaded).items():
        np.testing.assert_array_equal(value, before[path])
    assert not any(variable[...].committed for variable in parameters(loaded).values())


def test_weights_outlive_the_file(tmp_path):
    config = read_config(FIXTURES / "gemma-4-e4b")
    tensors = read_tensors(FIXTURES / "gemma-4-e4b")
    model, _ = load_hf_into(write(tmp_path, config, tensors), abstract(config))
    before = values(model)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as open_file:
        open_file.write(bytes(file.stat().st_size))
    for path, variable in parameters(model).items():
        np.testing.assert_array_equal(variable[...], before[path])


def test_progress_counts_bytes():
    calls = []
    model = abstract(read_config(FIXTURES / "gemma-4-31b"))
    _, report = load_hf_into(
        FIXTURES / "gemma-4-31b", model, progress=lambda *call: calls.append(call)
    )
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(set(done))
    assert len(done) == report.parameters
    assert set(totals) == {report.bytes} == {done[-1]}


def test_the_bar_is_drawn_on_terminals_alone(capsys, monkeypatch):
    load_fixture("gemma-4-e4b")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_fixture("gemma-4-e4b")
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("\rloading [")
    assert err.endswith("of 0.00 GB\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 9}, "config.json has sliding_window = 9"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"model_type": "llama"}, "config.json: model_type is 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"final_logit_softcapping": None}, "softcapping = None; the model was built with 30"),
    ],
)
def test_the_config_of_another_model_is_refused(change, message, tmp_path):
    config = read_config(FIXTURES / "gemma-4-e4b")
    tensors = read_tensors(FIXTURES / "gemma-4-e4b")
    write(tmp_path / "given", config | change, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_hf_into(tmp_path / "given", abstract(config))
    model, _ = load_fixture("gemma-4-e4b")
    with pytest.raises(CheckpointError, match=message):
        save_hf(tmp_path / "saved", model, config | change)
    assert not (tmp_path / "saved").exists()


def test_a_last_layer_that_slides(tmp_path):
    """Warned of once, where the config is read; what is saved says what the model has."""
    config, tensors = read_config(FIXTURES / "gemma-4-e4b"), read_tensors(FIXTURES / "gemma-4-e4b")
    types = config["layer_types"]
    given = config | {"layer_types": [*types[:-1], "sliding_attention"]}
    with pytest.warns(UserWarning, match="the last, is 'sliding_attention'"):
        model = abstract(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_hf_into(write(tmp_path / "given", given, tensors), model)
        save_hf(tmp_path / "saved", model, given)
    assert model.layers[-1].attention.spec.sliding_window is None
    assert read_config(tmp_path / "saved")["layer_types"] == types


def test_save_does_not_mix_checkpoints(tmp_path):
    model, _ = load_fixture("gemma-4-e4b")
    config = read_config(FIXTURES / "gemma-4-e4b")
    save_hf(tmp_path, model, config)
    with pytest.raises(CheckpointError, match=r"has model\.safetensors; save to another"):
        save_hf(tmp_path, model, config, max_shard_bytes=1000)


@pytest.mark.parametrize("limit", [0, -1, 5e9, True, "5GB", None])
def test_a_size_of_shards_that_is_none(limit, tmp_path):
    model, _ = load_fixture("gemma-4-e4b")
    config = read_config(FIXTURES / "gemma-4-e4b")
    message = f"^max_shard_bytes is {re.escape(repr(limit))}; accepted: "
    with pytest.raises(CheckpointError, match=message):
        save_hf(tmp_path / "saved", model, config, max_shard_bytes=limit)
    assert not (tmp_path / "saved").exists()


def test_an_abstract_model_is_not_saved(tmp_path):
    model, _ = load_fixture("gemma-4-e4b")
    for layer in model.layers[1:3]:
        layer.input_norm.set_value(jax.ShapeDtypeStruct((2,), jnp.bfloat16))
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_norm is a ShapeDtypeStruct"):
        save_hf(tmp_path / "saved", model, read_config(FIXTURES / "gemma-4-e4b"))
    assert not (tmp_path / "saved").exists()


def test_a_file_is_no_directory(tmp_path):
    model, _ = load_fixture("gemma-4-e4b")
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "saved"):
        with pytest.raises(CheckpointError, match=f"{directory} cannot be made a directory"):
            save_hf(directory, model, read_config(FIXTURES / "gemma-4-e4b"))


def test_of_one_file_and_an_index_the_file_is_read(tmp_path):
    config = read_config(FIXTURES / "gemma-4-e4b")
    tensors = read_tensors(FIXTURES / "gemma-4-e4b")
    zeros = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    write(tmp_path, config, *in_two(zeros))
    write(tmp_path, config, tensors)
    model, _ = load_hf_into(tmp_path, abstract(config))
    np.testing.assert_array_equal(model.norm[...], tensors["model.norm.weight"])


def test_a_parameter_that_the_format_lacks_is_named(tmp_path):
    model, _ = load_fixture("gemma-4-e4b")
    model.layers[1].bias = nnx.Param(jnp.zeros(2))
    message = r"no place for layers\.1\.bias"
    with pytest.raises(CheckpointError, match=message):
        load_hf_into(FIXTURES / "gemma-4-e4b", model)
    with pytest.raises(CheckpointError, match=message):
        save_hf(tmp_path / "saved", model, read_config(FIXTURES / "gemma-4-e4b"))
