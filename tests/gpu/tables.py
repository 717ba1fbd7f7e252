"""Tables of attention shapes: all of some sizes, and few in which every two sizes meet."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS
from g4attn_jax.testing import oracle
from tests.ops.test_decode_attention import case
from tests.pairwise import pairwise

GROUPS = (1, 2, 4, 8, 16, 32, 64)
KV_HEADS = (1, 2, 4)
LAYOUTS = ("contiguous", "paged", "ring")
HEAD_DIMS = (512, 256)
SPLITS = (None, 1, 7, 64)
PREFILL_TOKENS = range(1, 131)
_PAGE_SIZE, _PAGES, _WINDOW = 64, 16, 200
# Tokens and heads a group of which two blocks of a cluster have the middle token both.
ODD_IN_TWO_BLOCKS = ((9, 8), (11, 8), (13, 8), (15, 8), (5, 16), (7, 16), (3, 32))
# Of weights and outputs in bfloat16, norm-wise.
MAX_ERROR = 3e-3


class Shape(NamedTuple):
    """A call of `decode_attention`, or of `prefill_attention`, in bfloat16."""

    op: str
    tokens: int
    group: int
    num_kv_heads: int
    compact: bool
    layout: str = "contiguous"
    head_dim: int = 512
    num_splits: int | None = None

    def __str__(self):
        """The name of the test."""
        form = "compact" if self.compact else "separate"
        splits = "" if self.num_splits is None else f"-splits{self.num_splits}"
        return (
            f"T{self.tokens}-G{self.group}-Nkv{self.num_kv_heads}-{form}-{self.layout}-"
            f"D{self.head_dim}{splits}"
        )

    @property
    def window(self) -> int | None:
        """Of a ring; other layouts keep every token."""
        return _WINDOW if self.layout == "ring" else None

    def arguments(self) -> tuple:
        """Four sequences: one that is full, one within a tile, one of a tile, an empty one."""
        if self.op == "decode_attention":
            last = [1023, 449, 63, -1]
        else:  # after 70, 57 and no tokens
            last = [self.tokens + 69, self.tokens + 56, self.tokens - 1, -1]
        paged = self.layout == "paged"
        q, *others = case(
            last,
            self.tokens,
            num_kv_heads=self.num_kv_heads,
            group=self.group,
            head_dim=self.head_dim,
            compact=self.compact,
            pages=_PAGES if paged else None,
            capacity=None if paged else self._capacity,
            dtype=jnp.bfloat16,
            rotary=128,
            page_size=_PAGE_SIZE,
        )
        return q * self.head_dim**-0.5, *others

    @property
    def _capacity(self):
        if self.layout == "ring":
            return -(-(_WINDOW + self.tokens) // _PAGE_SIZE) * _PAGE_SIZE
        return _PAGE_SIZE * _PAGES

    def error(self) -> float:
        """Of the op's output against float64, by norms; NaN if padding is not 0."""
        arguments = self.arguments()
        further = {} if self.op == "prefill_attention" else {"num_splits": self.num_splits}
        o = np.asarray(
            getattr(ops, self.op)(*arguments, sliding_window=self.window, **further), np.float64
        )
        if (o[np.asarray(arguments[3]) < 0] != 0).any():
            return np.nan
        exact = oracle.cached_attention(*arguments, sliding_window=self.window)
        return float(np.linalg.norm(o - exact) / np.linalg.norm(exact))


def whole_decode() -> Iterator[Shape]:
    """Every number of tokens, group, number of KV heads and form at head_dim 512; `some_decode`."""
    tokens = range(1, MAX_DECODE_TOKENS + 1)
    for t, group, heads, compact in itertools.product(tokens, GROUPS, KV_HEADS, (False, True)):
        yield Shape("decode_attention", t, group, heads, compact)
    yield from some_decode()


def some_decode() -> Iterator[Shape]:
    """Shapes in which every two sizes meet, and the odd ones in two blocks over every layout."""
    tokens = (1, 2, 3, 4, 5, 6, 8, 9, 11, 15, 16)
    factors = tokens, GROUPS, KV_HEADS, (False, True), LAYOUTS, HEAD_DIMS, SPLITS
    shapes = [Shape("decode_attention", *row) for row in pairwise(*factors)]
    odd = itertools.product(ODD_IN_TWO_BLOCKS, (False, True), LAYOUTS[:2])
    for i, ((t, group), compact, layout) in enumerate(odd):
        splits, heads = SPLITS[i % 4], KV_HEADS[i % 3]
        shapes.append(Shape("decode_attention", t, group, heads, compact, layout, 512, splits))
    yield from dict.fromkeys(shapes)


def whole_prefill() -> Iterator[Shape]:
    """Every number of tokens and form at head_dim 512, 8 heads a group; `some_prefill`."""
    for t, compact in itertools.product(PREFILL_TOKENS, (False, True)):
        yield Shape("prefill_attention", t, 8, KV_HEADS[t % 3], compact)
    yield from some_prefill()


def some_prefill() -> Iterator[Shape]:
    """Shapes in which every two sizes meet, of tokens around the sizes of tiles."""
    tokens = (1, 16, 17, 33, 64, 65, 129, 130)
    factors = tokens, GROUPS, KV_HEADS, (False, True), LAYOUTS, HEAD_DIMS
    for row in pairwise(*factors):
        yield Shape("prefill_attention", *row)
