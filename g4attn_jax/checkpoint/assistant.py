"""Hugging Face directories of assistants, read.

Source of names and shapes: `Gemma4AssistantForCausalLM` of Hugging Face transformers 5.24.
"""

import dataclasses
from os import PathLike
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.checkpoint import hf
from g4attn_jax.checkpoint.errors import CheckpointError
from g4attn_jax.checkpoint.files import read_json, stored_tensors
from g4attn_jax.checkpoint.hf_tensors import HEAD, same_values, sorted_tensors
from g4attn_jax.checkpoint.loading import Model, Progress, check, load
from g4attn_jax.checkpoint.packing import Packed
from g4attn_jax.checkpoint.quantised import check_not_quantised
from g4attn_jax.checkpoint.report import LoadReport, terminal_bar
from g4attn_jax.config import Gemma4Config

_PREFIX = "model."
_TOKEN_ORDERING = "masked_embedding.token_ordering"
_ASSISTANT = {
    "pre_projection.weight": Packed({"pre_projection.weight": "embed, target_embed"}),
    "post_projection.weight": Packed({"post_projection.weight": "target_embed, embed"}),
    "centroids.weight": Packed({"masked_embedding.centroids.weight": "centroids, embed"}),
}


def packing_table(config: Gemma4Config) -> dict[str, Packed]:
    """Tensors of every parameter that an assistant can have, by the parameter's path.

    Args:
        config: of the assistant's layers.
    """
    return hf.packing_table(config, _PREFIX) | _ASSISTANT


def load_assistant_into(
    directory: str | PathLike, model: Model, *, progress: Progress | None = terminal_bar
) -> tuple[Model, LoadReport]:
    """Loads a Hugging Face checkpoint of an assistant straight to the device, as `load_hf_into`.

        config = AssistantConfig.from_hf(directory / "config.json")
        model = nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0)))
        model, report = load_assistant_into(directory, model)

    Args:
        directory: has `config.json` and `model.safetensors`, or several files and
            `model.safetensors.index.json`; see `load_hf_into` where both are there.
        model: a `Gemma4Assistant`, best an abstract one; see `load_hf_into`.
        progress: as of `load_hf_into`.

    Returns:
        (model, report): a new model, and what was loaded and skipped.

    Raises:
        CheckpointError: as `load_hf_into`, or `token_ordering` does not have every token once.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory")
    config = model.config
    given, stored = read_json(directory / "config.json"), stored_tensors(directory)
    check_not_quantised(given, stored)
    hf.check_config(given, config, AssistantConfig, _fields)
    found = sorted_tensors(stored, config.text)
    if found.prefix != _PREFIX:
        raise CheckpointError(
            f"the checkpoint has {found.prefix}embed_tokens.weight; an assistant has "
            f"{_PREFIX}embed_tokens.weight"
        )
    ordering = None
    if config.use_ordered_embeddings:
        ordering = _token_ordering(found.tensors.pop(_TOKEN_ORDERING, None), config.text.vocab_size)
    table = packing_table(config.text)
    check(model, table, found.tensors)
    found.check_values()
    if found.head is not None:
        _check_head(found)
    model, report = load(model, table, found.tensors, found.skipped, progress)
    if ordering is None:
        return model, report
    model.token_ordering.set_value(jnp.asarray(ordering, jnp.int32))
    return model, dataclasses.replace(report, loaded=report.loaded + 1)


def _check_head(found):
    table = f"{_PREFIX}embed_tokens.weight"
    if not same_values(found.head, found.tensors[table]):
        raise CheckpointError(
            f"{HEAD} differs from {table}; accepted: equal ones, as an assistant's table is its "
            "head"
        )
    found.skipped[HEAD] += 1


def _token_ordering(tensor, vocab_size):
    if tensor is None:
        raise CheckpointError(f"the checkpoint lacks {_TOKEN_ORDERING}")
    if tensor.shape != (vocab_size,):
        raise CheckpointError(
            f"{_TOKEN_ORDERING} has shape {tensor.shape}; this model needs {(vocab_size,)}"
        )
    if not tensor.is_integer:
        raise CheckpointError(
            f"{_TOKEN_ORDERING} has dtype {tensor.dtype}; accepted: int32 and int64"
        )
    ordering = tensor.read()
    if not np.array_equal(np.sort(ordering), np.arange(vocab_size)):
        raise CheckpointError(
            f"{_TOKEN_ORDERING} does not have every token from 0 to {vocab_size - 1} once"
        )
    return ordering


def _fields(config):
    own = {name: value for name, value in vars(config).items() if name != "text"}
    return own | {f"text_config.{name}": value for name, value in vars(config.text).items()}
