"""The decode steps that the attention benchmarks measure."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bench.measure import L2_BYTES
from g4attn_jax.cache import Cache, CompactKVCache, KVCache

PAGE_SIZE = 64
ROTARY_DIM = 128  # of the full-attention layers, which a compact cache is for


class Shape(NamedTuple):
    """A layer's step, its caches full."""

    batch: int
    context: int
    num_kv_heads: int
    group: int
    head_dim: int
    sliding_window: int | None = None

    def forms(self) -> tuple[type[Cache], ...]:
        """KVCache, and for K = V layers CompactKVCache."""
        is_31b_or_12b = self.head_dim == 512 and self.num_kv_heads * self.group >= 16
        return (KVCache, CompactKVCache) if is_31b_or_12b else (KVCache,)

    def fields(self) -> dict[str, int | None]:
        """Those of a row of the JSON."""
        return self._asdict()

    def query_width(self, form: type[Cache]) -> int:
        """Numbers of a query head."""
        return self.head_dim + ROTARY_DIM * (form is CompactKVCache)

    def bytes(self, form: type[Cache], query_tokens: int) -> int:
        """That must move: the cache read, queries read, outputs written."""
        width = self.query_width(form)
        cache = self.batch * self.context * self.num_kv_heads
        cache *= width if form is CompactKVCache else 2 * width
        rows = self.batch * query_tokens * self.num_kv_heads * self.group
        return 2 * (cache + rows * (width + self.head_dim))

    def calls(self, form: type[Cache], query_tokens: int, *, paged: bool) -> list[tuple]:
        """(q, cache, page_table, positions), as many as the L2 does not hold."""
        count = math.ceil(2 * L2_BYTES / self.bytes(form, query_tokens))
        return [
            self._call(jax.random.key(i), form, query_tokens, paged=paged) for i in range(count)
        ]

    def _call(self, key, form, query_tokens, *, paged):
        keys = jax.random.split(key, 4)
        shape, table = (self.batch, self.context), None
        if paged:
            columns = self.context // PAGE_SIZE
            shape = (self.batch * columns, PAGE_SIZE)
            table = jax.random.permutation(keys[3], shape[0]).astype(jnp.int32)
            table = table.reshape(self.batch, columns)
        widths = {"k": self.head_dim, "v": self.head_dim}
        if form is CompactKVCache:
            widths = {"v": self.head_dim, "k_rot": ROTARY_DIM}
        arrays = {
            name: jax.random.normal(k, (*shape, self.num_kv_heads, width), jnp.bfloat16)
            for k, (name, width) in zip(keys, widths.items(), strict=False)
        }
        heads = (self.batch, query_tokens, self.num_kv_heads * self.group, self.query_width(form))
        q = jax.random.normal(keys[2], heads) * self.head_dim**-0.5
        first = self.context - query_tokens
        positions = jnp.broadcast_to(first + jnp.arange(query_tokens, dtype=jnp.int32), heads[:2])
        return q.astype(jnp.bfloat16), form(**arrays), table, positions


SHAPES = (
    Shape(1, 32768, 4, 8, 512),
    Shape(8, 8192, 4, 8, 512),
    Shape(32, 8192, 4, 8, 512),
    Shape(8, 32768, 1, 16, 512),
    Shape(1, 131072, 4, 8, 512),
    Shape(32, 1024, 16, 2, 256, sliding_window=1024),
    Shape(1, 1024, 16, 2, 256, sliding_window=1024),
    Shape(8, 8192, 1, 8, 512),
)
QUERY_TOKENS = (1, 6)
