"""Resolved fields of a text config as Hugging Face writes it, in its old form or its new.

Releases of transformers before 5.15 write `global_head_dim` and `num_global_key_value_heads`, which
are of all full-attention layers. Later ones write `per_layer_config`, from a layer's number to what
differs there from the fields of all layers. The old form is read by both.

Source of defaults and of what overrides what: `Gemma4TextConfig` and `Gemma4UnifiedTextConfig` of
Hugging Face transformers 5.24.
"""

import warnings
from collections.abc import Mapping
from typing import Any

SLIDING, FULL = LAYER_TYPES = ("sliding_attention", "full_attention")
TEXT_MODEL_TYPES = ("gemma4_text", "gemma4_unified_text")
# A text config inside another may leave its type to the outer one.
_TYPE_INSIDE = {
    "gemma4": "gemma4_text",
    "gemma4_assistant": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "gemma4_unified_assistant": "gemma4_unified_text",
}
_DEFAULTS = {
    "hidden_size": 2304,
    "num_hidden_layers": 30,
    "layer_types": None,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "sliding_window": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
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
# The unified text model has neither per-layer embeddings nor experts, and no fields for them.
_UNIFIED_DEFAULTS = _DEFAULTS | {
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": None,
}
_GLOBAL_HEAD_DIM = 512
_SLIDING_PER_FULL = 5
_ROPE_PARAMETERS = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
# Fields of the old form, by what `per_layer_config` calls them.
_OLD_NAMES = {
    "head_dim": "global_head_dim",
    "num_key_value_heads": "num_global_key_value_heads",
}


def text_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text config in a config, with the `model_type` and tie that the outer one gives it.

    Raises:
        ValueError: `text_config` is no object, or the model type is none of a Gemma 4 text model.
    """
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config must be an object, not {text!r}")
    text = dict(text)
    text.setdefault("model_type", _TYPE_INSIDE.get(config.get("model_type")))
    if text["model_type"] not in TEXT_MODEL_TYPES:
        raise ValueError(
            f"model_type is {text['model_type']!r}; a Gemma 4 text config has one of "
            f"{', '.join(TEXT_MODEL_TYPES)}"
        )
    # The head is the outer model's.
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def resolved_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Gemma4Config`, absent ones as transformers sets them.

        global_head_dim               head_dim of the full layers
        num_global_key_value_heads    KV heads of the full layers, never None

    A last layer that is no full one is made one, as transformers does, with a warning.

    Args:
        text: from `text_config_of`.

    Raises:
        ValueError: the old and the new form are both there and differ, or `per_layer_config` asks
            for layers of one type that differ. The message names the field.
    """
    unified = text["model_type"] == "gemma4_unified_text"
    defaults = _UNIFIED_DEFAULTS if unified else _DEFAULTS
    fields = {name: text.get(name, default) for name, default in defaults.items()}
    # Published configs have null and 0 for the same; absent it is the 256 of E2B.
    if fields["hidden_size_per_layer_input"] is None:
        fields["hidden_size_per_layer_input"] = 0
    # 0 where there are none, in assistants.
    if not fields["hidden_size_per_layer_input"] and not fields["vocab_size_per_layer_input"]:
        fields["vocab_size_per_layer_input"] = None
    fields["layer_types"] = _layer_types(fields)
    fields["rope_parameters"] = _rope_parameters(fields)
    per_layer = text.get("per_layer_config")
    if "per_layer_config" in text:
        resolved = _of_new_form(fields, {} if per_layer is None else per_layer)
        _check_old_form(text, resolved)
    else:
        resolved = _of_old_form(text, fields)
    return fields | resolved


def _layer_types(fields):
    """The layer types, the last one full; as given where that is no list or has other entries."""
    types, layers = fields["layer_types"], fields["num_hidden_layers"]
    if types is None and isinstance(layers, int):
        period = _SLIDING_PER_FULL + 1
        types = [SLIDING if (i + 1) % period else FULL for i in range(layers)]
    if not isinstance(types, list | tuple) or not types or types[-1] != SLIDING:
        return types
    if fields["layer_types"] is not None:
        warnings.warn(
            f"layer_types[{len(types) - 1}], the last, is {SLIDING!r}; it is made {FULL!r}, as "
            "transformers does",
            stacklevel=4,
        )
    return [*types[:-1], FULL]


def _rope_parameters(fields):
    rope = fields["rope_parameters"]
    if rope is None:
        return _ROPE_PARAMETERS
    if not isinstance(rope, Mapping):
        return rope
    return {
        layer_type: {"rope_type": "default"} | dict(of_type)
        if isinstance(of_type, Mapping)
        else of_type
        for layer_type, of_type in rope.items()
    }


def _of_old_form(text, fields):
    heads = text.get("num_global_key_value_heads") if fields["attention_k_eq_v"] is True else None
    return {
        "global_head_dim": text.get("global_head_dim", _GLOBAL_HEAD_DIM),
        "num_global_key_value_heads": fields["num_key_value_heads"] if heads is None else heads,
    }


def _of_new_form(fields, per_layer):
    overrides = _overrides(per_layer, fields["num_hidden_layers"])
    for layer, of_layer in overrides.items():
        for name, value in of_layer.items():
            if name not in _OLD_NAMES and value != fields.get(name):
                raise ValueError(
                    f"per_layer_config gives layer {layer} {name} = {value!r}; accepted: "
                    f"{' and '.join(_OLD_NAMES)}"
                )
    resolved = {}
    for name, old_name in _OLD_NAMES.items():
        resolved[name] = _of_type(SLIDING, name, fields, overrides)
        resolved[old_name] = _of_type(FULL, name, fields, overrides)
    return resolved


def _of_type(layer_type, name, fields, overrides):
    """The one value of a field in all layers of a type."""
    types, value = fields["layer_types"], None
    for layer, own_type in enumerate(types if isinstance(types, list | tuple) else ()):
        if own_type != layer_type:
            continue
        own = overrides.get(layer, {}).get(name, fields[name])
        if value is not None and own != value:
            raise ValueError(
                f"per_layer_config makes {name} of layer {layer} {own!r}, and of an earlier "
                f"{layer_type} layer {value!r}; accepted: one value for all of them"
            )
        value = own
    return fields[name] if value is None else value


def _overrides(per_layer, layers):
    """`per_layer_config` by numbers of layers."""
    if not isinstance(per_layer, Mapping):
        raise ValueError(f"per_layer_config must be an object, not {per_layer!r}")
    overrides = {}
    for key, of_layer in per_layer.items():
        if not str(key).isdecimal() or (isinstance(layers, int) and int(key) >= layers):
            raise ValueError(
                f"per_layer_config has layer {key!r}; accepted: 0 to num_hidden_layers - 1, and "
                f"num_hidden_layers is {layers!r}"
            )
        if int(key) in overrides:
            raise ValueError(f"per_layer_config has layer {int(key)} twice")
        if not isinstance(of_layer, Mapping):
            raise ValueError(f"per_layer_config[{key!r}] must be an object, not {of_layer!r}")
        overrides[int(key)] = of_layer
    return overrides


def _check_old_form(text, resolved):
    """Refuses fields of the old form that say something else than `per_layer_config` does."""
    for name in _OLD_NAMES.values():
        given, value = text.get(name), resolved[name]
        # Without K = V transformers does not read the number of global heads.
        means_nothing = name == "num_global_key_value_heads" and not text.get("attention_k_eq_v")
        if given is not None and given != value and not means_nothing:
            raise ValueError(
                f"{name} is {given!r}, and per_layer_config makes it {value!r}; accepted: one of "
                "the two, or both with one value"
            )
