"""Weights of a model as one flat tuple, which a jitted function takes in the least time."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array

Model = TypeVar("Model")


def split_weights(
    model: Model,
) -> tuple[Callable[[tuple[Array, ...]], Model], tuple[Array, ...]]:
    """`nnx.split` for functions that are called often.

        merge, weights = split_weights(decoder)

        @functools.partial(jax.jit, donate_argnames="cache")
        def step(weights, tokens, positions, cache):
            decoder = merge(weights)
            return decoder(tokens, decoder.plan(positions, cache), cache)

    JAX goes through the arguments of a jitted function in every call: through an `nnx.State` in
    Python, through a tuple in C++. With 31B's 662 weights and 120 arrays of caches a call costs the
    host about half the time with the latter (`python -m bench run dispatch`).

    Args:
        model: a module, or a tuple or dict of modules and None.

    Returns:
        (merge, weights): merge(weights) is the model with these weights, and is for use inside
        `jax.jit`; weights are the arrays that the model has now.
    """
    graph, state = nnx.split(model)
    weights, treedef = jax.tree.flatten(state)

    def merge(weights: tuple[Array, ...]) -> Model:
        return nnx.merge(graph, jax.tree.unflatten(treedef, weights))

    return merge, tuple(weights)
