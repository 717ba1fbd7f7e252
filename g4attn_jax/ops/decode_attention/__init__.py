"""Attention of a few new tokens per sequence over a cache of any form and layout."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.cached_attention import MAX_DECODE_TOKENS
from g4attn_jax.ops import checks
from g4attn_jax.ops.decode_attention import reference, triton
from g4attn_jax.ops.implementation import Implementation, differentiable_op, for_cache

_op = differentiable_op(kernel=triton.decode_attention, reference=reference.decode_attention)


def decode_attention(
    q: Float[Array, "B T Nq width"],
    cache: Cache,
    page_table: Int[Array, "B pages"] | None,
    positions: Int[Array, "B T"],
    *,
    sliding_window: int | None = None,
    scale: float = 1.0,
    num_splits: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T Nq D"]:
    """softmax(scale q k^T + mask) v over the cache, which holds the new tokens already.

    A token at position p sees the keys at positions 0 .. p, with a window the last `sliding_window`
    of them. Position p of a sequence lies in slot p mod C of its C slots, which are those of its
    pages in order: contiguous, ring and paged caches are read by this one rule, and what no token
    sees is not read. Softmax in float32; nothing grows with the context but the partial results of
    the splits.

    Args:
        q: [B, T, Nq, D], or for a compact cache the absorbed query [B, T, Nq, D + R], as
            `qkv_norm_rope_write` returns it. T is 1 to 16.
        cache: Nkv divides Nq.
        page_table: int32 [B, pages], pages of each sequence in order, -1 where it has none. None:
            sequence b has page b, as in contiguous and ring caches.
        positions: int32 [B, T], -1 for padding. Each must have been written.
        sliding_window: keys that a token sees, its own included; None: all.
        scale: of the scores; 1 in Gemma 4.
        num_splits: programs that share a sequence and KV head; None chooses. Results at one number
            do not depend on the other sequences of the batch.
        implementation: None (the kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret". float8 needs 8.9 for the kernel.

    Returns:
        [B, T, Nq, D] in q's dtype; zeros for padding.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype, or a position or page that is
            known does not exist.
        NotImplementedError: "triton" was demanded and there is no supported GPU, or it cannot
            address a float8 array of 2^31 to 2^32 elements.

    Source: Dao et al., "Flash-Decoding for long-context inference" (2023); Kwon et al., "Efficient
    memory management for large language model serving with PagedAttention" (2023).
    """
    checks.check_buffer("q", q, dims="B, T, Nq, width")
    _check_cache(q, cache)
    _check_addresses(q, cache, page_table, positions, sliding_window)
    for name, number in (("sliding_window", sliding_window), ("num_splits", num_splits)):
        is_int = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and (not is_int or number < 1):
            raise ValueError(f"{name} is {number!r}; accepted: None or an integer of 1 or more")
    checks.check_number("scale", scale)
    return _op(
        q,
        cache,
        page_table,
        positions,
        sliding_window=sliding_window,
        scale=scale,
        num_splits=num_splits,
        **for_cache(implementation, cache),
    )


def _check_cache(q, cache):
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; accepted: KVCache or CompactKVCache")
    checks.check_cache_arrays(cache, dtype=q.dtype)
    num_kv_heads = cache.v.shape[2]
    if q.ndim != 4 or not 1 <= q.shape[1] <= MAX_DECODE_TOKENS or q.shape[2] % num_kv_heads:
        raise ValueError(
            f"q has shape {q.shape}; accepted: [B, T, Nq, width] with T from 1 to "
            f"{MAX_DECODE_TOKENS} and Nq a multiple of {num_kv_heads}, the cache's KV heads"
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
        if not isinstance(page_table, jax.core.Tracer):
            table = np.asarray(page_table)
            if table.min() < -1 or table.max() >= num_pages:
                wrong = table.min() if table.min() < -1 else table.max()
                raise ValueError(
                    f"page_table has {wrong}; accepted: -1 (none) and 0 to {num_pages - 1}"
                )
    if isinstance(positions, jax.core.Tracer):
        return
    known, capacity = np.asarray(positions), columns * page_size
    lowest, highest = int(known.min(initial=-1)), int(known.max(initial=-1))
    # A ring holds what any of the tokens sees.
    is_ring = sliding_window is not None and capacity >= sliding_window + tokens - 1
    if lowest < -1 or (highest >= capacity and not is_ring):
        raise ValueError(
            f"positions has {lowest if lowest < -1 else highest}; accepted: -1 (padding) and 0 to "
            f"{capacity - 1}, the last slot of a sequence"
        )
