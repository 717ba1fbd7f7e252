"""Shapes that the prologue's benchmark and tuning share, and their arguments."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bench.measure import L2_BYTES
from bench.qkv_shapes import MAX_CACHED_TOKENS
from g4attn_jax import ProjectionMode
from g4attn_jax.cache import Cache, CompactKVCache, KVCache
from g4attn_jax.rope import rope_cos_sin

NUM_PAGES, PAGE_SIZE = 1024, 64  # 65 536 slots


class Shape(NamedTuple):
    """Heads of one layer and the form of its cache."""

    mode: ProjectionMode
    form: type[Cache]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int

    def __str__(self):
        heads = f"{self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"
        if self.mode is ProjectionMode.Q_ONLY:
            return f"{self.mode.name} {heads}"
        return f"{self.mode.name} {heads} {self.fields()['form']}"

    def fields(self) -> dict:
        """What a row of a JSON says of it."""
        form = "compact" if self.form is CompactKVCache else "separate"
        return {**self._asdict(), "mode": self.mode.name, "form": form}

    @property
    def rows_in(self) -> int:
        """Rows of the packed buffer per token."""
        group = self.num_q_heads // self.num_kv_heads
        return self.num_kv_heads * (group + self.mode.num_kv_projections)

    def bytes(self, tokens: int) -> int:
        """Bytes that must move: the packed buffer, cos, sin and slots in; q, k and v out."""
        compact = self.form is CompactKVCache
        numbers = self.rows_in * self.head_dim
        numbers += self.num_q_heads * (self.head_dim + (self.rotary_dim if compact else 0))
        if self.mode is not ProjectionMode.Q_ONLY:
            widths = self.head_dim + (self.rotary_dim if compact else self.head_dim)
            numbers += self.num_kv_heads * widths
        return tokens * (2 * numbers + 4 * self.rotary_dim + 4)

    def calls(self, tokens: int) -> list[tuple]:
        """Argument tuples (qkv, q_norm, k_norm, cos, sin, slots) of random numbers."""
        # The last matmul leaves the packed buffer of a few tokens in the L2.
        rotate = tokens > MAX_CACHED_TOKENS
        copies = math.ceil(4 * L2_BYTES / self.bytes(tokens)) if rotate else 8
        keys = jax.random.split(jax.random.key(tokens), 3)
        group_rows = self.rows_in // self.num_kv_heads
        shape = (tokens, self.num_kv_heads, group_rows, self.head_dim)
        q_norm, k_norm = jax.random.normal(keys[0], (2, self.head_dim), jnp.bfloat16)
        if self.mode is ProjectionMode.Q_ONLY and self.form is KVCache:
            k_norm = None
        calls = []
        for i in range(copies):
            key = jax.random.fold_in(keys[1], i)
            slots = jax.random.permutation(key, NUM_PAGES * PAGE_SIZE)[:tokens].astype(jnp.int32)
            positions = jax.random.randint(key, (tokens,), 0, 2**18)
            cos, sin = rope_cos_sin(
                positions, theta=1e6, head_dim=self.head_dim, rotary_dim=self.rotary_dim
            )
            qkv = jax.random.normal(jax.random.fold_in(keys[2], i if rotate else 0), shape)
            calls.append((qkv.astype(jnp.bfloat16), q_norm, k_norm, cos, sin, slots))
        return calls

    def cache(self) -> Cache:
        """A cache of 65 536 slots."""
        key = jax.random.key(1)
        head = NUM_PAGES, PAGE_SIZE, self.num_kv_heads
        v = jax.random.normal(key, (*head, self.head_dim), jnp.bfloat16)
        width = self.rotary_dim if self.form is CompactKVCache else self.head_dim
        k = jax.random.normal(key, (*head, width), jnp.bfloat16)
        return CompactKVCache(v, k) if self.form is CompactKVCache else KVCache(k, v)


SHAPES = (
    Shape(ProjectionMode.QK_ONLY, KVCache, 32, 4, 512, 128),  # 31B full
    Shape(ProjectionMode.QK_ONLY, CompactKVCache, 32, 4, 512, 128),
    Shape(ProjectionMode.QK_ONLY, CompactKVCache, 16, 1, 512, 128),  # 12B full
    Shape(ProjectionMode.QKV_FULL, KVCache, 32, 16, 256, 256),  # 31B sliding
    Shape(ProjectionMode.Q_ONLY, KVCache, 8, 1, 512, 128),  # E2B full, KV-shared
)
