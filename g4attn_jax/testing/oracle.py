"""The formulas once more, in NumPy and float64: what `check` and the tests judge by.

Written from the formulas of the public docstrings, sharing no code with the JAX implementations.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from g4attn_jax.config import AttentionSpec, ProjectionMode
from g4attn_jax.layout import UNPLACED

Norm = Callable[..., np.ndarray]


def rms_norm(x, scale=None, *, eps, scale_offset=0.0):
    """x / sqrt(mean(x^2) + eps) * (scale_offset + scale), in float64."""
    x = np.asarray(x).astype(np.float64)
    norm = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return norm if scale is None else norm * (scale_offset + np.asarray(scale).astype(np.float64))


def usual_rms_norm(x, scale=None, *, eps, scale_offset=0.0):
    """RMSNorm with the roundings of `Gemma4RMSNorm` in Hugging Face transformers.

    It computes in float32 and rounds to x's dtype. Our error must not exceed this one's.
    """
    dtype = np.asarray(x).dtype
    x = np.asarray(x).astype(np.float32)
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps)
    norm = x * mean_square ** np.float32(-0.5)
    if scale is not None:
        norm = norm * (np.float32(scale_offset) + np.asarray(scale).astype(np.float32))
    return norm.astype(dtype)


def qkv_rms_norm(
    qkv,
    q_norm,
    k_norm=None,
    v_norm=None,
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
    q = norm(qkv[..., :group, :], q_norm, **constants)
    q = q.reshape(*qkv.shape[:-3], qkv.shape[-3] * group, qkv.shape[-1])
    if mode is ProjectionMode.Q_ONLY:
        return q, None, None
    v_row = group if mode is ProjectionMode.QK_ONLY else group + 1
    k = norm(qkv[..., group, :], k_norm, **constants)
    v = norm(qkv[..., v_row, :], v_norm, **constants)
    return q, k, v


def q_keqv_rms_norm(
    q, kv, q_norm, k_norm, v_norm=None, *, eps=1e-6, scale_offset=0.0, norm: Norm = rms_norm
):
    """`ops.q_keqv_rms_norm` with the given norm."""
    constants = {"eps": eps, "scale_offset": scale_offset}
    return (
        norm(q, q_norm, **constants),
        norm(kv, k_norm, **constants),
        norm(kv, v_norm, **constants),
    )


def rotate(x, cos, sin):
    """Rotates pairs (i, i + D/2), i < R/2, of [..., N, D] by angles of cos and sin [..., R/2]."""
    x = np.array(x, np.float64)
    cos, sin = (np.asarray(a, np.float64)[..., None, :] for a in (cos, sin))
    pairs, half = cos.shape[-1], x.shape[-1] // 2
    low, high = x[..., :pairs].copy(), x[..., half : half + pairs].copy()
    x[..., :pairs] = low * cos - high * sin
    x[..., half : half + pairs] = high * cos + low * sin
    return x


def usual_rotate(x, cos, sin):
    """Rotation with the roundings of Hugging Face transformers.

    cos and sin are in x's dtype, and each product and sum is rounded.
    """
    x = np.array(x)
    cos, sin = (np.asarray(a).astype(x.dtype)[..., None, :] for a in (cos, sin))
    pairs, half = cos.shape[-1], x.shape[-1] // 2
    low, high = x[..., :pairs].copy(), x[..., half : half + pairs].copy()
    x[..., :pairs] = low * cos + -high * sin
    x[..., half : half + pairs] = high * cos + low * sin
    return x


def rope(x, positions, *, theta, rotary_dim):
    """`rotate` by positions [...] * theta^(-2i/D)."""
    inv_freq = theta ** (-2.0 * np.arange(rotary_dim // 2) / np.shape(x)[-1])
    angle = np.asarray(positions, np.float64)[..., None] * inv_freq
    return rotate(x, np.cos(angle), np.sin(angle))


def qkv_norm_rope(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    *,
    mode: ProjectionMode,
    eps=1e-6,
    norm: Norm = rms_norm,
    turn=rotate,
):
    """`ops.qkv_norm_rope` with the given norm and rotation."""
    q, k, v = qkv_rms_norm(qkv, q_norm, k_norm, mode=mode, eps=eps, norm=norm)
    return turn(q, cos, sin), None if k is None else turn(k, cos, sin), v


def band(x, rotary_dim):
    """The rotating dims of [..., D]: [..., R]."""
    half, pairs = x.shape[-1] // 2, rotary_dim // 2
    return np.concatenate([x[..., :pairs], x[..., half : half + pairs]], axis=-1)


def absorbed_query(q, k_norm, rotary_dim):
    """The query of a compact cache, of rotated q [..., D]: [..., D + R] in q's dtype."""
    absorbed = q * np.asarray(k_norm).astype(q.dtype)
    half, pairs = q.shape[-1] // 2, rotary_dim // 2
    absorbed[..., :pairs] = absorbed[..., half : half + pairs] = 0
    return np.concatenate([absorbed, band(q, rotary_dim)], axis=-1)


