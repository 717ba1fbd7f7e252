"""Reference of `qkv_rms_norm`, in `jnp`."""

from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.head_norm.reference import rms_norm


def qkv_rms_norm(qkv, q_norm, k_norm, v_norm, *, mode, eps, scale_offset):
    """Reference of `g4attn_jax.ops.qkv_rms_norm`."""
    *batch, num_kv_heads, rows, head_dim = qkv.shape
    group = rows - mode.num_kv_projections
    q = rms_norm(qkv[..., :group, :], q_norm, eps=eps, scale_offset=scale_offset)
    q = q.reshape(*batch, num_kv_heads * group, head_dim)
    if mode is ProjectionMode.Q_ONLY:
        return q, None, None
    raw_k, raw_v = qkv[..., group, :], qkv[..., -1, :]  # the same row when K = V
    k = rms_norm(raw_k, k_norm, eps=eps, scale_offset=scale_offset)
    v = rms_norm(raw_v, v_norm, eps=eps, scale_offset=scale_offset)
    return q, k, v
