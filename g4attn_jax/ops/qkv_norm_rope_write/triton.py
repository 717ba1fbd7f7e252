"""`qkv_norm_rope_write` as one launch: where the heads lie in a cache of either form."""

import math

import jax
import jax.numpy as jnp

from g4attn_jax.ops.float8_cache import apart_if_float8
from g4attn_jax.ops.qkv_norm_rope.triton import PrologueInputs, PrologueOutputs, norm_rope


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
    dtype=None,
    interpret=False,
    launch=None,
):
    """Kernel of `g4attn_jax.ops.qkv_norm_rope_write`; `launch` overrides the choice, for tuning."""

    def run(inputs, k, v):
        flat = (x.reshape(-1, x.shape[-1]) for x in (k, v))
        q = _query_struct(inputs.x, inputs.cos, mode, type(cache), dtype)
        return norm_rope(
            inputs,
            PrologueOutputs(q, *flat),
            mode=mode,
            eps=eps,
            interpret=interpret,
            launch=launch,
        )

    run = apart_if_float8(run, cache)
    k, v = cache.written
    inputs = PrologueInputs(qkv, q_norm, k_norm, cos, sin, slots, cache.scale)
    q, new_k, new_v = run(inputs, k, v)
    cache = cache.with_written(new_k.reshape(k.shape), new_v.reshape(v.shape))
    return _with_tokens(q, qkv, cos, mode), cache


def query(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    *,
    form,
    mode,
    eps,
    dtype=None,
    interpret=False,
    launch=None,
):
    """Query of a Q_ONLY layer for a cache of the given form."""
    q, _, _ = norm_rope(
        PrologueInputs(qkv, q_norm, k_norm, cos, sin, None, None),
        PrologueOutputs(_query_struct(qkv, cos, mode, form, dtype), None, None),
        mode=mode,
        eps=eps,
        interpret=interpret,
        launch=launch,
    )
    return _with_tokens(q, qkv, cos, mode)


def _query_struct(qkv, cos, mode, form, dtype):
    """Shape and dtype of q: [M * Nq, D], or for a compact cache [M * Nq, D + R]."""
    rows = math.prod(cos.shape[:-1]) * _num_q_heads(qkv, mode)
    width = form.query_width(qkv.shape[-1], 2 * cos.shape[-1])
    return jax.ShapeDtypeStruct((rows, width), dtype or qkv.dtype)


def _with_tokens(q, qkv, cos, mode):
    return jnp.reshape(q, (*cos.shape[:-1], _num_q_heads(qkv, mode), q.shape[-1]))


def _num_q_heads(qkv, mode):
    return qkv.shape[-3] * (qkv.shape[-2] - mode.num_kv_projections)
