"""`qkv_rms_norm` as one launch: which rows of the packed buffer are which heads."""

import itertools
import math

from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.head_norm.triton import Heads, head_norm


def qkv_rms_norm(
    qkv, q_norm, k_norm, v_norm, *, mode, eps, scale_offset, interpret=False, launch=None
):
    """Kernel of `g4attn_jax.ops.qkv_rms_norm`; `launch` overrides the choice, for tuning."""
    *batch, num_kv_heads, _, head_dim = qkv.shape
    outputs = head_norm(  # q, k, v, or q alone
        packed_heads(qkv, q_norm, k_norm, v_norm, mode=mode),
        groups=math.prod(batch) * num_kv_heads,
        eps=eps,
        scale_offset=scale_offset,
        interpret=interpret,
        launch=launch,
    )
    group = qkv.shape[-2] - mode.num_kv_projections
    num_heads = (num_kv_heads * group, num_kv_heads, num_kv_heads)
    q, k, v = (
        None if x is None else x.reshape(*batch, n, head_dim)
        for x, n in itertools.zip_longest(outputs, num_heads)
    )
    return q, k, v


def packed_heads(qkv, q_norm, k_norm, v_norm, *, mode) -> list[Heads]:
    """Kinds of head in a packed buffer [..., Nkv, G + P, D]; a group is a token's KV head."""
    *_, rows, head_dim = qkv.shape
    packed = qkv.reshape(-1, head_dim)
    group = rows - mode.num_kv_projections
    heads = [Heads(packed, first=0, count=group, scales=(q_norm,))]
    match mode:
        case ProjectionMode.QK_ONLY:
            heads.append(Heads(packed, first=group, count=1, scales=(k_norm, v_norm)))
        case ProjectionMode.QKV_FULL:
            heads.append(Heads(packed, first=group, count=1, scales=(k_norm,)))
            heads.append(Heads(packed, first=group + 1, count=1, scales=(v_norm,)))
    return heads
