"""Kernels, each behind a plain function with a `jnp` reference; `op` says which of them runs."""

from g4attn_jax.ops.add_rms_norm import add_rms_norm
from g4attn_jax.ops.decode_attention import decode_attention
from g4attn_jax.ops.grouped_gated_matmul import grouped_gated_matmul
from g4attn_jax.ops.grouped_matmul import grouped_matmul
from g4attn_jax.ops.linear import add_partial_sums, geglu, linear, linear_partial_sums, logits
from g4attn_jax.ops.moe_combine import moe_combine
from g4attn_jax.ops.op import Implementation
from g4attn_jax.ops.prefill_attention import prefill_attention
from g4attn_jax.ops.q_keqv_rms_norm import q_keqv_rms_norm
from g4attn_jax.ops.qkv_norm_rope import qkv_norm_rope
from g4attn_jax.ops.qkv_norm_rope_write import qkv_norm_rope_write
from g4attn_jax.ops.qkv_rms_norm import qkv_rms_norm
from g4attn_jax.ops.router import router

__all__ = [
    "Implementation",
    "add_partial_sums",
    "add_rms_norm",
    "decode_attention",
    "geglu",
    "grouped_gated_matmul",
    "grouped_matmul",
    "linear",
    "linear_partial_sums",
    "logits",
    "moe_combine",
    "prefill_attention",
    "q_keqv_rms_norm",
    "qkv_norm_rope",
    "qkv_norm_rope_write",
    "qkv_rms_norm",
    "router",
]
