"""Models of checkpoints in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import AssistantConfig, Gemma4Config, Gemma4Decoder
from g4attn_jax.checkpoint import (
    CheckpointError,
    LoadReport,
    load_assistant,
    load_assistant_into,
    load_deepmind,
    load_deepmind_into,
    load_hf,
    load_hf_into,
)
from g4attn_jax.model import Gemma4Assistant
from tests.checkpoint.directories import FIXTURES, abstract, read_config
from tests.checkpoint.test_deepmind import FIXTURES as DEEPMIND
from tests.checkpoint.test_deepmind import nested, read

DIRECTORY = FIXTURES / "gemma-4-e4b"
ASSISTANT = FIXTURES.parent / "golden_assistant" / "gemma-4-e4b"


def same(model, other):
    pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float32"])
def test_a_decoder(dtype):
    reports = []
    decoder = load_hf(str(DIRECTORY), dtype=dtype, on_report=reports.append, progress=None)
    expected, report = load_hf_into(DIRECTORY, abstract(read_config(DIRECTORY), jnp.dtype(dtype)))
    assert isinstance(decoder, Gemma4Decoder) and decoder.dtype == dtype
    assert same(decoder, expected)
    assert reports == [report] and isinstance(report, LoadReport)


def test_an_assistant():
    assistant = load_assistant(ASSISTANT, dtype=jnp.float32, implementation="xla")
    config = AssistantConfig.from_hf(ASSISTANT / "config.json")
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0), **options))
    assert same(assistant, load_assistant_into(ASSISTANT, model)[0])
    assert {layer.attention.implementation for layer in assistant.layers} == {"xla"}


def test_of_deepmind():
    folder = DEEPMIND / "gemma-4-e2b"
    params, config = nested(read("gemma-4-e2b")[0]), Gemma4Config.from_hf(folder / "config.json")
    decoder = load_deepmind(params, config, dtype=jnp.float32)
    expected, _ = load_deepmind_into(params, abstract(read_config(folder), jnp.float32))
    assert same(decoder, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((DIRECTORY, 1.0), TypeError, r"float given without a name; accepted: load_hf\(directory"),
        (
            (DIRECTORY, Gemma4Config.preset("gemma-4-e2b")),
            TypeError,
            r"Gemma4Config given without a name; accepted: load_hf\(directory, dtype=...\)",
        ),
        (
            (Gemma4Config.preset("gemma-4-e2b"),),
            ValueError,
            "directory is a Gemma4Config",
        ),
        ((DIRECTORY / "nowhere",), CheckpointError, "nowhere is no directory"),
        ((ASSISTANT,), CheckpointError, "config.json: .* read it with AssistantConfig"),
    ],
)
def test_wrong_guesses(arguments, error, message):
    with pytest.raises(error, match=message):
        load_hf(*arguments)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bf16", None])
def test_wrong_dtypes(dtype):
    with pytest.raises(ValueError, match=r"dtype is"):
        load_hf(DIRECTORY, dtype=dtype)


def test_wrong_guesses_of_the_others():
    with pytest.raises(TypeError, match=r"accepted: load_assistant\(directory, dtype=...\)"):
        load_assistant(ASSISTANT, None)
    with pytest.raises(CheckpointError, match=r"config.json: model_type is 'gemma4"):
        load_assistant(DIRECTORY)
    with pytest.raises(ValueError, match="config is a str"):
        load_deepmind({}, "gemma-4-e2b")
    with pytest.raises(TypeError, match=r"accepted: load_deepmind\(params, config, dtype=...\)"):
        load_deepmind({}, Gemma4Config.preset("gemma-4-e2b"), None)
