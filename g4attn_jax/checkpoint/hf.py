"""Hugging Face directories: `config.json` and safetensors files, read and written.

Source of names and shapes: `Gemma4TextModel` and its modules in Hugging Face transformers 5.24.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from g4attn_jax.checkpoint.errors import CheckpointError, listed
from g4attn_jax.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_json, stored_tensors
from g4attn_jax.checkpoint.hf_tensors import HEAD, same_values, sorted_tensors
from g4attn_jax.checkpoint.loading import Model, Progress, check, load, parameters, table_of
from g4attn_jax.checkpoint.packing import Packed
from g4attn_jax.checkpoint.quantised import check_not_quantised
from g4attn_jax.checkpoint.report import LoadReport, terminal_bar
from g4attn_jax.checks import check_integer
from g4attn_jax.config import AttentionSpec, Gemma4Config
from g4attn_jax.hf_config import text_config_of

_ARCHITECTURES = {
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
}

_MODEL = {
    "embed_tokens.weight": Packed({"embed_tokens.weight": "vocab, embed"}),
    "per_layer_inputs.embed_tokens.weight": Packed(
        {"embed_tokens_per_layer.weight": "vocab, layers per_layer"}
    ),
    "per_layer_inputs.projection.weight": Packed(
        {"per_layer_model_projection.weight": "layers per_layer, embed"}
    ),
    "per_layer_inputs.norm": Packed({"per_layer_projection_norm.weight": "per_layer"}),
    "norm": Packed({"norm.weight": "embed"}),
}
# Beside the language model, and under no prefix.
_OWN_HEAD = {"lm_head.weight": Packed({HEAD: "vocab, embed"})}
_LAYER = {
    "attention.o_proj.weight": Packed({"self_attn.o_proj.weight": "embed, heads head_dim"}),
    "attention.q_norm": Packed({"self_attn.q_norm.weight": "head_dim"}),
    "attention.k_norm": Packed({"self_attn.k_norm.weight": "head_dim"}),
    "input_norm": Packed({"input_layernorm.weight": "embed"}),
    "post_attention_norm": Packed({"post_attention_layernorm.weight": "embed"}),
    "pre_feedforward_norm": Packed({"pre_feedforward_layernorm.weight": "embed"}),
    "post_feedforward_norm": Packed({"post_feedforward_layernorm.weight": "embed"}),
    "mlp.gate_up_proj.weight": Packed(
        {"mlp.gate_proj.weight": "gate_up mlp, embed", "mlp.up_proj.weight": "gate_up mlp, embed"},
        "gate_up",
        (1, 1),
    ),
    "mlp.down_proj.weight": Packed({"mlp.down_proj.weight": "embed, mlp"}),
    "moe.router_scale": Packed({"router.scale": "embed"}),
    "moe.router_proj.weight": Packed({"router.proj.weight": "experts, embed"}),
    "moe.per_expert_scale": Packed({"router.per_expert_scale": "experts"}),
    "moe.gate_up_proj.weight": Packed(
        {"experts.gate_up_proj": "experts, gate_up expert_mlp, embed"}
    ),
    "moe.down_proj.weight": Packed({"experts.down_proj": "experts, embed, expert_mlp"}),
    "post_feedforward_norm_1": Packed({"post_feedforward_layernorm_1.weight": "embed"}),
    "pre_feedforward_norm_2": Packed({"pre_feedforward_layernorm_2.weight": "embed"}),
    "post_feedforward_norm_2": Packed({"post_feedforward_layernorm_2.weight": "embed"}),
    "per_layer_gate.weight": Packed({"per_layer_input_gate.weight": "per_layer, embed"}),
    "per_layer_projection.weight": Packed({"per_layer_projection.weight": "embed, per_layer"}),
    "post_per_layer_norm": Packed({"post_per_layer_input_norm.weight": "embed"}),
    "layer_scalar": Packed({"layer_scalar": "1"}),
}


def _qkv(spec: AttentionSpec) -> Packed:
    names = ("q_proj", "k_proj", "v_proj")[: 1 + spec.mode.num_kv_projections]
    tensors = {
        f"self_attn.{name}.weight": "kv_heads heads_per_group head_dim, embed" for name in names
    }
    return Packed(tensors, "heads_per_group", (spec.group_size, 1, 1)[: len(names)])


def packing_table(config: Gemma4Config, prefix: str) -> dict[str, Packed]:
    """Tensors of every parameter that a Gemma 4 model can have, by the parameter's path.

    Args:
        config: of the decoder, or of an assistant's layers.
        prefix: of the names of tensors.
    """
    table = _OWN_HEAD | {name: packed.under(prefix) for name, packed in _MODEL.items()}
    for layer in range(config.num_hidden_layers):
        rows = _LAYER | {"attention.qkv_proj.weight": _qkv(config.attention_spec(layer))}
        at = f"layers.{layer}."
        table |= {at + name: packed.under(prefix + at) for name, packed in rows.items()}
    return table


def load_hf_into(
    directory: str | PathLike, model: Model, *, progress: Progress | None = terminal_bar
) -> tuple[Model, LoadReport]:
    """Loads a Hugging Face checkpoint straight to the device.

    Tensors are read through memory maps and packed on the device, one parameter at a time. Beside
    the model itself that takes host and device memory for the tensors of one parameter. Tensors of
    other towers (vision, audio), and projections that KV-shared layers do not use, are not read.

    A `lm_head.weight` that equals the table is skipped. One that differs is used, as by
    transformers, though the config says that they are tied: the model returned then has a `lm_head`
    of its own, and a config that says so.

        config = Gemma4Config.from_hf(directory / "config.json")
        model = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
        model, report = load_hf_into(directory, model)

    Args:
        directory: has `config.json` and `model.safetensors`, or several files and
            `model.safetensors.index.json`, of the text model or of the multimodal one. Where both
            are there, `model.safetensors` is read alone, as transformers does.
        model: a `Gemma4Decoder`, best an abstract one (`nnx.eval_shape`, or
            `nnx.get_abstract_model` for one that is sharded): its weights are not used, and real
            ones are held beside the new ones for as long as the caller keeps them. It decides
            dtypes, to which tensors are cast, and shardings.
        progress: called with (bytes done, bytes in all) after each parameter. As it is, a bar on a
            terminal and nothing elsewhere; None is quiet.

    Returns:
        (model, report): a new model, and what was loaded and skipped.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt; a tensor is missing, surplus,
            misshapen, stored twice, quantised or not floating point; or the config is not the
            model's. The message names it, and no weight is in the model yet.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory")
    config = read_json(directory / "config.json")
    stored = stored_tensors(directory)
    check_not_quantised(config, stored)
    check_config(config, model.config, Gemma4Config)
    found = sorted_tensors(stored, model.config)
    table = packing_table(model.config, found.prefix)
    check(model, table, found.tensors)
    found.check_values()
    if found.head is not None:
        if same_values(found.head, found.tensors[f"{found.prefix}embed_tokens.weight"]):
            found.skipped[HEAD] += 1
        else:
            model = _with_own_head(model)
            found.tensors[HEAD] = found.head
    model, report = load(model, table, found.tensors, found.skipped, progress)
    return model, dataclasses.replace(report, loaded=report.loaded + found.num_joined)


