"""Damaged directories: every damage is refused before a weight is read, and named."""

import json
import re
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from g4attn_jax.checkpoint import CheckpointError, load_hf_into
from g4attn_jax.checkpoint.files import StoredTensor
from tests.checkpoint.directories import (
    FIXTURES,
    abstract,
    in_two,
    read_config,
    read_index,
    read_tensors,
    write,
    write_index,
)

# One dense model with a KV-shared tail, and one with experts.
CONFIGS = {name: read_config(FIXTURES / name) for name in ("gemma-4-e4b", "gemma-4-26b-a4b")}
TENSORS = {name: read_tensors(FIXTURES / name) for name in CONFIGS}
ABSTRACT = {name: abstract(config) for name, config in CONFIGS.items()}
DENSE = "gemma-4-e4b"
FILE = "model.safetensors"
EMBED = "model.embed_tokens.weight"
SECOND = "model-00002-of-00002.safetensors"

fuzz = settings(max_examples=40, deadline=None)
models = st.sampled_from(sorted(CONFIGS))


def refused(folder, *named, model=DENSE):
    with (
        mock.patch.object(StoredTensor, "read", side_effect=AssertionError("was read")),
        pytest.raises(CheckpointError) as error,
    ):
        load_hf_into(folder, ABSTRACT[model])
    for name in named:
        assert name in str(error.value), error.value


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    """Hypothesis wants a folder for every example, not for every test."""
    return lambda: tmp_path_factory.mktemp("checkpoint")


def pick(data, model, *, but=()):
    return data.draw(st.sampled_from(sorted(TENSORS[model].keys() - set(but))))


def damaged(folder, model, tensors, data):
    """The tensors in one file, or in two."""
    shards = in_two(tensors) if data.draw(st.booleans()) else [tensors]
    return write(folder, CONFIGS[model], *shards)


@fuzz
@given(st.data(), models)
def test_a_missing_tensor(new_folder, data, model):
    name = pick(data, model)
    rest = {n: t for n, t in TENSORS[model].items() if n != name}
    named = "embed_tokens.weight" if name == EMBED else name
    refused(damaged(new_folder(), model, rest, data), "lacks", named, model=model)


@fuzz
@given(st.data(), models, st.text("abz._0", min_size=1, max_size=12))
def test_an_extra_tensor(new_folder, data, model, suffix):
    name = data.draw(st.sampled_from(["", "model.", "model.layers.0.", EMBED])) + suffix
    if name in TENSORS[model]:
        return
    tensors = TENSORS[model] | {name: np.ones(3, np.float32)}
    refused(damaged(new_folder(), model, tensors, data), name, "no such", model=model)


@fuzz
@given(st.data(), models)
def test_a_renamed_tensor(new_folder, data, model):
    name = pick(data, model, but=[EMBED])
    tensors = dict(TENSORS[model])
    tensors[name.replace("model.", "model.other.", 1)] = tensors.pop(name)
    refused(damaged(new_folder(), model, tensors, data), "lacks", name, model=model)


@fuzz
@given(st.data(), models)
def test_a_wrong_shape(new_folder, data, model):
    name = pick(data, model)
    tensor = TENSORS[model][name]
    change = data.draw(st.sampled_from(["shorter", "longer", "flat", "transposed", "deeper"]))
    if change == "transposed" and tensor.shape == tensor.shape[::-1]:
        return
    if change == "flat" and tensor.ndim == 1:
        return
    wrong = {
        "shorter": lambda: tensor[:-1],
        "longer": lambda: np.concatenate([tensor, tensor]),
        "flat": tensor.ravel,
        "transposed": lambda: tensor.T,
        "deeper": lambda: tensor[None],
    }[change]()
    folder = damaged(
        new_folder(), model, TENSORS[model] | {name: np.ascontiguousarray(wrong)}, data
    )
    refused(folder, f"{name} has shape {wrong.shape}", str(tensor.shape), model=model)


@fuzz
@given(
    st.data(),
    models,
    st.sampled_from(["int8", "int32", "uint8", "bool", "float64", "float8_e4m3fn"]),
)
def test_a_wrong_dtype(new_folder, data, model, dtype):
    name = pick(data, model)
    wrong = TENSORS[model][name].astype(getattr(ml_dtypes, dtype, dtype))
    folder = damaged(new_folder(), model, TENSORS[model] | {name: wrong}, data)
    refused(folder, f"{name} has dtype", "accepted: bfloat16", model=model)


@fuzz
@given(st.data())
def test_a_truncated_file(new_folder, data):
    folder = damaged(new_folder(), DENSE, TENSORS[DENSE], data)
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refused(folder, str(file))


