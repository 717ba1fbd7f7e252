"""Reference of `moe_mlp`, in `jnp`."""

import jax.numpy as jnp

from g4attn_jax.ops.linear.reference import gelu_gate


def moe_mlp(h, gate_up, down, experts, weights, *, num_partial_sums):
    """Reference of `g4attn_jax.ops.moe_mlp`: all is in the first sum, the others are 0."""
    float32 = {"preferred_element_type": jnp.float32}
    products = jnp.einsum("me,mkecf->cmkf", h, gate_up[experts], **float32)
    gated = gelu_gate(*products).astype(h.dtype)
    answers = jnp.einsum("mkf,mkfe->mke", gated, down[experts], **float32)
    y = jnp.sum(weights[..., None] * answers, axis=1)
    return jnp.zeros((num_partial_sums, *y.shape), y.dtype).at[0].set(y)
