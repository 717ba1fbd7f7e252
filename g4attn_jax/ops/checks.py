"""Argument checks that the ops and the module share."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax.cache import FLOAT8, Cache, CompactKVCache, KVCache
from g4attn_jax.config import ProjectionMode
from g4attn_jax.layout import UNPLACED, SegmentIds, check_page_table
from g4attn_jax.page_allocator import check_page_size

_DTYPES = ("bfloat16", "float16", "float32")
_MAX_INT32 = np.iinfo(np.int32).max


def check_buffer(name: str, buffer: jax.Array, *, dims: str) -> None:
    """Refuses a buffer of heads that is not [..., `dims`] in a dtype the kernel takes.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    needed = len(dims.split(", "))
    if jnp.ndim(buffer) < needed:
        raise ValueError(f"{name} has shape {jnp.shape(buffer)}; accepted: [..., {dims}]")
    check_dtype(name, getattr(buffer, "dtype", None))
    if 0 in buffer.shape[-needed:]:
        raise ValueError(f"{name} has shape {buffer.shape}; none of {dims} may be 0")


def check_packed(qkv: jax.Array, mode: ProjectionMode) -> None:
    """Refuses what is not a packed projection [..., Nkv, G + P, D] of this mode.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if not isinstance(mode, ProjectionMode):
        raise ValueError(f"mode is {mode!r}; accepted: {', '.join(map(str, ProjectionMode))}")
    check_buffer("qkv", qkv, dims="Nkv, G + P, D")
    rows, kv_rows = qkv.shape[-2], mode.num_kv_projections
    if rows <= kv_rows:
        raise ValueError(
            f"qkv has {rows} rows per KV head; {mode.name} needs at least {1 + kv_rows}: "
            f"1 or more query heads and {kv_rows} of K and V"
        )


def check_k_norm(k_norm: jax.Array | None, *, mode: ProjectionMode) -> None:
    """Refuses a missing or a surplus scale of K.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if mode is ProjectionMode.Q_ONLY:
        if k_norm is not None:
            raise ValueError("k_norm was given; Q_ONLY normalises no K and accepts None")
    elif k_norm is None:
        raise ValueError(f"k_norm is missing; {mode.name} needs it, of shape (D,)")


def check_cache(
    cache: Cache,
    *,
    mode: ProjectionMode,
    dtype: jax.typing.DTypeLike,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
) -> None:
    """Refuses a cache that such a layer cannot write or read.

    Raises:
        ValueError: naming the array, what was given and what is accepted.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; accepted: KVCache or CompactKVCache")
    widths = {"k": head_dim, "v": head_dim}
    if isinstance(cache, CompactKVCache):
        if mode is ProjectionMode.QKV_FULL:
            raise ValueError("cache is a CompactKVCache; QKV_FULL accepts KVCache")
        widths = {"v": head_dim, "k_rot": rotary_dim}
    for name, width in widths.items():
        shape = getattr(getattr(cache, name), "shape", ())
        if len(shape) == 4 and shape[2:] != (num_kv_heads, width):
            raise ValueError(
                f"cache.{name} has shape {shape}; accepted: [num_pages, page_size, {num_kv_heads}, "
                f"{width}]"
            )
    check_cache_arrays(cache, dtype=dtype)


def check_cache_arrays(cache: Cache, *, dtype: jax.typing.DTypeLike) -> None:
    """Refuses a cache whose arrays do not go together, or not with activations of a dtype.

    Raises:
        ValueError: naming the array, what was given and what is accepted.
    """
    accepted = jnp.dtype(dtype) if cache.scale is None else FLOAT8
    names = cache._fields[:2]
    for name in names:
        array = getattr(cache, name)
        if getattr(array, "dtype", None) != accepted:
            raise ValueError(
                f"cache.{name} is a {type(array).__name__} of dtype "
                f"{getattr(array, 'dtype', None)}; accepted: an array of the layer's dtype, "
                f"{dtype}, or of float8_e4m3fn together with cache.scale"
            )
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(
                f"cache.{name} has shape {array.shape}; accepted: [num_pages, page_size, Nkv, "
                "width], none of them 0"
            )
    heads = {name: getattr(cache, name).shape[:3] for name in names}
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"the arrays of cache have [num_pages, page_size, Nkv] {heads}; accepted: one"
        )
    scale = cache.scale
    if scale is not None and (jnp.shape(scale) != (2,) or jnp.result_type(scale) != "float32"):
        raise ValueError(
            f"cache.scale has shape {jnp.shape(scale)} and dtype {jnp.result_type(scale)}; "
            "accepted: float32 [2], of K and of V"
        )


def check_attention(
    q: jax.Array,
    cache: Cache,
    page_table: jax.Array | None,
    positions: jax.Array,
    *,
    sliding_window: int | None,
    scale: float,
    max_tokens: int | None = None,
) -> None:
    """Refuses arguments of an attention op that do not go together.

    Args:
        q, cache, page_table, positions, sliding_window, scale: as `decode_attention` has them.
        max_tokens: the most that T may be; None: any number.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_buffer("q", q, dims="B, T, Nq, width")
    _check_query(q, cache, max_tokens)
    check_count("sliding_window", sliding_window)
    check_number("scale", scale)
    _check_addresses(q, cache, page_table, positions, sliding_window)


