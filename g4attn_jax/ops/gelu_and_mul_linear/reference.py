"""Reference of `gelu_and_mul_linear`, in `jnp`."""

import jax.numpy as jnp

from g4attn_jax.ops.linear.reference import gelu_gate


def gelu_and_mul_linear(gate, up, w):
    """Reference of `g4attn_jax.ops.gelu_and_mul_linear`."""
    gate = gate.astype(jnp.float32)
    if gate.ndim > up.ndim:
        gate = gate.sum(axis=0)
    return gelu_gate(gate, up.astype(jnp.float32)).astype(w.dtype) @ w
