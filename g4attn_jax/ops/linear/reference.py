"""References of `linear_partial_sums`, `geglu` and `logits`, in `jnp`."""

import jax
import jax.numpy as jnp


def linear_partial_sums(x, w, *, num_partial_sums, dtype):
    """Reference of `g4attn_jax.ops.linear_partial_sums`: all is in the first, the others are 0."""
    y = jnp.matmul(x, w, preferred_element_type=dtype)
    return jnp.zeros((num_partial_sums, *y.shape), y.dtype).at[0].set(y)


def geglu(x, w):
    """Reference of `g4attn_jax.ops.geglu`."""
    gate_up = jnp.einsum("...k,kcf->...cf", x, w)
    gate, up = jnp.unstack(gate_up.astype(jnp.float32), axis=-2)
    return gelu_gate(gate, up).astype(x.dtype)


def gelu_gate(gate, up):
    """gelu(gate) * up of float32."""
    return jax.nn.gelu(gate, approximate=True) * up


def logits(hidden, table):
    """Reference of `g4attn_jax.ops.logits`."""
    return jnp.einsum("...k,vk->...v", hidden, table, preferred_element_type=jnp.float32)
