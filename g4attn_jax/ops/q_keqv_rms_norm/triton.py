"""`q_keqv_rms_norm` as one launch over two buffers."""

import math

from g4attn_jax.ops.head_norm.triton import Heads, head_norm


def q_keqv_rms_norm(q, kv, q_norm, k_norm, v_norm, *, eps, scale_offset, interpret):
    """Kernel of `g4attn_jax.ops.q_keqv_rms_norm`."""
    *batch, num_q_heads, head_dim = q.shape
    num_kv_heads = kv.shape[-2]
    q_out, k, v = head_norm(
        [
            Heads(q.reshape(-1, head_dim), first=0, count=num_q_heads, scales=(q_norm,)),
            Heads(kv.reshape(-1, head_dim), first=0, count=num_kv_heads, scales=(k_norm, v_norm)),
        ],
        groups=math.prod(batch),
        eps=eps,
        scale_offset=scale_offset,
        interpret=interpret,
    )
    return q_out.reshape(q.shape), k.reshape(kv.shape), v.reshape(kv.shape)
