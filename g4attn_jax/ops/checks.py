"""Argument checks that several ops share, see also `g4attn_jax.checks`."""

from collections.abc import Mapping
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax.cache import FLOAT8, Cache, array_names
from g4attn_jax.checks import (
    MAX_INT32,
    Size,
    check_array,
    check_choice,
    check_integer,
    check_number,
    check_type,
    known_values,
)
from g4attn_jax.config import ProjectionMode
from g4attn_jax.layout import UNPLACED, SegmentIds, check_page_table
from g4attn_jax.page_allocator import check_page_size


def check_packed(qkv: jax.Array, mode: ProjectionMode) -> None:
    """Refuses what is not a packed projection [..., Nkv, G + P, D] of this mode.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_choice("mode", mode, ProjectionMode)
    check_array("qkv", qkv, (..., "Nkv", "G + P", "D"))
    rows, kv_rows = qkv.shape[-2], mode.num_kv_projections
    if rows <= kv_rows:
        raise ValueError(
            f"qkv has {rows} rows per KV head; {mode.name} needs at least {1 + kv_rows}: "
            f"1 or more query heads and {kv_rows} of K and V"
        )


def check_residual_sum(
    x: jax.Array, y: jax.Array, scales: Mapping[str, jax.Array], factor: jax.Array | None
) -> None:
    """Refuses arguments of a sum with the residual stream that do not fit each other.

    Args:
        x: [..., E], the residual stream.
        y: a branch: of x's shape, or partial sums of it.
        scales: [E] of each norm, by the name of the argument.
        factor: [], of the sum, or None.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_array("x", x, (..., "E"))
    check_array("y", y, (..., "E"))
    if y.shape[-x.ndim :] != x.shape or y.ndim > x.ndim + 1 or y.size < x.size:
        raise ValueError(
            f"y has shape {y.shape}; accepted: {x.shape}, that of x, or partial sums of this shape"
        )
    for name, scale in scales.items():
        check_array(name, scale, x.shape[-1:])
    check_array("factor", factor, (), none=True)


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
    check_type("cache", cache, *get_args(Cache))
    if mode not in cache.modes:
        forms = ", ".join(form.__name__ for form in get_args(Cache) if mode in form.modes)
        raise ValueError(f"cache is a {type(cache).__name__}; {mode.name} layers accept {forms}")
    check_cache_arrays(cache, dtype=dtype)
    for name, width in cache.array_widths(head_dim, rotary_dim).items():
        array, shape = getattr(cache, name), ("num_pages", "page_size", num_kv_heads, width)
        check_array(f"cache.{name}", array, shape, array.dtype)


def check_cache_arrays(cache: Cache, *, dtype: jax.typing.DTypeLike) -> None:
    """Refuses a cache whose arrays do not go together, or not with activations of a dtype.

    Raises:
        ValueError: naming the array, what was given and what is accepted.
    """
    accepted = jnp.dtype(dtype) if cache.scale is None else FLOAT8
    names = array_names(cache)
    for name in names:
        array = getattr(cache, name)
        if getattr(array, "dtype", None) != accepted:
            raise ValueError(
                f"cache.{name} is a {type(array).__name__} of dtype "
                f"{getattr(array, 'dtype', None)}; accepted: an array of the layer's dtype, "
                f"{dtype}, or of float8_e4m3fn together with cache.scale"
            )
        check_array(f"cache.{name}", array, ("num_pages", "page_size", "Nkv", "width"), accepted)
    heads = {name: getattr(cache, name).shape[:3] for name in names}
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"the arrays of cache have [num_pages, page_size, Nkv] {heads}; accepted: one"
        )
    check_array("cache.scale", cache.scale, (2,), jnp.float32, none=True)


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
    check_array("q", q, ("B", "T", "Nq", "width"))
    _check_query(q, cache, max_tokens)
    check_integer("sliding_window", sliding_window, most=MAX_INT32, none=True)
    check_number("scale", scale)
    _check_addresses(q, cache, page_table, positions, sliding_window)


def check_segment_ids(
    segment_ids: SegmentIds, q: jax.Array, cache: Cache, page_table: jax.Array | None
) -> None:
    """Refuses segment ids that do not go with the other arguments of `prefill_attention`.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_type("segment_ids", segment_ids, SegmentIds, none=True)
    columns = 1 if page_table is None else page_table.shape[1]
    check_array("segment_ids.query", segment_ids.query, q.shape[:2], jnp.int32)
    keys = q.shape[0], columns * cache.v.shape[1]
    check_array("segment_ids.key", segment_ids.key, keys, jnp.int32)


def _check_query(q, cache, max_tokens):
    check_type("cache", cache, *get_args(Cache))
    check_cache_arrays(cache, dtype=q.dtype)
    num_kv_heads, head_dim = cache.v.shape[2:]
    too_many = max_tokens is not None and q.shape[1] > max_tokens
    if too_many or q.shape[2] % num_kv_heads:
        tokens = "T of 1 or more" if max_tokens is None else f"T from 1 to {max_tokens}"
        raise ValueError(
            f"q has shape {q.shape}; accepted: [B, T, Nq, width] with {tokens} and Nq a multiple "
            f"of {num_kv_heads}, the cache's KV heads"
        )
    for name, width in cache.array_widths(head_dim, cache.written[0].shape[-1]).items():
        array = getattr(cache, name)
        check_array(f"cache.{name}", array, (*cache.v.shape[:3], width), array.dtype)
    width = sum(part.width for part in cache.key_parts)
    if q.shape[3] != width:
        raise ValueError(
            f"q has {q.shape[3]} numbers a head; with this {type(cache).__name__} accepted: "
            f"{width}, as qkv_norm_rope_write returns it"
        )


def _check_addresses(q, cache, page_table, positions, sliding_window):
    batch, tokens = q.shape[:2]
    num_pages, page_size = cache.v.shape[:2]
    check_array("positions", positions, (batch, tokens), jnp.int32)
    columns = 1
    if page_table is None:
        if num_pages != batch:
            raise ValueError(
                f"page_table is None and cache.v has shape {cache.v.shape}; accepted without a "
                f"page table: {batch} pages, one a sequence"
            )
    else:
        check_array("page_table", page_table, (batch, "pages"), jnp.int32)
        columns = page_table.shape[1]
        check_page_size(page_size)
        check_page_table(page_table, num_pages)
    known, capacity = known_values(positions), columns * page_size
    if known is None:
        return
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
    columns: tuple[Size, ...],
    rows: jax.Array | None = None,
) -> None:
    """Refuses arguments of a grouped matmul that do not go together.

    Args:
        x, group_sizes, rows: as `grouped_gated_matmul` has them.
        w: [X, K, *columns].
        columns: sizes of w.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_array("x", x, ("T", "K"), empty=True)
    check_array("w", w, ("X", x.shape[1], *columns), x.dtype)
    check_array("group_sizes", group_sizes, w.shape[:1], jnp.int32)
    check_array("rows", rows, ("M",), jnp.int32, none=True, empty=True)
    count, known = x.shape[0] if rows is None else rows.shape[0], known_values(group_sizes)
    if known is not None and isinstance(count, int):
        known = known.astype(np.int64)
        if known.min() < 0 or known.sum() > count:
            raise ValueError(
                f"group_sizes has {known.min()} as its least and sums to {known.sum()}; accepted: "
                f"0 or more, {count} in all at most"
            )


def check_eps(eps: float, scale_offset: float) -> None:
    """Refuses constants of the norm that are not plain numbers, or an eps below zero.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    check_number("eps", eps, least=0)
    check_number("scale_offset", scale_offset)
