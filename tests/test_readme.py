"""README's snippets, each run as a script of its own; only names of directories are replaced."""

import json
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from g4attn_jax import AssistantConfig, Gemma4Config, Gemma4Decoder
from g4attn_jax.checkpoint.assistant import packing_table
from g4attn_jax.checkpoint.hf import save_hf
from g4attn_jax.checkpoint.loading import parameters, table_of
from g4attn_jax.json_file import read_object
from g4attn_jax.model import Gemma4Assistant
from tests.everyday import everyday
from tests.gpu import evidence
from tests.test_speculative import ASSISTANTS, TARGETS

README = (evidence.ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
VOCABULARY = 8192  # above every token of the snippets; the published models have 262144
# What a snippet that shows a part of a program takes as given, by what it begins with.
GIVEN = {
    "from g4attn_jax.model.acceptance": """
import jax.numpy as jnp
from g4attn_jax import Contiguous
from g4attn_jax.checkpoint import load_assistant, load_hf
decoder, assistant = load_hf("DIR"), load_assistant("ASSISTANT_DIR")
cache = decoder.init_cache(dict.fromkeys(decoder.config.layer_types, Contiguous(2, 64)))
token, position, room = jnp.array([5, 7]), jnp.array([0, 0]), jnp.array([4, 2])
hidden = jnp.ones((2, decoder.config.hidden_size), decoder.dtype)
""",
    "from g4attn_jax import PageAllocator": next(
        code for code in SNIPPETS if "attention = Gemma4Attention(" in code
    ),
    "from g4attn_jax import ProjectionMode, ops": """
import jax.numpy as jnp
from g4attn_jax import KVCache
qkv, q_norm, k_norm = jnp.ones((2, 1, 2, 5, 64)), jnp.ones(64), jnp.ones(64)
cos, sin, kv = jnp.ones((2, 1, 8)), jnp.zeros((2, 1, 8)), jnp.ones((2, 1, 2, 64))
cache = KVCache(*jnp.zeros((2, 2, 32, 2, 64)))
page_table, slots = None, jnp.array([[0], [32]], jnp.int32)
positions = jnp.zeros((2, 1), jnp.int32)
""",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A decoder and an assistant with random weights, of two tiny layers each."""
    folder, assistant = (tmp_path_factory.mktemp(name) for name in ("decoder", "assistant"))
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size": VOCABULARY,
    }
    config = read_object(TARGETS / "gemma-4-31b" / "config.json") | layers
    save_hf(folder, Gemma4Decoder(Gemma4Config.from_hf(config), rngs=nnx.Rngs(0)), config)
    config = read_object(ASSISTANTS / "gemma-4-31b" / "config.json")
    config["text_config"] |= layers | {"num_kv_shared_layers": 2}
    save_assistant(assistant, config)
    return {"ASSISTANT_DIR": assistant, "DIR": folder}


def save_assistant(folder, given):
    config = AssistantConfig.from_hf(given)
    model = Gemma4Assistant(config, rngs=nnx.Rngs(1))
    table = table_of(model, packing_table(config.text))
    tensors = {
        tensor: np.asarray(value)
        for name, variable in parameters(model).items()
        for tensor, value in table[name].unpack(variable[...]).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(given))


@everyday()
@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.splitlines()[0])
def test_snippet(code, directories, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_: None)
    given = next((given for begin, given in GIVEN.items() if code.startswith(begin)), "")
    script = given + code
    for name, folder in directories.items():
        script = re.sub(rf'"{name}\b', f'"{folder}', script)
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 7
    for begin in GIVEN:
        assert any(code.startswith(begin) for code in SNIPPETS), begin
