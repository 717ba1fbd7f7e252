"""The products of 26B-A4B's experts that the benchmarks measure."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.measure import L2_BYTES
from g4attn_jax import Gemma4Config

_CONFIG = Gemma4Config.preset("gemma-4-26b-a4b")
EMBED, WIDTH = _CONFIG.hidden_size, _CONFIG.moe_intermediate_size
EXPERTS, TOP_K = _CONFIG.num_experts, _CONFIG.top_k_experts


class Shape(NamedTuple):
    """A product of tokens with the experts that they take, 8 of 128 at random.

    "gated" is `ops.grouped_gated_matmul`, "down" `ops.grouped_matmul` of its result.
    """

    product: str
    tokens: int

    def fields(self) -> dict[str, str | int]:
        """Those of a row of the JSON."""
        return self._asdict()

    @property
    def num_rows(self) -> int:
        """Rows of the result."""
        return self.tokens * TOP_K

    @property
    def flops(self) -> int:
        """Of the products, no padding counted."""
        return 2 * self.num_rows * EMBED * WIDTH * (2 if self.product == "gated" else 1)

    def bytes(self, calls: list[tuple]) -> float:
        """That must move in a call: touched matrices and rows read, the result written."""
        touched = np.mean([np.count_nonzero(sizes) for _, _, sizes, *_ in calls])
        matrix, rows = EMBED * WIDTH, self.num_rows * (WIDTH + EMBED)
        if self.product == "gated":
            matrix, rows = 2 * matrix, self.tokens * EMBED + self.num_rows * WIDTH
        return 2 * (touched * matrix + rows)

    def calls(self) -> list[tuple]:
        """Arguments of the op, as many as the L2 does not hold; those of one token share none."""
        return [self._call(i) for i in range(math.ceil(2 * L2_BYTES / self._least_bytes()))]

    def _least_bytes(self):
        touched = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** self.tokens)
        return 2 * touched * EMBED * WIDTH * (2 if self.product == "gated" else 1)

    def _call(self, index):
        rng = np.random.default_rng(self.tokens)
        order = [rng.permutation(EXPERTS) for _ in range(self.tokens)]
        experts = np.stack([np.roll(o, -TOP_K * index)[:TOP_K] for o in order]).ravel()
        rows = np.argsort(experts, kind="stable").astype(np.int32) // TOP_K
        sizes = jnp.asarray(np.bincount(experts, minlength=EXPERTS), jnp.int32)
        count, width = (self.tokens, EMBED) if self.product == "gated" else (rows.size, WIDTH)
        x = jax.random.normal(jax.random.key(index), (count, width), jnp.bfloat16)
        w = matrices(self.product)
        return (x, w, sizes, jnp.asarray(rows)) if self.product == "gated" else (x, w, sizes)


@functools.cache
def matrices(product: str) -> jax.Array:
    """Of all experts, random."""
    shape = (EMBED, 2, WIDTH) if product == "gated" else (WIDTH, EMBED)
    w = jax.random.normal(jax.random.key(0), (EXPERTS, *shape), jnp.bfloat16)
    return w * jnp.bfloat16(shape[0] ** -0.5)


PRODUCTS = ("gated", "down")