def _with_own_head(model):
    """An untied copy of the model, whose head is a copy of its table."""
    graph, state = nnx.split(model)
    untied = nnx.merge(graph, state, copy=True)
    untied.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    untied.lm_head = nnx.clone(untied.embed_tokens)
    return untied


def save_hf(
    directory: str | PathLike,
    model: nnx.Module,
    config: str | PathLike | Mapping[str, Any],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Saves a model as a Hugging Face directory of the text model (`Gemma4ForCausalLM`).

    Tensors that `load_hf` read into the same dtype are written byte by byte as they were.

    Args:
        directory: made if it is not there; must not have a checkpoint in it.
        model: a `Gemma4Decoder`, no abstract one.
        config: contents or path of the `config.json` of the model, of the text model or the
            multimodal one: it has more fields than `Gemma4Config` keeps.
        max_shard_bytes: 1 or more. A larger model is split into files of at most this size (a
            parameter that is larger has one to itself), with an index. One file is held in host
            memory at a time.

    Raises:
        CheckpointError: the directory has a checkpoint or cannot be made, the config is not the
            model's, a parameter of the model is abstract, or max_shard_bytes is no size.
    """
    directory = Path(directory)
    config = dict(config) if isinstance(config, Mapping) else read_json(Path(config))
    if model.config.tie_word_embeddings is False:
        config["tie_word_embeddings"] = False  # what `load_hf` found in spite of the config
    check_config(config, model.config, Gemma4Config)
    _check_limit(max_shard_bytes)
    _check_values(model)
    if directory.is_dir() and (old := {file.name for file in directory.glob("*.safetensors*")}):
        raise CheckpointError(f"{directory} has {listed(old)}; save to another directory")
    table = table_of(model, packing_table(model.config, "model."))
    shards = list(_shards(model, max_shard_bytes))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be made a directory: {error.strerror}"
        ) from error
    _write_tensors(directory, model, table, shards)
    _write_json(directory / "config.json", _text_config(config, model))


def _write_tensors(directory, model, table, shards):
    """Writes the files, and an index where they are several."""
    weight_map, total, values = {}, 0, parameters(model)
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            tensor: np.asarray(value)
            for name in names
            for tensor, value in table[name].unpack(values[name][...]).items()
        }
        # transformers refuses files that do not say so.
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / INDEX_FILE, index)


def _text_config(config, model):
    """Contents of `config.json` of the text model alone."""
    text = text_config_of(config)
    text.pop("quantization_config", None)
    return text | {
        "layer_types": list(model.config.layer_types),
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "architectures": [_ARCHITECTURES[text["model_type"]]],
        "dtype": str(model.embed_tokens.weight.dtype),
    }


def _shards(model: nnx.Module, max_bytes: int) -> Iterator[list[str]]:
    """Names of parameters, file by file."""
    names, size = [], 0
    for name, variable in parameters(model).items():
        value = variable.get_value()
        num_bytes = value.size * value.dtype.itemsize
        if names and size + num_bytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def check_config(given, model_config, config_class, fields=vars):
    """Refuses a `config.json` of another model.

    A field that is None in one of the two is not compared.

    Args:
        given: contents of the file.
        model_config: what the model was built with.
        config_class: of which `model_config` is, with the method `from_hf`.
        fields: makes of a config its fields, by the names they have in the file.

    Raises:
        CheckpointError: a field differs, or the contents are no such config.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever built the model was warned
            in_file = fields(config_class.from_hf(given))
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    for name, ours in fields(model_config).items():
        theirs = in_file[name]
        # None is a value of this one: logits without a cap.
        unknown = None in (theirs, ours) and not name.endswith("final_logit_softcapping")
        if theirs != ours and not unknown:
            raise CheckpointError(
                f"config.json has {name} = {theirs!r}; the model was built with {ours!r}"
            )


def _check_limit(max_shard_bytes):
    try:
        check_integer("max_shard_bytes", max_shard_bytes)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_values(model):
    for name, variable in parameters(model).items():
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            raise CheckpointError(f"{name} is a ShapeDtypeStruct; accepted: an array")


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
