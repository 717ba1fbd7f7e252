"""Experts that the tokens of a step choose, counted while it runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from g4attn_jax import Gemma4Decoder
from g4attn_jax.model.moe import Gemma4MoE


class _Counting(Gemma4MoE):
    """Experts of a layer, with its weights, that report who is chosen."""

    def __init__(self, moe: Gemma4MoE, report: Callable[[jax.Array], None]):
        # Not `Gemma4MoE.__init__`, which would draw weights.
        for name, value in vars(moe).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.report = report

    def route(self, x):
        routing = super().route(x)
        self.report(routing.experts)
        return routing


def count_experts(
    decoder: Gemma4Decoder, f: Callable[..., Any], *arguments
) -> tuple[Any, jax.Array]:
    """f(decoder, *arguments), and how many tokens chose each expert in it.

    Args:
        decoder: with experts; changed in place.
        f: calls every layer once.
        arguments: of f.

    Returns:
        (result, counts): of f, and int32 [layers, experts].

    Raises:
        RuntimeError: a layer did not call its experts.
    """
    chosen: list[jax.Array] = []
    for layer in decoder.layers:
        layer.moe = _Counting(layer.moe, chosen.append)
    result = f(decoder, *arguments)
    if len(chosen) != len(decoder.layers):
        raise RuntimeError(f"{len(chosen)} of {len(decoder.layers)} layers called their experts")
    num_experts = decoder.config.num_experts
    counts = [jnp.bincount(experts.ravel(), length=num_experts) for experts in chosen]
    return result, jnp.stack(counts).astype(jnp.int32)
