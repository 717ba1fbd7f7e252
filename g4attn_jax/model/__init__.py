"""The Gemma 4 text decoder around `Gemma4Attention`.

Names are imported when they are first used: `Gemma4Attention` imports `linear`, and the other
modules import `Gemma4Attention`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g4attn_jax.model.assistant import Gemma4Assistant
    from g4attn_jax.model.decoder import Gemma4Decoder
    from g4attn_jax.model.flat_weights import split_weights
    from g4attn_jax.model.layer import Gemma4DecoderLayer
    from g4attn_jax.model.linear import ModuleOptions
    from g4attn_jax.model.mlp import Gemma4MLP
    from g4attn_jax.model.moe import Gemma4MoE
    from g4attn_jax.model.step import ModelCache, Step

__all__ = [
    "Gemma4Assistant",
    "Gemma4Decoder",
    "Gemma4DecoderLayer",
    "Gemma4MLP",
    "Gemma4MoE",
    "ModelCache",
    "ModuleOptions",
    "Step",
    "split_weights",
]

_MODULES = {
    "Gemma4Assistant": "assistant",
    "Gemma4Decoder": "decoder",
    "Gemma4DecoderLayer": "layer",
    "Gemma4MLP": "mlp",
    "Gemma4MoE": "moe",
    "ModelCache": "step",
    "ModuleOptions": "linear",
    "Step": "step",
    "split_weights": "flat_weights",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'g4attn_jax.model' has no attribute {name!r}")
    value = getattr(import_module(f"g4attn_jax.model.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
