"""Cases of `linear`, `linear_partial_sums` and `geglu`."""

import dataclasses
import itertools

from g4attn_jax import ops
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, norm_error, struct

BENCH_TOKENS = (1, 8, 32, 64)
# Of 31B: K and N. Gate and up are one weight, of two matrices.
WEIGHTS = {
    "sliding qkv": (5376, 16384),
    "sliding output": (8192, 5376),
    "full qkv": (5376, 18432),
    "full output": (16384, 5376),
    "gate and up": (5376, 21504),
    "down": (21504, 5376),
}


@dataclasses.dataclass(frozen=True)
class LinearCase(Case):
    """Tokens times a weight.

    Attributes:
        depth: K.
        columns: N.
        weight: what the weight is in 31B.
    """

    op = "linear"

    tokens: int
    depth: int
    columns: int
    weight: str = dataclasses.field(default="", kw_only=True, compare=False)

    @property
    def num_matrices(self) -> int:
        """Matrices of the weight."""
        return 1

    def structs(self, dtype=None) -> list:
        """(x, w)."""
        dtype = dtype or self.dtype
        matrices = () if self.num_matrices == 1 else (self.num_matrices,)
        return [
            struct(self.tokens, self.depth, dtype=dtype),
            struct(self.depth, *matrices, self.columns, dtype=dtype),
        ]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`, with results of deviation 1."""
        draw, (x, w) = Draw(seed), self.structs(dtype)
        return [draw.normal(x), draw.normal(w, self.depth**-0.5)]

    def run(self, arguments, implementation=None):
        """The product."""
        return ops.linear(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The product in float64."""
        return oracle.linear(*arguments)

    def usual(self, arguments):
        """The product, rounded once."""
        return self.exact(arguments).astype(arguments[0].dtype)

    def bytes(self) -> int:
        """The weight and tokens in, the result out."""
        x, w = self.structs()
        return nbytes([x, w, struct(self.tokens, self.columns, dtype=x.dtype)])

    error = relative_error = staticmethod(norm_error)


@dataclasses.dataclass(frozen=True)
class LinearPartialSumsCase(LinearCase):
    """Tokens times a weight, in partial sums."""

    @property
    def label(self) -> str:
        """The function."""
        return "linear_partial_sums"

    def run(self, arguments, implementation=None):
        """The partial sums."""
        return ops.linear_partial_sums(*arguments, implementation=implementation)

    def result(self, outputs):
        """The sum of the partial sums."""
        return ops.add_partial_sums(outputs, self.dtype)


@dataclasses.dataclass(frozen=True)
class GegluCase(LinearCase):
    """Tokens times the gate and up matrices, gated."""

    @property
    def label(self) -> str:
        """The function."""
        return "geglu"

    @property
    def num_matrices(self) -> int:
        """Gate and up."""
        return 2

    def run(self, arguments, implementation=None):
        """The gated products."""
        return ops.geglu(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The gated products in float64."""
        return oracle.geglu(*arguments)

    def usual(self, arguments):
        """The gated products with the usual path's roundings, of both products."""
        dtype = arguments[0].dtype
        return oracle.geglu(*arguments, rounded=lambda y: y.astype(dtype)).astype(dtype)


def _odd():
    # Edges of tiles and of the blocks of columns.
    for sizes in ((1, 512, 64), (3, 300, 80), (16, 64, 7000), (17, 130, 129), (64, 1024, 192)):
        tags = {"odd", "everyday"} if sizes[0] in (3, 17) else {"odd"}
        for of in (LinearCase, LinearPartialSumsCase, GegluCase):
            yield of(*sizes, dtype="float32", tags=tags)


def _of_31b():
    for (weight, (k, n)), tokens in itertools.product(WEIGHTS.items(), BENCH_TOKENS):
        of = GegluCase if weight == "gate and up" else LinearPartialSumsCase
        tags = {"bench", "real", "compile"}
        tags |= {"everyday"} if (weight, tokens) in (("down", 8), ("gate and up", 1)) else set()
        yield of(tokens, k, n, weight=weight, tags=tags)


CASES = distinct(*_of_31b(), *_odd())