@fuzz
@given(st.binary(min_size=1, max_size=100))
def test_a_file_that_is_too_long(new_folder, extra):
    folder = write(new_folder(), CONFIGS[DENSE], TENSORS[DENSE])
    with (folder / FILE).open("ab") as file:
        file.write(extra)
    refused(folder, str(folder / FILE))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_means_the_same(new_folder, data):
    folder = write(new_folder(), CONFIGS[DENSE], TENSORS[DENSE])
    content = bytearray((folder / FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    (folder / FILE).write_bytes(content)
    try:
        _, report = load_hf_into(folder, ABSTRACT[DENSE])
    except CheckpointError:
        return
    assert report.loaded == len(TENSORS[DENSE])


def test_a_tensor_twice_in_a_header(tmp_path):
    folder = write(tmp_path, CONFIGS[DENSE], TENSORS[DENSE])
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps({EMBED: json.loads(header)[EMBED]}).encode()[1:-1]
    header = header[:-1] + b"," + entry + b"}"
    (folder / FILE).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    refused(folder, FILE)


def test_the_same_tensor_in_two_shards(tmp_path):
    first, second = in_two(TENSORS[DENSE])
    name = sorted(first)[0]
    write(tmp_path, CONFIGS[DENSE], first, second | {name: first[name]})
    refused(tmp_path, "model-00001-of-00002.safetensors", name)


def test_two_language_models(tmp_path):
    tensors = TENSORS[DENSE]
    second = {name.replace("model.", "language_model.", 1): t for name, t in tensors.items()}
    refused(write(tmp_path, CONFIGS[DENSE], tensors | second), EMBED, f"language_{EMBED}")


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_one_tensor_under_two_prefixes(tmp_path, prefix):
    name = "norm.weight"
    tensors = TENSORS[DENSE] | {prefix + name: TENSORS[DENSE]["model." + name]}
    refused(write(tmp_path, CONFIGS[DENSE], tensors), f"the checkpoint has {prefix}{name};")


def test_an_index_that_names_a_missing_shard(tmp_path):
    write(tmp_path, CONFIGS[DENSE], *in_two(TENSORS[DENSE]))
    (tmp_path / SECOND).unlink()
    refused(tmp_path, f"names {SECOND}", str(tmp_path))


def test_an_index_that_names_a_tensor_that_is_not_in_its_shard(tmp_path):
    write(tmp_path, CONFIGS[DENSE], *in_two(TENSORS[DENSE]))
    write_index(tmp_path, read_index(tmp_path) | {"model.other": SECOND})
    refused(tmp_path, f"{SECOND} has model.other")


def test_a_shard_with_a_tensor_that_the_index_lacks(tmp_path):
    write(tmp_path, CONFIGS[DENSE], *in_two(TENSORS[DENSE]))
    weight_map = read_index(tmp_path)
    name = next(name for name, file in weight_map.items() if file == SECOND)
    del weight_map[name]
    write_index(tmp_path, weight_map)
    refused(tmp_path, f"{SECOND} has {name}")


def test_an_index_that_leads_out_of_the_directory(tmp_path):
    folder = write(tmp_path / "inner", CONFIGS[DENSE], *in_two(TENSORS[DENSE]))
    save_file({"model.other": np.ones(2, np.float32)}, tmp_path / "outer.safetensors")
    write_index(folder, read_index(folder) | {"model.other": "../outer.safetensors"})
    refused(folder, "model.other", "'../outer.safetensors'")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"weight_map": []}', "\xff", "[" * 10**5]
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(tmp_path, file, text):
    write(tmp_path, CONFIGS[DENSE], *in_two(TENSORS[DENSE]))
    (tmp_path / file).write_text(text, encoding="latin-1")
    refused(tmp_path, file)


@pytest.mark.parametrize("file", [FILE, "config.json"])
def test_a_missing_file(tmp_path, file):
    write(tmp_path, CONFIGS[DENSE], TENSORS[DENSE])
    (tmp_path / file).unlink()
    refused(tmp_path, str(tmp_path), file)


def test_no_directory(tmp_path):
    refused(tmp_path / "none", f"{tmp_path / 'none'} is no directory")


def test_long_lists_are_cut(tmp_path):
    kept = {name: t for name, t in TENSORS[DENSE].items() if "layers" not in name}
    folder = write(tmp_path, CONFIGS[DENSE], kept)
    with pytest.raises(CheckpointError, match=re.compile(r"lacks .* and \d+ more$")) as error:
        load_hf_into(folder, ABSTRACT[DENSE])
    assert len(str(error.value)) < 600
