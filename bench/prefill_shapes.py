"""Shapes that the benchmark and the tuning of prefill attention share, and their arguments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from g4attn_jax.cache import Cache, CompactKVCache, KVCache

PAGE_SIZE = 64
ROTARY_DIM = 128


class Shape(NamedTuple):
    """Heads of one layer, and the form and layout of its cache."""

    num_kv_heads: int
    group: int
    head_dim: int
    sliding_window: int | None
    form: type[Cache]
    paged: bool

    def __str__(self):
        window = "" if self.sliding_window is None else f", window {self.sliding_window}"
        heads = f"{self.num_kv_heads * self.group}/{self.num_kv_heads}/{self.head_dim}{window}"
        return f"{heads} {self.fields()['form']} {self.fields()['layout']}"

    def fields(self) -> dict:
        """What a row of a JSON says of it."""
        form = "compact" if self.form is CompactKVCache else "separate"
        fields = self._asdict() | {"form": form, "layout": "paged" if self.paged else "contiguous"}
        del fields["paged"]
        return fields

    def flops(self, tokens: int) -> int:
        """Of the two products of what a token sees: nothing masked, no absorbed query."""
        window = tokens if self.sliding_window is None else min(self.sliding_window, tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window
        return 4 * self.head_dim * pairs * self.num_kv_heads * self.group

    def arguments(self, tokens: int) -> tuple:
        """q, cache, page table and positions of one sequence."""
        keys = jax.random.split(jax.random.key(tokens), 4)
        pages, table = (1, tokens), None
        if self.paged:
            pages = (tokens // PAGE_SIZE, PAGE_SIZE)
            table = jax.random.permutation(keys[0], pages[0]).astype(jnp.int32)[None]
        compact = self.form is CompactKVCache
        v = self._normal(keys[1], *pages, self.num_kv_heads, self.head_dim)
        width = ROTARY_DIM if compact else self.head_dim
        k = self._normal(keys[2], *pages, self.num_kv_heads, width)
        q_width = self.head_dim + ROTARY_DIM * compact
        q = self._normal(keys[3], 1, tokens, self.num_kv_heads * self.group, q_width)
        cache = CompactKVCache(v, k) if compact else KVCache(k, v)
        return q * self.head_dim**-0.5, cache, table, jnp.arange(tokens, dtype=jnp.int32)[None]

    @staticmethod
    def _normal(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)


SHAPES = (
    Shape(4, 8, 512, None, KVCache, False),  # 31B full
    Shape(4, 8, 512, None, KVCache, True),
    Shape(4, 8, 512, None, CompactKVCache, False),
    Shape(4, 8, 512, None, CompactKVCache, True),
    Shape(16, 2, 256, 1024, KVCache, False),  # 31B sliding
    Shape(16, 2, 256, 1024, KVCache, True),
)
