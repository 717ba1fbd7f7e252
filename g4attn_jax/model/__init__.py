"""The Gemma 4 text decoder around `Gemma4Attention`."""

from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.layer import Gemma4DecoderLayer
from g4attn_jax.model.mlp import Gemma4MLP
from g4attn_jax.model.moe import Gemma4MoE
from g4attn_jax.model.step import ModelCache, Step
from g4attn_jax.model.weights import split_weights

__all__ = [
    "Gemma4Assistant",
    "Gemma4Decoder",
    "Gemma4DecoderLayer",
    "Gemma4MLP",
    "Gemma4MoE",
    "ModelCache",
    "Step",
    "split_weights",
]
