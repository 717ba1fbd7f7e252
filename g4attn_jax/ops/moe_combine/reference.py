"""Reference of `moe_combine`, in `jnp`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from g4attn_jax.ops.add_rms_norm.reference import add_rms_norm
from g4attn_jax.ops.head_norm.reference import rms_norm


class CombineNorms(NamedTuple):
    """Scales of the norms of `moe_combine`, [E] each.

    Attributes:
        mlp: of the MLP's branch.
        experts: of the experts' branch.
        both: of the sum of both.
    """

    mlp: jax.Array
    experts: jax.Array
    both: jax.Array


def moe_combine(x, y, rows, weights, place, norms, next_scales, factor, *, eps):
    """Reference of `g4attn_jax.ops.moe_combine`."""
    y = y.astype(jnp.float32)
    y = y.sum(axis=0) if y.ndim > x.ndim else y
    experts = weighted_sum(rows, weights, place).reshape(x.shape)
    both = rms_norm(y, norms.mlp, eps=eps) + rms_norm(experts, norms.experts, eps=eps)
    return add_rms_norm(x, both, norms.both, next_scales, factor, eps=eps)


def weighted_sum(rows, weights, place):
    """Float32 [M, E]: of every token the sum of its rows times their weights.

    Read in the order of tokens, as scattered sums are in no certain order.
    """
    return jnp.sum(weights[..., None] * rows[place].astype(jnp.float32), axis=1)
