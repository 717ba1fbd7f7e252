"""Shapes that the norm's benchmark and tuning share, and their arguments."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bench.measure import L2_BYTES
from g4attn_jax import ProjectionMode

TOKENS = (1, 8, 32, 128, 1024, 8192)
# Up to here the projection that wrote the buffer leaves it in the L2; above, calls rotate over
# buffers of four times the L2, so that every byte comes from memory.
MAX_CACHED_TOKENS = 128


class Shape(NamedTuple):
    """Heads of one layer."""

    mode: ProjectionMode
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self):
        return f"{self.mode.name} {self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"

    @property
    def group(self) -> int:
        """G: query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    def fields(self) -> dict:
        """What a row of a JSON says of it."""
        return {**self._asdict(), "mode": self.mode.name}

    def bytes(self, tokens: int) -> int:
        """Bytes that must move: the packed buffer once in, q, k and v once out."""
        p = self.mode.num_kv_projections
        rows_in = self.group + p
        rows_out = self.group + (2 if p else 0)
        return tokens * self.num_kv_heads * (rows_in + rows_out) * self.head_dim * 2

    def calls(self, tokens: int) -> list[tuple]:
        """Argument tuples (qkv, q_norm, k_norm, v_norm) of random bfloat16."""
        copies = 1 if tokens <= MAX_CACHED_TOKENS else math.ceil(4 * L2_BYTES / self.bytes(tokens))
        keys = jax.random.split(jax.random.key(tokens), copies + 2)
        rows = self.group + self.mode.num_kv_projections
        shape = (tokens, self.num_kv_heads, rows, self.head_dim)
        q_norm, k_norm = (jax.random.normal(k, (self.head_dim,), jnp.bfloat16) for k in keys[:2])
        if self.mode is ProjectionMode.Q_ONLY:
            k_norm = None
        return [(jax.random.normal(k, shape, jnp.bfloat16), q_norm, k_norm, None) for k in keys[2:]]


SHAPES = (
    Shape(ProjectionMode.QK_ONLY, 32, 4, 512),  # 31B full
    Shape(ProjectionMode.QK_ONLY, 16, 2, 512),  # 26B-A4B full
    Shape(ProjectionMode.QK_ONLY, 16, 1, 512),  # 12B full
    Shape(ProjectionMode.QKV_FULL, 32, 16, 256),  # 31B sliding
    Shape(ProjectionMode.QKV_FULL, 8, 1, 256),  # E2B sliding
    Shape(ProjectionMode.Q_ONLY, 8, 1, 512),  # E2B full, KV-shared
)
