"""Gemma 4 attention for JAX on NVIDIA GPUs."""

from g4attn_jax import ops
from g4attn_jax.attention import Gemma4Attention
from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode

__all__ = ["AttentionSpec", "Gemma4Attention", "Gemma4Config", "ProjectionMode", "ops"]
