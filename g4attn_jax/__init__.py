"""Gemma 4 attention for JAX on NVIDIA GPUs.

Names are imported when they are first used: `import g4attn_jax` by itself does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g4attn_jax import ops
    from g4attn_jax.assistant_config import AssistantConfig
    from g4attn_jax.attention import Gemma4Attention
    from g4attn_jax.cache import CompactKVCache, KVCache, ReadableCache
    from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode
    from g4attn_jax.generation import Generator
    from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
    from g4attn_jax.model import (
        Gemma4Assistant,
        Gemma4Decoder,
        ModelCache,
        Step,
        split_weights,
    )
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
    "ModelCache",
    "PageAllocator",
    "Paged",
    "ProjectionMode",
    "ReadableCache",
    "Ring",
    "Sampling",
    "Step",
    "ops",
    "plan_step",
    "split_weights",
]

# The module of each name; type checkers read the imports above, which a test compares with this.
_MODULES = {
    "AssistantConfig": "assistant_config",
    "AttentionSpec": "config",
    "CompactKVCache": "cache",
    "Contiguous": "layout",
    "Gemma4Assistant": "model",
    "Gemma4Attention": "attention",
    "Gemma4Config": "config",
    "Gemma4Decoder": "model",
    "Generator": "generation",
    "KVCache": "cache",
    "ModelCache": "model",
    "PageAllocator": "page_allocator",
    "Paged": "layout",
    "ProjectionMode": "config",
    "ReadableCache": "cache",
    "Ring": "layout",
    "Sampling": "model.sampling",
    "Step": "model",
    "plan_step": "layout",
    "split_weights": "model",
}


def __getattr__(name: str):
    if name == "ops":
        value = import_module("g4attn_jax.ops")
    elif name in _MODULES:
        value = getattr(import_module(f"g4attn_jax.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'g4attn_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