def write(array, slots, rows):
    """`array` [num_pages, page_size, Nkv, width] with rows [M, Nkv, width] in slots, float64."""
    written = np.array(array).astype(np.float64)
    flat = written.reshape(-1, *written.shape[2:])
    for slot, row in zip(slots, rows, strict=True):
        if 0 <= slot < len(flat):
            flat[slot] = row
    return written


def qkv_norm_rope_write(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    slots,
    cache,
    *,
    mode: ProjectionMode,
    eps=1e-6,
    norm: Norm = rms_norm,
    turn=rotate,
):
    """`ops.qkv_norm_rope_write` with the given norm and rotation, float8 not rounded."""
    q, k, v = qkv_norm_rope(qkv, q_norm, k_norm, cos, sin, mode=mode, eps=eps, norm=norm, turn=turn)
    rotary_dim, arrays = 2 * cos.shape[-1], cache._asdict()
    if "k_rot" in arrays:
        q = absorbed_query(q, k_norm, rotary_dim)
    if mode is ProjectionMode.Q_ONLY:
        return q, cache
    k_scale, v_scale = (1, 1) if cache.scale is None else np.asarray(cache.scale, np.float64)
    rows = {"k": k / k_scale, "v": v / v_scale, "k_rot": band(k, rotary_dim) / k_scale}
    written = {
        name: write(array, slots, rows[name]) for name, array in arrays.items() if name in rows
    }
    return q, cache._replace(**written)


def attention(spec: AttentionSpec, weights, x, kv=None):
    """A layer over whole sequences from position 0.

    Args:
        spec: of the layer.
        weights: dict with `qkv_proj` [E, Nkv, G + P, D], `o_proj` [Nq, D, E], `q_norm` [D] and,
            unless Q_ONLY, `k_norm` [D].
        x: [B, T, E].
        kv: for Q_ONLY the (k, v) of the producing layer.

    Returns:
        (y, (k, v)): y [B, T, E], k and v [B, T, Nkv, D].
    """
    weights = {name: np.asarray(w).astype(np.float64) for name, w in weights.items()}
    x = np.asarray(x).astype(np.float64)
    batch, tokens, _ = x.shape
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
    turn = {"positions": positions, "theta": spec.rope_theta, "rotary_dim": spec.rotary_dim}
    q, k, v = qkv_rms_norm(
        np.einsum("bte,eknd->btknd", x, weights["qkv_proj"]),
        weights["q_norm"],
        weights.get("k_norm"),
        mode=spec.mode,
        eps=spec.eps,
    )
    q = rope(q, **turn)
    if spec.mode is ProjectionMode.Q_ONLY:
        k, v = kv
    else:
        k = rope(k, **turn)
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


