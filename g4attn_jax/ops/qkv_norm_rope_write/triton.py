"""`qkv_norm_rope_write` as one launch: where the heads lie in a cache of either form."""

import math

import jax
import jax.numpy as jnp

from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.ops.batching import apart_if_float8
from g4attn_jax.ops.qkv_norm_rope.triton import Inputs, Outputs, norm_rope


def qkv_norm_rope_write(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    slots,
    cache,
    *,
    mode,
    eps,
    interpret=False,
    launch=None,
):
    """See `g4attn_jax.ops.qkv_norm_rope_write`; `launch` overrides the heuristics, for tuning."""
    names = _FIELDS[type(cache)]
    k, v = (getattr(cache, name) for name in names)

    def run(inputs, k, v):
        flat = (x.reshape(-1, x.shape[-1]) for x in (k, v))
        q = _query(inputs.x, inputs.cos, mode, type(cache))
        return norm_rope(
            inputs, Outputs(q, *flat), mode=mode, eps=eps, interpret=interpret, launch=launch
        )

    run = apart_if_float8(run, cache)
    q, new_k, new_v = run(Inputs(qkv, q_norm, k_norm, cos, sin, slots, cache.scale), k, v)
    arrays = {names[0]: new_k.reshape(k.shape), names[1]: new_v.reshape(v.shape)}
    return _heads(q, qkv, mode), cache._replace(**arrays)


def query(qkv, q_norm, k_norm, cos, sin, *, form, mode, eps, interpret=False, launch=None):
    """Q_ONLY: the query for a cache of the given form."""
    q, _, _ = norm_rope(
        Inputs(qkv, q_norm, k_norm, cos, sin, None, None),
        Outputs(_query(qkv, cos, mode, form), None, None),
        mode=mode,
        eps=eps,
        interpret=interpret,
        launch=launch,
    )
    return _heads(q, qkv, mode)


# The cache's names of what the kernel calls k and v.
_FIELDS = {KVCache: ("k", "v"), CompactKVCache: ("k_rot", "v")}


def _query(qkv, cos, mode, form):
    """Shape of q: [M * Nq, D], or for a compact cache [M * Nq, D + R]."""
    rows = math.prod(qkv.shape[:-2]) * (qkv.shape[-2] - mode.num_kv_projections)
    width = qkv.shape[-1] + (2 * cos.shape[-1] if form is CompactKVCache else 0)
    return jax.ShapeDtypeStruct((rows, width), qkv.dtype)


def _heads(q, qkv, mode):
    num_q_heads = qkv.shape[-3] * (qkv.shape[-2] - mode.num_kv_projections)
    return jnp.reshape(q, (*qkv.shape[:-3], num_q_heads, q.shape[-1]))
