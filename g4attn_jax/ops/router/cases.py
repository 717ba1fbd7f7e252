"""Cases of `router`."""

import dataclasses

from g4attn_jax import ops
from g4attn_jax.ops.router.reference import Routing
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, struct

# 26B-A4B: E, X and k.
EMBED, EXPERTS, TOP_K = 2816, 128, 8
BENCH_TOKENS = (1, 5, 8, 9, 32, 64)


@dataclasses.dataclass(frozen=True)
class RouterCase(Case):
    """Tokens that choose experts.

    Attributes:
        width: E.
        experts: X.
        top_k: k.
    """

    op = "router"

    tokens: int
    width: int = EMBED
    experts: int = EXPERTS
    top_k: int = TOP_K

    def structs(self, dtype=None) -> list:
        """(x, scale, w, per_expert_scale)."""
        shapes = (self.tokens, self.width), (self.width,), (self.width, self.experts)
        return [struct(*s, dtype=dtype or self.dtype) for s in (*shapes, (self.experts,))]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`, with scores of deviation 1."""
        draw, (x, scale, w, per_expert_scale) = Draw(seed), self.structs(dtype)
        return [
            draw.normal(x, 3),
            draw.uniform(scale, 0.5, 1.25),
            draw.normal(w),
            draw.uniform(per_expert_scale, 0.5, 1.25),
        ]

    def run(self, arguments, implementation=None):
        """The routing."""
        return ops.router(*arguments, top_k=self.top_k, implementation=implementation)

    def exact(self, arguments):
        """The routing, its weights in float64."""
        return Routing(*oracle.router(*arguments, top_k=self.top_k))

    def usual(self, arguments):
        """The routing as XLA computes it in float32."""
        return self.run(arguments, "xla")

    def bytes(self) -> int:
        """Tokens, W and scales in, the routing out."""
        return nbytes(self.structs()) + 4 * (4 * self.tokens * self.top_k + self.experts)


CASES = distinct(
    RouterCase(1, 96, 128, 8, dtype="float32", tags={"odd", "everyday"}),
    RouterCase(5, 100, 100, 3, tags={"odd", "everyday"}),
    RouterCase(9, 33, 16, 16, dtype="float16", tags={"odd"}),
    RouterCase(3, 64, 1, 1, dtype="float32", tags={"odd"}),
    RouterCase(33, 200, 128, 8, dtype="float32", tags={"odd"}),
    RouterCase(64, 704, 128, 8, tags={"odd"}),
    *(RouterCase(tokens, tags={"bench", "real"}) for tokens in BENCH_TOKENS),
    *(RouterCase(tokens, tags={"compile"}) for tokens in (1, 3, 9, 64)),
    RouterCase(8, tags={"compile", "everyday"}),
    RouterCase(32, dtype="float32", tags={"compile"}),
)
