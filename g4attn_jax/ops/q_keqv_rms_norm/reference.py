"""Reference of `q_keqv_rms_norm`, in `jnp`."""

from g4attn_jax.ops.head_norm.reference import rms_norm


def q_keqv_rms_norm(q, kv, q_norm, k_norm, v_norm, *, eps, scale_offset):
    """Reference of `g4attn_jax.ops.q_keqv_rms_norm`."""
    return (
        rms_norm(q, q_norm, eps=eps, scale_offset=scale_offset),
        rms_norm(kv, k_norm, eps=eps, scale_offset=scale_offset),
        rms_norm(kv, v_norm, eps=eps, scale_offset=scale_offset),
    )