def cached_attention(
    q, cache, page_table, positions, *, sliding_window=None, scale=1.0, rounded=lambda x: x
):
    """Attention of `ops.decode_attention` and `ops.prefill_attention`, token by token.

    Args:
        q, cache, page_table, positions, sliding_window, scale: as the ops have them.
        rounded: rounds scores, weights and the result.
    """
    q = np.asarray(q).astype(np.float64)
    num_pages, page_size, num_kv_heads, head_dim = cache.v.shape
    table = np.arange(len(q))[:, None] if page_table is None else np.asarray(page_table)

    def rows(part):
        array = np.asarray(part.array).astype(np.float64)
        array = array.reshape(num_pages * page_size, num_kv_heads, -1)
        return array if part.scale is None else array * np.float64(part.scale)

    k = np.concatenate([rows(part) for part in cache.key_parts], axis=-1)
    v = rows(cache.value_part)
    o = np.zeros((*q.shape[:2], num_kv_heads, q.shape[2] // num_kv_heads, head_dim))
    for b, t in np.argwhere(np.asarray(positions) >= 0):
        last = int(positions[b, t])
        oldest = 0 if sliding_window is None else max(0, last - sliding_window + 1)
        place = np.arange(oldest, last + 1) % (table.shape[1] * page_size)
        slots = table[b, place // page_size] * page_size + place % page_size
        heads = q[b, t].reshape(num_kv_heads, -1, q.shape[3])
        scores = rounded(scale * (heads @ k[slots].transpose(1, 2, 0)))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = rounded(weights / weights.sum(axis=-1, keepdims=True))
        o[b, t] = weights @ v[slots].transpose(1, 0, 2)
    o[np.asarray(positions) == UNPLACED] = np.nan
    return rounded(o).reshape(*q.shape[:3], head_dim)


def usual_cached_attention(q, *arguments, **constants):
    """`cached_attention` with the roundings of Hugging Face's eager attention."""

    def rounded(x):
        return x.astype(np.asarray(q).dtype).astype(np.float64)

    return cached_attention(q, *arguments, **constants, rounded=rounded)


def grouped_matmul(x, w, group_sizes):
    """`ops.grouped_matmul`, group by group, in float64."""
    x = np.asarray(x).astype(np.float64)
    y, first = np.zeros((x.shape[0], w.shape[2])), 0
    for group, size in enumerate(np.asarray(group_sizes)):
        rows = slice(first, first := first + size)
        if size:
            y[rows] = x[rows] @ np.asarray(w[group]).astype(np.float64)
    return y


def grouped_gated_matmul(x, w, group_sizes, rows=None, *, rounded=lambda y: y):
    """`ops.grouped_gated_matmul` in float64; `rounded` says how the two products are."""
    x = x if rows is None else np.asarray(x)[np.asarray(rows)]
    gate, up = (rounded(grouped_matmul(x, w[:, :, part], group_sizes)) for part in (0, 1))
    return gelu(gate) * up


def usual_grouped_gated_matmul(x, w, group_sizes, rows=None):
    """`grouped_gated_matmul` with the roundings of Hugging Face's experts: of both products."""
    dtype = np.asarray(x).dtype

    def rounded(y):
        return y.astype(dtype).astype(np.float64)

    return grouped_gated_matmul(x, w, group_sizes, rows, rounded=rounded).astype(dtype)


def router(x, scale, w, per_expert_scale, *, top_k, eps=1e-6):
    """`ops.router`: (weights in float64, experts, group_sizes, row_tokens, place)."""
    scores = rms_norm(x, scale, eps=eps) / np.sqrt(x.shape[-1]) @ np.asarray(w).astype(np.float64)
    scores = scores.reshape(-1, scores.shape[-1])
    experts = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    weights = np.exp(np.take_along_axis(scores, experts, axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    weights *= np.asarray(per_expert_scale).astype(np.float64)[experts]
    order = np.argsort(experts, axis=None, kind="stable")
    sizes = np.bincount(experts.ravel(), minlength=w.shape[1])
    return weights, experts, sizes, order // top_k, np.argsort(order).reshape(experts.shape)


def moe_combine(x, y, rows, weights, place, norms, next_scales=(), factor=None, *, eps=1e-6):
    """`ops.moe_combine` in float64; norms are of the sum as it is stored, in x's dtype."""
    y, rows, weights = (np.asarray(a).astype(np.float64) for a in (y, rows, weights))
    y = y.sum(axis=0) if y.ndim > np.ndim(x) else y
    experts = np.einsum("mk,mke->me", weights, rows[np.asarray(place)]).reshape(y.shape)
    both = rms_norm(y, norms.mlp, eps=eps) + rms_norm(experts, norms.experts, eps=eps)
    return add_rms_norm(x, both, norms.both, next_scales, factor, eps=eps)


def gelu(x):
    """GELU in its tanh form, in float64."""
    x = np.asarray(x).astype(np.float64)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(x, w):
    """`ops.linear`, x [..., K] times w [K, N], or [K, 2, N] with both products, in float64."""
    x, w = (np.asarray(a).astype(np.float64) for a in (x, w))
    return np.tensordot(x, w, axes=1)


def geglu(x, w, *, rounded=lambda y: y):
    """`ops.geglu` in float64; `rounded` says how the two products are."""
    gate, up = np.moveaxis(rounded(linear(x, w)), -2, 0)
    return gelu(gate) * up


def add_rms_norm(x, y, scale, next_scales=(), factor=None, *, eps=1e-6):
    """`ops.add_rms_norm` in float64; norms are of the sum as it is stored, in x's dtype."""
    dtype = np.asarray(x).dtype
    x, y = (np.asarray(a).astype(np.float64) for a in (x, y))
    y = y if y.ndim == x.ndim else y.sum(axis=0)
    total = x + rms_norm(y, scale, eps=eps)
    total *= 1 if factor is None else np.float64(factor)
    stored = total.astype(dtype)
    return total, tuple(rms_norm(stored, s, eps=eps) for s in next_scales)


def max_error(actual, exact) -> float:
    """The largest absolute difference; NaN anywhere gives NaN."""
    actual = np.asarray(actual).astype(np.float64)
    return float(np.max(np.abs(actual - exact), initial=0.0))


def largest(exact) -> float:
    """The largest number in magnitude."""
    return float(np.max(np.abs(exact), initial=0.0))


def no_worse_than(error: float, usual_error: float, dtype, largest_exact: float = 0.0) -> bool:
    """Whether `error` does not exceed `usual_error`, both measured against float64.

    Both paths round float32 results that differ in their last bits. In a 16-bit dtype these can
    fall on different sides of a tie, 2^-12 of half an ulp apart at the most; in float32 they are
    the whole error, so there a few of them are allowed for.

    Of few numbers the usual path may happen to hit each. An error of one rounding of the largest is
    fine nevertheless, in float32 of the four that a norm takes: mean, rsqrt and two products.

    Args:
        error: the largest of our result.
        usual_error: the largest of the usual path's.
        dtype: of both results.
        largest_exact: the largest exact number in magnitude.
    """
    is_float32 = np.dtype(dtype).itemsize == 4
    half_ulp = 0.0
    if largest_exact > 0:
        half_ulp = 0.5 * float(ml_dtypes.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(largest_exact))
    slack, roundings = (4.0, 4) if is_float32 else (1 + 2.0**-12, 1)
    return error <= max(usual_error * slack, roundings * half_ulp)
