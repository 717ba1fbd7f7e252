"""The kernels, each behind a plain function with a `jnp` reference."""

from g4attn_jax.ops.implementation import Implementation
from g4attn_jax.ops.q_keqv_rms_norm import q_keqv_rms_norm
from g4attn_jax.ops.qkv_rms_norm import qkv_rms_norm

__all__ = ["Implementation", "q_keqv_rms_norm", "qkv_rms_norm"]
