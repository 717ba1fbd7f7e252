"""Cases of `add_rms_norm`."""

import dataclasses
import itertools

from g4attn_jax import ops
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, struct


@dataclasses.dataclass(frozen=True)
class AddRmsNormCase(Case):
    """The sum of a residual stream and a branch, and norms of it.

    Attributes:
        width: E.
        partial_sums: of the branch, in float32; None is a branch in the stream's dtype.
        norms: number of norms of the sum.
    """

    op = "add_rms_norm"

    tokens: int
    width: int
    partial_sums: int | None = dataclasses.field(default=None, kw_only=True)
    norms: int = dataclasses.field(default=1, kw_only=True)

    def structs(self, dtype=None) -> list:
        """(x, y, scale, next_scales, factor)."""
        dtype = dtype or self.dtype
        x, scale = (
            struct(*shape, dtype=dtype) for shape in ((self.tokens, self.width), (self.width,))
        )
        y = x
        if self.partial_sums is not None:
            y = struct(self.partial_sums, *x.shape, dtype="float32")
        return [x, y, scale, [scale] * self.norms, struct(dtype=dtype)]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`."""
        draw, (x, y, scale, next_scales, factor) = Draw(seed), self.structs(dtype)
        scale, *next_scales = (draw.uniform(s, 0.5, 1.25) for s in (scale, *next_scales))
        return [
            draw.normal(x),
            draw.normal(y, 3),
            scale,
            next_scales,
            draw.uniform(factor, 0.5, 1),
        ]

    def run(self, arguments, implementation=None):
        """(sum, norms)."""
        return ops.add_rms_norm(*arguments, implementation=implementation)

    def exact(self, arguments):
        """(sum, norms) in float64; norms are of the sum as it is stored."""
        return oracle.add_rms_norm(*arguments)

    def usual(self, arguments):
        """(sum, norms), each rounded once."""
        total, norms = self.exact(arguments)
        dtype = arguments[0].dtype
        return total.astype(dtype), tuple(norm.astype(dtype) for norm in norms)

    def bytes(self) -> int:
        """The stream and the branch in, the sum and norms out; of scales none."""
        x, y, *_ = self.structs()
        return nbytes([x, y, *[x] * (1 + self.norms)])


def _odd():
    for (tokens, width), sums in itertools.product(
        ((1, 96), (6, 512), (5, 1536), (2, 5376)), (None, 1, 3)
    ):
        tags = {"odd", "everyday"} if (width, sums) in ((96, None), (512, 3)) else {"odd"}
        yield AddRmsNormCase(tokens, width, partial_sums=sums, norms=2, dtype="float32", tags=tags)


CASES = distinct(
    *_odd(),
    AddRmsNormCase(1, 5376, tags={"real", "compile"}),
    AddRmsNormCase(8, 5376, partial_sums=3, tags={"real", "compile", "everyday"}),
    AddRmsNormCase(40, 2816, norms=3, tags={"real", "compile"}),
    AddRmsNormCase(2048, 1536, norms=2, tags={"real", "compile"}),
)
