"""Reference of `router`, in `jnp`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from g4attn_jax.ops.head_norm.reference import rms_norm

# Rows, k for each token, up to which comparing all pairs takes fewer launches than a sort and its
# inverse.
_MAX_COMPARED = 256


class Routing(NamedTuple):
    """Experts of tokens, and rows sorted by expert: one for each token and expert of it.

    Rows of one expert are in the order of tokens.

    Attributes:
        weights: float32 [M, k], the factor of each expert's answer, the best expert first.
        experts: int32 [M, k], 0 to X - 1.
        group_sizes: int32 [X], rows of each expert.
        row_tokens: int32 [M * k], the token of each row.
        place: int32 [M, k], the row of each token and expert.
    """

    weights: Float[Array, "M k"]
    experts: Int[Array, "M k"]
    group_sizes: Int[Array, " X"]
    row_tokens: Int[Array, " rows"]
    place: Int[Array, "M k"]


def router(x, scale, w, per_expert_scale, *, top_k, eps):
    """Reference of `g4attn_jax.ops.router`."""
    x = rms_norm(x.astype(jnp.float32), scale, eps=eps) / math.sqrt(x.shape[-1])
    # XLA would round both to TF32 for a GPU's tensor cores.
    scores = jnp.dot(x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores, experts = jax.lax.top_k(scores, top_k)
    weights = jax.nn.softmax(scores, axis=-1) * per_expert_scale.astype(jnp.float32)[experts]
    order, place = _sort(experts.ravel())
    of_expert = experts.reshape(-1, 1) == jnp.arange(w.shape[1])
    group_sizes = jnp.sum(of_expert, axis=0, dtype=jnp.int32)
    return Routing(weights, experts, group_sizes, order // top_k, place.reshape(experts.shape))


def _sort(experts):
    """(order, place) of rows sorted by expert, stable: row i is order[i], and row j is at place[j].

    Args:
        experts: int32 [rows].
    """
    index = jnp.arange(experts.size, dtype=jnp.int32)
    if not isinstance(experts.size, int) or experts.size > _MAX_COMPARED:
        order = jnp.argsort(experts).astype(jnp.int32)
        return order, jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    key = experts * experts.size + index  # no two are equal
    place = jnp.sum(key[:, None] < key, axis=0, dtype=jnp.int32)
    is_there = place[:, None] == index
    return jnp.sum(jnp.where(is_there, index[:, None], 0), axis=0, dtype=jnp.int32), place
