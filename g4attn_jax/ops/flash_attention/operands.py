"""Operands of an attention kernel, Triton's or Mosaic's, for a cache of any form and layout."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from g4attn_jax.cache import Cache

LOG2_E = 1.4426950408889634
# Below every score, and finite: of a row that has seen nothing yet exp(-inf - m) is 0.
NO_SCORE = float(jnp.finfo(jnp.float32).min)


class AttentionInputs(NamedTuple):
    """Arrays that a kernel reads; None is not there."""

    q: jax.Array  # [B * T * Nq, width]
    keys: tuple[jax.Array, ...]  # [slots * Nkv, part of width]
    v: jax.Array | None  # [slots * Nkv, D]; None: the first of keys
    page_table: jax.Array | None  # int32 [B * pages]; None: sequence b has page b
    positions: jax.Array  # int32 [B * T]
    scale: jax.Array | None  # float32 [2], of the cache


class KeyPart(NamedTuple):
    """Columns and scale of an array of keys."""

    begin: int  # of its columns in q
    width: int
    scale_index: int  # which of the cache's scales


class AttentionShape(NamedTuple):
    """Sizes that a kernel knows when it is compiled."""

    tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_pages: int
    page_size: int
    columns: int  # of the page table
    key_parts: tuple[KeyPart, ...] = ()
    value_scale_index: int = 0  # which of the cache's scales

    @property
    def num_q_heads(self):
        return self.num_kv_heads * self.group


def operands(q, cache: Cache, page_table, positions) -> tuple[AttentionInputs, AttentionShape]:
    """Arguments of an attention op, see `g4attn_jax.ops.decode_attention`, for a kernel."""
    _, tokens, num_q_heads, width = q.shape
    keys, values = cache.key_parts, cache.value_part
    num_pages, page_size, num_kv_heads, head_dim = values.array.shape
    inputs = AttentionInputs(
        q=q.reshape(-1, width),
        keys=tuple(part.array.reshape(-1, part.width) for part in keys),
        v=None if cache.values_are_keys else values.array.reshape(-1, head_dim),
        page_table=None if page_table is None else page_table.reshape(-1),
        positions=positions.reshape(-1),
        scale=cache.scale,
    )
    shape = AttentionShape(
        tokens=tokens,
        num_kv_heads=num_kv_heads,
        group=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        columns=1 if page_table is None else page_table.shape[1],
        key_parts=tuple(KeyPart(part.begin, part.width, part.scale_index) for part in keys),
        value_scale_index=values.scale_index,
    )
    return inputs, shape
