"""Config of a Gemma 4 model, from its `config.json`, and the attention of each layer."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from importlib import resources
from os import PathLike
from typing import Any, Self

from g4attn_jax.checks import check_integer
from g4attn_jax.hf_config import FULL, LAYER_TYPES, SLIDING, resolved_fields, text_config_of
from g4attn_jax.json_file import parse_object, read_object

ASSISTANT_MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
_CONFIGS = resources.files("g4attn_jax") / "configs"


class ProjectionMode(enum.Enum):
    """Projections of a layer, of Q, K and V; the value counts those of K and V (P)."""

    # KV-shared layers (the last `num_kv_shared_layers`): K and V are an earlier layer's.
    Q_ONLY = 0
    # Full-attention layers when `attention_k_eq_v`: one projection is both K and V.
    QK_ONLY = 1
    # Every other layer: sliding ones, and full ones when K and V have projections of their own.
    QKV_FULL = 2

    @property
    def num_kv_projections(self) -> int:
        """P: rows of K and V after the G query rows of each KV head in a packed buffer."""
        return self.value


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One attention layer, resolved from the config; nothing below this asks the config again.

    Attributes:
        mode: what the layer projects.
        num_q_heads: Nq.
        num_kv_heads: Nkv; divides Nq.
        head_dim: D.
        sliding_window: number of keys a query sees, its own included; None sees all earlier ones.
        rope_theta: base of the rotary frequencies.
        rotary_dim: R, twice the number of rotating pairs; the other D - R dims carry no position.
        eps: added to the mean square in every RMSNorm.
        kv_layer: index of the layer whose cache this one reads; its own unless `mode` is Q_ONLY.
            None in a model that has no cache: an assistant's layers read another model's.
    """

    mode: ProjectionMode
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    rope_theta: float
    rotary_dim: int
    eps: float
    kv_layer: int | None

    @property
    def group_size(self) -> int:
        """G: query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads


def read_config(config: str | PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    """The contents of a `config.json`, given as they are or by its path.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither, or the file, which the message names, is not a JSON object.
    """
    if not isinstance(config, (str, PathLike, Mapping)):
        raise ValueError(f"config is {config!r}; accepted: a path or a dict")
    return config if isinstance(config, Mapping) else read_object(config)


@dataclasses.dataclass(frozen=True)
class Gemma4Config:
    """The text config of a Gemma 4 model, under Hugging Face's names.

    `from_hf` and `preset` build it. Fields that contradict each other are refused with a ValueError
    that names the field. Those from `vocab_size` on are not attention's: they may be None, which is
    unknown, and `check_decoder` says what of them the whole model needs. Full-attention layers have
    `num_global_key_value_heads` KV heads; None is `num_key_value_heads`.

    Source: the `config.json` files and `Gemma4TextConfig` of Hugging Face transformers 5.24.
    """

    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    num_global_key_value_heads: int | None
    head_dim: int
    global_head_dim: int
    attention_k_eq_v: bool
    num_kv_shared_layers: int
    sliding_window: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Mapping[str, Any]] = dataclasses.field(hash=False)
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    final_logit_softcapping: float | None = None
    intermediate_size: int | None = None
    hidden_activation: str | None = None
    use_double_wide_mlp: bool | None = None
    # Per-layer embeddings; a model with 0 has none.
    hidden_size_per_layer_input: int | None = None
    vocab_size_per_layer_input: int | None = None
    # Experts beside the MLP.
    enable_moe_block: bool | None = None
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None

    @classmethod
    def from_hf(cls, config: str | PathLike | Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config, as transformers reads it: what is absent has its default.

        Args:
            config: path of a `config.json`, or its contents as a dict; the text config may stand
                alone or under `text_config`, and give what differs in full-attention layers as
                `global_head_dim` and `num_global_key_value_heads` or as `per_layer_config`.

        Warns:
            UserWarning: the last layer is "sliding_attention"; it is made "full_attention".

        Raises:
            ValueError: a field has a wrong type, contradicts another, or asks for something this
                attention does not do. The message names the field.
        """
        config = read_config(config)
        if config.get("model_type") in ASSISTANT_MODEL_TYPES:
            raise ValueError(
                f"model_type is {config['model_type']!r}, so this is the config of an assistant; "
                "read it with AssistantConfig"
            )
        text = text_config_of(config)
        # Switches of the Hugging Face config that change the maths, and what they may be.
        for field, only in (
            ("attention_bias", (False, None)),
            ("use_bidirectional_attention", (None, "vision")),
        ):
            if text.get(field) not in only:
                raise ValueError(
                    f"{field} = {text[field]!r} is not supported; accepted: {only[0]!r} or "
                    f"{only[1]!r}"
                )
        return cls(**resolved_fields(text))

    @classmethod
    def preset(cls, name: str) -> Self:
        """The config of a published model.

        Args:
            name: "gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b" or "gemma-4-31b";
                the prefix "gemma-4-" may be left out.

        Raises:
            ValueError: there is no such model.
        """
        accepted = cls.preset_names()
        full_name = f"gemma-4-{str(name).removeprefix('gemma-4-')}"
        if full_name not in accepted:
            raise ValueError(f"unknown preset {name!r}; accepted: {', '.join(accepted)}")
        file = _CONFIGS / f"{full_name}.json"
        return cls.from_hf(parse_object(file.read_bytes(), file))

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """The names `preset` accepts, in alphabetical order."""
        return tuple(
            sorted(
                f.name.removesuffix(".json") for f in _CONFIGS.iterdir() if f.name.endswith(".json")
            )
        )

    def __post_init__(self):
        for field in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "global_head_dim",
            "sliding_window",
        ):
            check_integer(field, getattr(self, field), least=1)
        if self.num_global_key_value_heads is not None:
            check_integer("num_global_key_value_heads", self.num_global_key_value_heads, least=1)
        check_integer("num_kv_shared_layers", self.num_kv_shared_layers, least=0)
        if not isinstance(self.attention_k_eq_v, bool):
            raise ValueError(
                f"attention_k_eq_v must be true or false, not {self.attention_k_eq_v!r}"
            )
        if not _is_number(self.rms_norm_eps) or self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps must be a number above 0, not {self.rms_norm_eps!r}")
        self._check_layer_types()
        self._check_rope_parameters()
        self._check_decoder_fields()
        for layer in range(self.num_hidden_layers):
            self._check_layer(layer)

    def _check_layer_types(self):
        if not isinstance(self.layer_types, (list, tuple)):
            raise ValueError(f"layer_types must be a list, not {self.layer_types!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; num_hidden_layers = "
                f"{self.num_hidden_layers} needs as many"
            )
        for layer, layer_type in enumerate(self.layer_types):
            if layer_type not in LAYER_TYPES:
                raise ValueError(
                    f"layer_types[{layer}] is {layer_type!r}; accepted: {', '.join(LAYER_TYPES)}"
                )
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if self.num_kv_shared_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_kv_shared_layers = {self.num_kv_shared_layers} exceeds num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )

    def _check_rope_parameters(self):
        if not isinstance(self.rope_parameters, Mapping):
            raise ValueError(
                "rope_parameters must be an object with an entry per layer type, not "
                f"{self.rope_parameters!r}"
            )
        used = sorted(set(self.layer_types))
        for layer_type in used:
            rope = self.rope_parameters.get(layer_type)
            where = f"rope_parameters.{layer_type}"
            if not isinstance(rope, Mapping):
                raise ValueError(f"{where} is missing; layer_types has such layers")
            if rope.get("rope_type") not in ("default", "proportional"):
                raise ValueError(
                    f"{where}.rope_type is {rope.get('rope_type')!r}; accepted: default, "
                    "proportional"
                )
            if not _is_number(rope.get("rope_theta")) or rope["rope_theta"] <= 0:
                raise ValueError(
                    f"{where}.rope_theta must be a number above 0, not {rope.get('rope_theta')!r}"
                )
            factor = rope.get("partial_rotary_factor", 1.0)
            if not _is_number(factor) or not 0 <= factor <= 1:
                raise ValueError(
                    f"{where}.partial_rotary_factor must be a number from 0 to 1, not {factor!r}"
                )
            if rope["rope_type"] == "default" and factor != 1:
                raise ValueError(
                    f"{where}.partial_rotary_factor = {factor!r} needs rope_type proportional, "
                    "not default"
                )
            if rope.get("factor", 1.0) != 1:
                raise ValueError(
                    f"{where}.factor = {rope['factor']!r} is not supported; accepted: 1.0"
                )
        copies = {layer_type: dict(self.rope_parameters[layer_type]) for layer_type in used}
        object.__setattr__(self, "rope_parameters", copies)

    def _check_decoder_fields(self):
        for field, minimum in (
            ("vocab_size", 1),
            ("intermediate_size", 1),
            ("hidden_size_per_layer_input", 0),
            ("vocab_size_per_layer_input", 1),
            ("num_experts", 1),
            ("top_k_experts", 1),
            ("moe_intermediate_size", 1),
        ):
            if getattr(self, field) is not None:
                check_integer(field, getattr(self, field), least=minimum)
        for field, accepted in (
            ("tie_word_embeddings", (True, False)),
            ("hidden_activation", ("gelu_pytorch_tanh",)),
            ("use_double_wide_mlp", (True, False)),
            ("enable_moe_block", (True, False)),
        ):
            value = getattr(self, field)
            # 0 and 1 equal False and True.
            if value is not None and not any(
                type(value) is type(a) and value == a for a in accepted
            ):
                raise ValueError(
                    f"{field} = {value!r} is not supported; accepted: "
                    + " or ".join(map(repr, accepted))
                )
        cap = self.final_logit_softcapping
        if cap is not None and (not _is_number(cap) or cap <= 0):
            raise ValueError(f"final_logit_softcapping must be a number above 0, not {cap!r}")
        if None not in (self.top_k_experts, self.num_experts):
            if self.top_k_experts > self.num_experts:
                raise ValueError(
                    f"top_k_experts = {self.top_k_experts} exceeds num_experts = {self.num_experts}"
                )

    def check_decoder(self) -> None:
        """Refuses a config that describes attention alone.

        Raises:
            ValueError: naming a field that the whole text model needs.
        """
        needed = [
            "vocab_size",
            "tie_word_embeddings",
            "intermediate_size",
            "hidden_activation",
            "use_double_wide_mlp",
            "hidden_size_per_layer_input",
            "enable_moe_block",
        ]
        if self.hidden_size_per_layer_input:
            needed.append("vocab_size_per_layer_input")
        if self.enable_moe_block:
            needed += ["num_experts", "top_k_experts", "moe_intermediate_size"]
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"{field} is missing from the config; the decoder needs it")

    def truncated(self, layers: int) -> Self:
        """The config of a model like this with fewer layers, for trying real shapes out.

        It has the types of the first `layers` layers. As large a part of them as in the whole model
        shares K and V, or as large a one as leaves every shared layer a producer before it.
        Weights of the whole model do not fit where a layer shares here and did not there.

        Args:
            layers: 1 to num_hidden_layers.

        Raises:
            ValueError: there are not as many.
        """
        layers = check_integer("layers", layers, most=self.num_hidden_layers)
        types = self.layer_types[:layers]
        shared = self.num_kv_shared_layers * layers // self.num_hidden_layers
        while not set(types[layers - shared :]) <= set(types[: layers - shared]):
            shared -= 1
        return dataclasses.replace(
            self, num_hidden_layers=layers, layer_types=types, num_kv_shared_layers=shared
        )

    def _check_layer(self, layer: int):
        spec = self.attention_spec(layer)
        if spec.num_q_heads % spec.num_kv_heads:
            raise ValueError(
                f"num_attention_heads = {spec.num_q_heads} is not divisible by "
                f"{self._kv_heads_field(layer)} = {spec.num_kv_heads} (layer {layer})"
            )
        if spec.head_dim % 2:
            field = "head_dim" if self.layer_types[layer] == SLIDING else "global_head_dim"
            raise ValueError(
                f"{field} = {spec.head_dim} is odd; RoPE couples dims i and i + head_dim / 2"
            )

    def _kv_heads_field(self, layer: int) -> str:
        if self.layer_types[layer] != FULL:
            return "num_key_value_heads"
        if self.num_global_key_value_heads in (None, self.num_key_value_heads):
            return "num_key_value_heads"
        return "num_global_key_value_heads"

    def attention_spec(self, layer: int) -> AttentionSpec:
        """Attention of layer `layer`, 0 to num_hidden_layers - 1: heads, window, rotation.

        Raises:
            ValueError: there is no such layer.
        """
        layer = check_integer("layer", layer, least=0, most=self.num_hidden_layers - 1)
        layer_type = self.layer_types[layer]
        full = layer_type == FULL
        first_shared = self.num_hidden_layers - self.num_kv_shared_layers
        if layer >= first_shared:
            mode = ProjectionMode.Q_ONLY
            kv_layer = self._last_producer(layer_type, first_shared, layer)
        else:
            mode = (
                ProjectionMode.QK_ONLY
                if full and self.attention_k_eq_v
                else ProjectionMode.QKV_FULL
            )
            kv_layer = layer
        head_dim = self.global_head_dim if full else self.head_dim
        rope = self.rope_parameters[layer_type]
        # Proportional RoPE rotates whole pairs only, hence the rounding down.
        rotary_dim = 2 * math.floor(rope.get("partial_rotary_factor", 1.0) * head_dim / 2)
        return AttentionSpec(
            mode=mode,
            num_q_heads=self.num_attention_heads,
            num_kv_heads=getattr(self, self._kv_heads_field(layer)),
            head_dim=head_dim,
            sliding_window=None if full else self.sliding_window,
            rope_theta=float(rope["rope_theta"]),
            rotary_dim=rotary_dim,
            eps=float(self.rms_norm_eps),
            kv_layer=kv_layer,
        )

    def _last_producer(self, layer_type: str, first_shared: int, layer: int) -> int:
        for candidate in reversed(range(first_shared)):
            if self.layer_types[candidate] == layer_type:
                return candidate
        raise ValueError(
            f"num_kv_shared_layers = {self.num_kv_shared_layers} makes layer {layer} read the K "
            f"and V of an earlier {layer_type} layer, and layer_types has none before layer "
            f"{first_shared}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
