"""Quantised checkpoints, recognised and refused: weights are read in floating point alone."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from g4attn_jax.checkpoint.errors import CheckpointError

_ACCEPTED = "accepted: weights in bfloat16, float16 or float32"
# Of compressed-tensors, FP8, GPTQ, AWQ, bitsandbytes and ModelOpt.
_TENSOR = re.compile(
    r"\.(weight_packed|weight_scale|weight_scale_inv|weight_scale_2|weight_zero_point|qweight|"
    r"qzeros|scales|SCB|weight\.(absmax|quant_map|quant_state\..*))$"
)
_SAID = (
    "quant_method",
    "format",
    "quant_algo",
    "fmt",
    "bits",
    "group_size",
    "weight_block_size",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
)


def check_not_quantised(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuses a checkpoint whose weights are quantised, and names the format.

    Args:
        config: contents of `config.json`.
        names: of its tensors.

    Raises:
        CheckpointError: there is a `quantization_config` of weights, in the config or its
            `text_config`, or a tensor of a quantised weight.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        said = place.get("quantization_config")
        if said and not _is_of_caches_alone(said):
            raise CheckpointError(
                f"the checkpoint is quantised, quantization_config says {_how(said)}; {_ACCEPTED}"
            )
    for name in names:
        if found := _TENSOR.search(name):
            raise CheckpointError(
                f"the checkpoint is quantised: it has {name}, and no quantization_config says how "
                f"{found[1]} is meant; {_ACCEPTED}"
            )


def _is_of_caches_alone(said):
    """Whether compressed-tensors quantises the KV cache of weights that are whole."""
    if not isinstance(said, Mapping) or said.get("quant_method") != "compressed-tensors":
        return False
    return bool(said.get("kv_cache_scheme")) and not said.get("config_groups")


def _how(said):
    if not isinstance(said, Mapping):
        return repr(said)
    parts = [f"{key} {said[key]!r}" for key in _SAID if said.get(key)]
    groups = said.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            parts.append(f"{name} {weights.get('type')} of {weights.get('num_bits')} bits")
    return ", ".join(parts) or repr(dict(said))
