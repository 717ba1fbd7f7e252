"""Cases of `grouped_matmul`, and what those of `grouped_gated_matmul` share with them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, norm_error, struct

# 26B-A4B: groups, K of the gated product, N of it, groups a token.
EXPERTS, EMBED, WIDTH, TOP_K = 128, 2816, 704, 8
BENCH_TOKENS = (1, 8, 32, 128, 2048, 8192)


@dataclasses.dataclass(frozen=True)
class GroupedMatmulCase(Case):
    """Rows times the matrix of their group.

    Attributes:
        num_rows: M.
        groups: X.
        depth: K.
        columns: N.
        group_sizes: of each group; None is `top_k` random groups for every token.
        top_k: groups that a token takes, so rows that it has.
    """

    op = "grouped_matmul"

    num_rows: int
    groups: int
    depth: int
    columns: int
    group_sizes: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)
    top_k: int = dataclasses.field(default=TOP_K, kw_only=True)

    @property
    def tokens(self) -> int:
        """Tokens that the rows are of."""
        return -(-self.num_rows // self.top_k)

    def structs(self, dtype=None) -> list:
        """(x, w, group_sizes)."""
        dtype = dtype or self.dtype
        return [
            struct(self.num_rows, self.depth, dtype=dtype),
            struct(self.groups, self.depth, self.columns, dtype=dtype),
            struct(self.groups, dtype="int32"),
        ]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`; the weights are the same for every seed, and kept."""
        x, w, _ = self.structs(dtype)
        sizes, _ = self.routing(seed)
        return [Draw(seed).normal(x), matrices(w.shape, w.dtype), jnp.asarray(sizes)]

    def routing(self, seed=0) -> tuple[np.ndarray, np.ndarray]:
        """Sizes of the groups, and the token of each row; those of one token change with seeds."""
        rng = np.random.default_rng(self.tokens)
        if self.group_sizes is not None:
            rows = rng.integers(0, max(self.tokens, 1), self.num_rows)
            return np.array(self.group_sizes, np.int32), rows.astype(np.int32)
        order = np.stack([rng.permutation(self.groups) for _ in range(self.tokens)])
        experts = np.roll(order, -self.top_k * seed, axis=1)[:, : self.top_k].ravel()
        rows = np.argsort(experts, kind="stable").astype(np.int32) // self.top_k
        return np.bincount(experts, minlength=self.groups).astype(np.int32), rows

    def run(self, arguments, implementation=None):
        """The product."""
        return ops.grouped_matmul(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The product in float64."""
        return oracle.grouped_matmul(*arguments)

    def usual(self, arguments):
        """The product, rounded once."""
        return self.exact(arguments).astype(arguments[0].dtype)

    def bytes(self) -> int:
        """Matrices of groups that have rows, and rows, in; the product out."""
        x, w, *_ = self.structs()
        touched = np.count_nonzero(self.routing()[0])
        moved = x.size + touched * math.prod(w.shape[1:]) + self.num_rows * self.columns
        return int(moved) * x.dtype.itemsize

    def flops(self) -> int:
        """Operations of the products, no padding counted."""
        return 2 * self.num_rows * math.prod(self.structs()[1].shape[1:])

    error = relative_error = staticmethod(norm_error)


@functools.lru_cache(maxsize=2)  # those of 26B-A4B have 1.4 GB together
def matrices(shape: tuple[int, ...], dtype) -> jax.Array:
    """Random weights [X, K, ...] for results of deviation 1."""
    return Draw(0).normal(struct(*shape, dtype=dtype), shape[1] ** -0.5)


_TILE = 16
_SMALL = {
    "all groups": {"group_sizes": (3, 5, 8)},
    "empty groups": {"group_sizes": (0, 4, 0, 0, 7, 0)},
    "one group has all": {"group_sizes": (0, 70, 0)},
    "one row": {"group_sizes": (0, 0, 1, 0)},
    "sizes around a tile": {
        "group_sizes": (_TILE - 1, _TILE, _TILE + 1, 1, 2 * _TILE, 2 * _TILE + 1)
    },
    "large tiles": {"group_sizes": (64, 63, 0, 130, 1), "columns": 200},
    "rows of no group": {"group_sizes": (3, 0, 17), "num_rows": 60},
    "no group has rows": {"group_sizes": (0, 0), "num_rows": 20},
    "no rows": {"group_sizes": (0, 0, 0)},
    "sizes of the model, divided by 4": {"group_sizes": (2, 0, 1), "depth": 704, "columns": 176},
    "odd sizes": {"group_sizes": (9, 2), "depth": 129, "columns": 67},
    "one by one": {"group_sizes": (2, 2), "depth": 1, "columns": 1},
}
_SMALL_EVERYDAY = {"empty groups", "sizes around a tile", "rows of no group", "odd sizes"}


def small(of):
    """Cases in float32 of few and small groups; `of` is their class."""
    for about, given in _SMALL.items():
        sizes = given["group_sizes"]
        yield of(
            given.get("num_rows", sum(sizes)),
            len(sizes),
            given.get("depth", 40),
            given.get("columns", 24),
            group_sizes=sizes,
            top_k=1,
            dtype="float32",
            about=about,
            tags={"odd", "everyday"} if about in _SMALL_EVERYDAY else {"odd"},
        )


def of_experts(of, depth, columns):
    """Cases of 26B-A4B's experts, measured and compiled; `of` is their class."""
    for tokens in BENCH_TOKENS:
        yield of(TOP_K * tokens, EXPERTS, depth, columns, tags={"bench"})
    for tokens in (1, 8, 32, 300, 1030):
        yield of(TOP_K * tokens, EXPERTS, depth, columns, tags={"real"})
    # One of each launch configuration.
    for tokens in (1, 8, 256, 512, 8192):
        tags = {"compile", "everyday"} if tokens in (8, 512) else {"compile"}
        yield of(TOP_K * tokens, EXPERTS, depth, columns, tags=tags)
    yield of(256, EXPERTS, depth, columns, dtype="float32", tags={"compile", "everyday"})
    yield of(100, 5, 100, 72, dtype="float16", tags={"compile"})
    yield of(1, 1, 1, 1, tags={"compile"})
    yield of(64, 640, depth, columns, tags={"compile", "large"})


CASES = distinct(*of_experts(GroupedMatmulCase, WIDTH, EMBED), *small(GroupedMatmulCase))
