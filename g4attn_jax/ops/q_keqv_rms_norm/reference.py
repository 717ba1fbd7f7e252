"""`q_keqv_rms_norm` in `jnp`."""

from g4attn_jax.ops.head_norm.reference import rms_norm


def q_keqv_rms_norm(q, kv, q_scale, k_scale, v_scale, *, eps, scale_offset):
    """See `g4attn_jax.ops.q_keqv_rms_norm`."""
    return (
        rms_norm(q, q_scale, eps=eps, scale_offset=scale_offset),
        rms_norm(kv, k_scale, eps=eps, scale_offset=scale_offset),
        rms_norm(kv, v_scale, eps=eps, scale_offset=scale_offset),
    )
