"""Config of a Gemma 4 assistant: from `config.json` to sizes of its modules."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import Any, Self

from g4attn_jax.checks import check_integer
from g4attn_jax.config import (
    ASSISTANT_MODEL_TYPES,
    AttentionSpec,
    Gemma4Config,
    ProjectionMode,
    read_config,
)
from g4attn_jax.hf_config import resolved_fields, text_config_of

# What the text config of an assistant may ask for.
_TEXT_SWITCHES = {
    "hidden_size_per_layer_input": (0,),
    "enable_moe_block": (False,),
    "use_double_wide_mlp": (False,),
}
_ORDERING = {
    "use_ordered_embeddings": False,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
}
_DEFAULTS = {
    "gemma4_assistant": {"backbone_hidden_size": 1536} | _ORDERING,
    "gemma4_unified_assistant": {"backbone_hidden_size": 3840} | _ORDERING,
}


class AssistantTextConfig(Gemma4Config):
    """The text config of layers that all read the caches of another model, the target.

    Its `num_kv_shared_layers` is `num_hidden_layers`, though there is no earlier layer to share
    with: every layer is Q_ONLY with `kv_layer` None. A token at position p is not in the caches
    yet. It sees the tokens before it: all of them in full layers, and in sliding layers the last
    `sliding_window` + 1, one more than the target's layers of the same window show to theirs.

    Source of the window: `Gemma4AssistantForCausalLM.create_attention_masks` of Hugging Face
    transformers 5.24.
    """

    def attention_spec(self, layer: int) -> AttentionSpec:
        """Attention of layer `layer`; its `sliding_window` is that of keys."""
        spec = dataclasses.replace(
            Gemma4Config.attention_spec(self, layer), mode=ProjectionMode.Q_ONLY, kv_layer=None
        )
        if spec.sliding_window is None:
            return spec
        return dataclasses.replace(spec, sliding_window=spec.sliding_window + 1)

    def _last_producer(self, layer_type, first_shared, layer):
        """None: the target has the keys and values."""


@dataclasses.dataclass(frozen=True)
class AssistantConfig:
    """The config of a Gemma 4 assistant, under Hugging Face's names.

    `from_hf` builds it. Fields that contradict each other are refused with a ValueError that names
    the field.

    Attributes:
        text: of its own layers.
        backbone_hidden_size: the target's hidden size.
        use_ordered_embeddings: whether the head first chooses groups of tokens by their centroids.
        num_centroids: number of groups; divides the vocabulary. None without ordered embeddings.
        centroid_intermediate_top_k: groups that get logits. None without ordered embeddings.

    Source: `Gemma4AssistantConfig` of Hugging Face transformers 5.24.
    """

    text: AssistantTextConfig
    backbone_hidden_size: int
    use_ordered_embeddings: bool
    num_centroids: int | None = None
    centroid_intermediate_top_k: int | None = None

    @classmethod
    def from_hf(cls, config: str | PathLike | Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config, as transformers reads it: what is absent has its default.

        Args:
            config: path of a `config.json` of model type "gemma4_assistant" or
                "gemma4_unified_assistant", or its contents as a dict.

        Raises:
            ValueError: there is no text_config, or a field has a wrong type, contradicts another,
                or asks for something this model does not do. The message names the field.
        """
        config = read_config(config)
        if config.get("model_type") not in ASSISTANT_MODEL_TYPES:
            raise ValueError(
                f"model_type is {config.get('model_type')!r}; an assistant's config has one of "
                f"{', '.join(ASSISTANT_MODEL_TYPES)}"
            )
        if config.get("tie_word_embeddings", True) is not True:
            raise ValueError(
                f"tie_word_embeddings = {config['tie_word_embeddings']!r} is not supported; "
                "accepted: True"
            )
        if "text_config" not in config:
            raise ValueError("text_config is missing from the config")
        values = {
            field: config.get(field, default)
            for field, default in _DEFAULTS[config["model_type"]].items()
        }
        if values["use_ordered_embeddings"] is not True:
            values |= {"num_centroids": None, "centroid_intermediate_top_k": None}
        return cls(text=_text_config(config), **values)

    def __post_init__(self):
        if not isinstance(self.text, AssistantTextConfig):
            raise ValueError(f"text is a {type(self.text).__name__}; accepted: AssistantTextConfig")
        self.text.check_decoder()
        if not isinstance(self.use_ordered_embeddings, bool):
            raise ValueError(
                f"use_ordered_embeddings must be true or false, not {self.use_ordered_embeddings!r}"
            )
        counts = ["backbone_hidden_size"]
        if self.use_ordered_embeddings:
            counts += ["num_centroids", "centroid_intermediate_top_k"]
        for field in counts:
            check_integer(field, getattr(self, field))
        if not self.use_ordered_embeddings:
            return
        if self.text.vocab_size % self.num_centroids:
            raise ValueError(
                f"num_centroids = {self.num_centroids} does not divide vocab_size = "
                f"{self.text.vocab_size}"
            )
        if self.centroid_intermediate_top_k > self.num_centroids:
            raise ValueError(
                f"centroid_intermediate_top_k = {self.centroid_intermediate_top_k} exceeds "
                f"num_centroids = {self.num_centroids}"
            )

    def check_target(self, target: Gemma4Config) -> None:
        """Refuses a target that the assistant cannot draft for.

        Raises:
            ValueError: naming what of the two differs.
        """
        if self.backbone_hidden_size != target.hidden_size:
            raise ValueError(
                f"backbone_hidden_size is {self.backbone_hidden_size}; the target has hidden_size "
                f"{target.hidden_size}"
            )
        if self.text.vocab_size != target.vocab_size:
            raise ValueError(
                f"vocab_size is {self.text.vocab_size}; the target has {target.vocab_size}"
            )
        for layer_type in sorted(set(self.text.layer_types)):
            if layer_type not in target.layer_types:
                raise ValueError(f"the target has no {layer_type} layer; the assistant reads one")
            ours, theirs = (
                Gemma4Config.attention_spec(config, config.layer_types.index(layer_type))
                for config in (self.text, target)
            )
            for field in (
                "num_kv_heads",
                "head_dim",
                "sliding_window",
                "rope_theta",
                "rotary_dim",
            ):
                if getattr(ours, field) != getattr(theirs, field):
                    raise ValueError(
                        f"{field} of {layer_type} layers is {getattr(ours, field)}; the target has "
                        f"{getattr(theirs, field)}"
                    )


def _text_config(config):
    if not isinstance(config["text_config"], Mapping):
        raise ValueError(f"text_config must be an object, not {config['text_config']!r}")
    text = text_config_of(config)
    fields = resolved_fields(text)
    for field, accepted in _TEXT_SWITCHES.items():
        if not any(type(fields[field]) is type(a) and fields[field] == a for a in accepted):
            raise ValueError(
                f"text_config.{field} = {fields[field]!r} is not supported in an assistant; "
                f"accepted: {accepted[0]!r}"
            )
    text["layer_types"], layers = fields["layer_types"], fields["num_hidden_layers"]
    # transformers reads 0 as all; it is what a config that was never saved by it has.
    text["num_kv_shared_layers"] = fields["num_kv_shared_layers"] or layers
    if text["num_kv_shared_layers"] != layers:
        raise ValueError(
            f"text_config.num_kv_shared_layers = {text['num_kv_shared_layers']!r}; every layer of "
            f"an assistant is shared, and num_hidden_layers = {layers!r}"
        )
    return AssistantTextConfig.from_hf(text)