def check_segment_ids(
    segment_ids: SegmentIds, q: jax.Array, cache: Cache, page_table: jax.Array | None
) -> None:
    """Refuses segment ids that do not go with the other arguments of `prefill_attention`.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if not isinstance(segment_ids, SegmentIds):
        raise ValueError(
            f"segment_ids is a {type(segment_ids).__name__}; accepted: SegmentIds, or None"
        )
    columns = 1 if page_table is None else page_table.shape[1]
    shapes = {"query": q.shape[:2], "key": (q.shape[0], columns * cache.v.shape[1])}
    for name, wanted in shapes.items():
        array = getattr(segment_ids, name)
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape != wanted or dtype != "int32":
            raise ValueError(
                f"segment_ids.{name} has shape {shape} and dtype {dtype}; accepted: int32 {wanted}"
            )


def _check_query(q, cache, max_tokens):
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; accepted: KVCache or CompactKVCache")
    check_cache_arrays(cache, dtype=q.dtype)
    num_kv_heads = cache.v.shape[2]
    too_many = max_tokens is not None and q.ndim == 4 and q.shape[1] > max_tokens
    if q.ndim != 4 or too_many or q.shape[2] % num_kv_heads:
        tokens = "T of 1 or more" if max_tokens is None else f"T from 1 to {max_tokens}"
        raise ValueError(
            f"q has shape {q.shape}; accepted: [B, T, Nq, width] with {tokens} and Nq a multiple "
            f"of {num_kv_heads}, the cache's KV heads"
        )
    if isinstance(cache, KVCache) and cache.k.shape != cache.v.shape:
        raise ValueError(
            f"cache.k has shape {cache.k.shape}; accepted: that of cache.v, {cache.v.shape}"
        )
    width = sum(part.array.shape[-1] for part in cache.key_parts)
    if q.shape[3] != width:
        raise ValueError(
            f"q has {q.shape[3]} numbers a head; with this {type(cache).__name__} accepted: "
            f"{width}, as qkv_norm_rope_write returns it"
        )


def _check_addresses(q, cache, page_table, positions, sliding_window):
    batch, tokens = q.shape[:2]
    num_pages, page_size = cache.v.shape[:2]
    shape, dtype = getattr(positions, "shape", None), getattr(positions, "dtype", None)
    if shape != (batch, tokens) or dtype != "int32":
        raise ValueError(
            f"positions has shape {shape} and dtype {dtype}; accepted: int32 ({batch}, {tokens})"
        )
    columns = 1
    if page_table is None:
        if num_pages != batch:
            raise ValueError(
                f"page_table is None and cache.v has shape {cache.v.shape}; accepted without a "
                f"page table: {batch} pages, one a sequence"
            )
    else:
        shape, dtype = getattr(page_table, "shape", ()), getattr(page_table, "dtype", None)
        if len(shape) != 2 or shape[0] != batch or 0 in shape or dtype != "int32":
            raise ValueError(
                f"page_table has shape {shape} and dtype {dtype}; accepted: int32 [{batch}, pages]"
            )
        columns = shape[1]
        check_page_size(page_size)
        check_page_table(page_table, num_pages)
    if isinstance(positions, jax.core.Tracer):
        return
    known, capacity = np.asarray(positions), columns * page_size
    lowest, highest = int(known.min(initial=-1)), int(known.max(initial=-1))
    # A ring holds what any of the tokens sees.
    is_ring = sliding_window is not None and capacity >= sliding_window + tokens - 1
    if lowest < UNPLACED or (highest >= capacity and not is_ring):
        raise ValueError(
            f"positions has {lowest if lowest < UNPLACED else highest}; accepted: -1 (padding), "
            f"{UNPLACED} (no slot) and 0 to {capacity - 1}, the last slot of a sequence"
        )


def check_grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    dims: str,
    rows: jax.Array | None = None,
) -> None:
    """Refuses arguments of a grouped matmul that do not go together.

    Args:
        x, group_sizes, rows: as `grouped_gated_matmul` has them.
        w: [`dims`], of which the first two are X and K.
        dims: sizes of w, each a letter or a number.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_buffer("x", x, dims="K")
    check_buffer("w", w, dims=dims)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; accepted: [T, K]")
    wanted = dims.split(", ")
    fixed = all(size == int(n) for size, n in zip(w.shape, wanted, strict=False) if n.isdigit())
    if w.ndim != len(wanted) or w.shape[1] != x.shape[1] or not fixed:
        raise ValueError(f"w has shape {w.shape}; accepted: [{dims}] with K = {x.shape[1]}")
    if w.dtype != x.dtype:
        raise ValueError(f"w has dtype {w.dtype}; accepted: that of x, {x.dtype}")
    for name, array, size in (("group_sizes", group_sizes, w.shape[0]), ("rows", rows, None)):
        if array is None and name == "rows":
            continue
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape is None or len(shape) != 1 or dtype != "int32" or size not in (None, shape[0]):
            accepted = "[M]" if size is None else f"({size},)"
            raise ValueError(
                f"{name} has shape {shape} and dtype {dtype}; accepted: int32 {accepted}"
            )
    count = x.shape[0] if rows is None else rows.shape[0]
    if not isinstance(group_sizes, jax.core.Tracer) and isinstance(count, int):
        known = np.asarray(group_sizes, np.int64)
        if known.min() < 0 or known.sum() > count:
            raise ValueError(
                f"group_sizes has {known.min()} as its least and sums to {known.sum()}; accepted: "
                f"0 or more, {count} in all at most"
            )


