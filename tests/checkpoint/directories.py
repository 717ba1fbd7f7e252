"""Checkpoints that tests read: the fixtures, and changed copies of them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from g4attn_jax import Gemma4Config
from g4attn_jax.model.decoder import Gemma4Decoder

FIXTURES = Path(__file__).parents[1] / "golden_model"
MODELS = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")

Tensors = dict[str, np.ndarray]


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def read_tensors(folder: Path) -> Tensors:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def write(folder: Path, config: dict, *shards: Tensors) -> Path:
    """A directory of one file, or of several and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder, weight_map)
    return folder


def read_index(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def write_index(folder: Path, weight_map: dict) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_two(tensors: Tensors) -> list[Tensors]:
    """Every other tensor in a file of its own, so that packed ones lie in both."""
    items = sorted(tensors.items())
    return [dict(items[::2]), dict(items[1::2])]


def abstract(config: dict, param_dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Gemma4Decoder:
    parsed = Gemma4Config.from_hf(config)
    return nnx.eval_shape(
        lambda: Gemma4Decoder(parsed, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=param_dtype)
    )


def assert_same_bytes(tensors: Tensors, expected: Tensors) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert tensor.tobytes() == expected[name].tobytes(), name
