"""Gemma 4 attention for JAX on NVIDIA GPUs."""

from g4attn_jax import ops
from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.attention import Gemma4Attention
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode
from g4attn_jax.generation import Generator
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from g4attn_jax.model import Gemma4Assistant, Gemma4Decoder
from g4attn_jax.model.sampling import Sampling
from g4attn_jax.page_allocator import PageAllocator

__all__ = [
    "AssistantConfig",
    "AttentionSpec",
    "CompactKVCache",
    "Contiguous",
    "Gemma4Assistant",
    "Gemma4Attention",
    "Gemma4Config",
    "Gemma4Decoder",
    "Generator",
    "KVCache",
    "PageAllocator",
    "Paged",
    "ProjectionMode",
    "Ring",
    "Sampling",
    "ops",
    "plan_step",
]
