"""The formulas once more, in NumPy and float64: what `check` and the tests judge by.

Written from the formulas of the public docstrings, sharing no code with the JAX implementations.
"""

from collections.abc import Callable

import numpy as np

from g4attn_jax.config import AttentionSpec, ProjectionMode

Norm = Callable[..., np.ndarray]


def rms_norm(x, scale=None, *, eps, scale_offset=0.0):
    """x / sqrt(mean(x^2) + eps) * (scale_offset + scale), in float64."""
    x = np.asarray(x).astype(np.float64)
    norm = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return norm if scale is None else norm * (scale_offset + np.asarray(scale).astype(np.float64))


def usual_rms_norm(x, scale=None, *, eps, scale_offset=0.0):
    """The same with the roundings of `Gemma4RMSNorm` in Hugging Face transformers: float32
    inside, then rounded to x's dtype. Our error must not exceed this one's."""
    dtype = np.asarray(x).dtype
    x = np.asarray(x).astype(np.float32)
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps)
    norm = x * mean_square ** np.float32(-0.5)
    if scale is not None:
        norm = norm * (np.float32(scale_offset) + np.asarray(scale).astype(np.float32))
    return norm.astype(dtype)


def qkv_rms_norm(
    qkv,
    q_scale,
    k_scale=None,
    v_scale=None,
    *,
    mode: ProjectionMode,
    eps=1e-6,
    scale_offset=0.0,
    norm: Norm = rms_norm,
):
    """`ops.qkv_rms_norm` with the given norm."""
    constants = {"eps": eps, "scale_offset": scale_offset}
    qkv = np.asarray(qkv)
    group = qkv.shape[-2] - mode.num_kv_projections
    q = norm(qkv[..., :group, :], q_scale, **constants)
    q = q.reshape(*qkv.shape[:-3], qkv.shape[-3] * group, qkv.shape[-1])
    if mode is ProjectionMode.Q_ONLY:
        return q, None, None
    v_row = group if mode is ProjectionMode.QK_ONLY else group + 1
    k = norm(qkv[..., group, :], k_scale, **constants)
    v = norm(qkv[..., v_row, :], v_scale, **constants)
    return q, k, v


def q_keqv_rms_norm(
    q, kv, q_scale, k_scale, v_scale=None, *, eps=1e-6, scale_offset=0.0, norm: Norm = rms_norm
):
    """`ops.q_keqv_rms_norm` with the given norm."""
    constants = {"eps": eps, "scale_offset": scale_offset}
    return (
        norm(q, q_scale, **constants),
        norm(kv, k_scale, **constants),
        norm(kv, v_scale, **constants),
    )


def rope(x, positions, *, theta, rotary_dim):
    """Rotates pairs (i, i + D/2), i < R/2, of [..., N, D] by positions [...] * theta^(-2i/D)."""
    x = np.array(x, np.float64)
    head_dim, pairs = x.shape[-1], rotary_dim // 2
    inv_freq = theta ** (-2.0 * np.arange(pairs) / head_dim)
    angle = (np.asarray(positions, np.float64)[..., None] * inv_freq)[..., None, :]
    low, high = x[..., :pairs].copy(), x[..., head_dim // 2 : head_dim // 2 + pairs].copy()
    x[..., :pairs] = low * np.cos(angle) - high * np.sin(angle)
    x[..., head_dim // 2 : head_dim // 2 + pairs] = high * np.cos(angle) + low * np.sin(angle)
    return x


def attention(spec: AttentionSpec, weights, x, kv=None):
    """A layer over whole sequences from position 0.

    Args:
        spec: of the layer.
        weights: dict with `qkv_proj` [E, Nkv, G + P, D], `o_proj` [Nq, D, E], `q_scale` [D] and,
            unless Q_ONLY, `k_scale` [D].
        x: [B, T, E].
        kv: for Q_ONLY the (k, v) of the producing layer.

    Returns:
        (y, (k, v)): y [B, T, E], k and v [B, T, Nkv, D].
    """
    weights = {name: np.asarray(w).astype(np.float64) for name, w in weights.items()}
    x = np.asarray(x).astype(np.float64)
    batch, tokens, _ = x.shape
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
    rotate = {"positions": positions, "theta": spec.rope_theta, "rotary_dim": spec.rotary_dim}
    q, k, v = qkv_rms_norm(
        np.einsum("bte,eknd->btknd", x, weights["qkv_proj"]),
        weights["q_scale"],
        weights.get("k_scale"),
        mode=spec.mode,
        eps=spec.eps,
    )
    q = rope(q, **rotate)
    if spec.mode is ProjectionMode.Q_ONLY:
        k, v = kv
    else:
        k = rope(k, **rotate)
    age = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = age >= 0
    if spec.sliding_window is not None:
        visible &= age < spec.sliding_window
    q = q.reshape(batch, tokens, spec.num_kv_heads, spec.group_size, spec.head_dim)
    scores = np.where(visible, np.einsum("btkgd,bskd->bkgts", q, k), -np.inf)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    o = np.einsum("bkgts,bskd->btkgd", weight, v)
    o = o.reshape(batch, tokens, spec.num_q_heads, spec.head_dim)
    return np.einsum("btnd,nde->bte", o, weights["o_proj"]), (k, v)


def max_error(actual, exact) -> float:
    """The largest absolute difference; NaN anywhere gives NaN."""
    actual = np.asarray(actual).astype(np.float64)
    return float(np.max(np.abs(actual - exact), initial=0.0))


def no_worse_than(error: float, usual_error: float, dtype) -> bool:
    """Whether `error` does not exceed `usual_error`, both measured against float64.

    Both paths round float32 results that differ in their last bits. In a 16-bit dtype these can
    fall on different sides of a tie, 2^-12 of half an ulp apart at the most; in float32 they are
    the whole error, so there a few of them are allowed for.
    """
    slack = 4.0 if np.dtype(dtype).itemsize == 4 else 1 + 2.0**-12
    return error <= usual_error * slack