def check_scales(scales: Mapping[str, jax.Array | None], *, head_dim: int) -> None:
    """Refuses a scale that is given and is not [D] in a dtype the kernel takes.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    for name, scale in scales.items():
        if scale is None:
            continue
        if jnp.shape(scale) != (head_dim,):
            raise ValueError(f"{name} has shape {jnp.shape(scale)}; accepted: ({head_dim},)")
        check_dtype(name, getattr(scale, "dtype", None))


def check_eps(eps: float, scale_offset: float) -> None:
    """Refuses constants of the norm that are not plain numbers, or an eps below zero.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_number("eps", eps)
    check_number("scale_offset", scale_offset)
    if eps < 0:
        raise ValueError(f"eps is {eps!r}; accepted: 0 or more")


def check_count(name: str, value: int | None, most: int = _MAX_INT32) -> None:
    """Refuses what is neither None nor an integer from 1 to `most`.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not is_int or not 1 <= value <= most):
        raise ValueError(f"{name} is {value!r}; accepted: None or an integer from 1 to {most}")


def check_number(name: str, value: float) -> None:
    """Refuses what is not a finite Python number.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; accepted: a finite Python number")


def check_dtype(name: str, dtype: jax.typing.DTypeLike | None) -> None:
    """Refuses a dtype the kernel does not take.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if dtype is None or jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}; accepted: {', '.join(_DTYPES)}")
