"""Cases of `moe_combine`."""

import dataclasses

from g4attn_jax import ops
from g4attn_jax.ops.add_rms_norm.cases import AddRmsNormCase
from g4attn_jax.ops.moe_combine import CombineNorms
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Draw, distinct, nbytes, struct


@dataclasses.dataclass(frozen=True)
class MoeCombineCase(AddRmsNormCase):
    """The sum of a residual stream, an MLP and experts, and norms of it.

    Attributes:
        answers: k.
        rows_dtype: of the answers; None is that of the stream.
    """

    op = "moe_combine"

    answers: int = 8
    rows_dtype: str | None = dataclasses.field(default=None, kw_only=True)

    def structs(self, dtype=None) -> list:
        """(x, y, rows, weights, place, norms, next_scales, factor)."""
        x, y, scale, *others = super().structs(dtype)
        of_tokens = self.tokens, self.answers
        return [
            x,
            y,
            struct(self.tokens * self.answers, self.width, dtype=self.rows_dtype or x.dtype),
            struct(*of_tokens, dtype="float32"),
            struct(*of_tokens, dtype="int32"),
            CombineNorms(scale, scale, scale),
            *others,
        ]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`."""
        draw, structs = Draw(seed), self.structs(dtype)
        x, y, rows, weights, place, norms, next_scales, factor = structs
        return [
            draw.normal(x),
            draw.normal(y, 3),
            draw.normal(rows, 3),
            draw.uniform(weights, 0, 1),
            draw.integers(place, rows.shape[0]),
            CombineNorms(*(draw.uniform(s, 0.5, 1.25) for s in norms)),
            [draw.uniform(s, 0.5, 1.25) for s in next_scales],
            draw.uniform(factor, 0.5, 1),
        ]

    def run(self, arguments, implementation=None):
        """(sum, norms)."""
        return ops.moe_combine(*arguments, implementation=implementation)

    def exact(self, arguments):
        """(sum, norms) in float64; norms are of the sum as it is stored."""
        return oracle.moe_combine(*arguments)

    def bytes(self) -> int:
        """The stream, both branches and places in, the sum and norms out; of scales none."""
        x, *branches = self.structs()[:5]
        return nbytes([x, *branches, *[x] * (1 + self.norms)])


CASES = distinct(
    MoeCombineCase(1, 96, dtype="float32", tags={"odd", "everyday"}),
    MoeCombineCase(6, 512, 3, partial_sums=3, norms=2, dtype="float32", tags={"odd", "everyday"}),
    MoeCombineCase(5, 1536, 1, partial_sums=1, norms=0, dtype="float32", tags={"odd"}),
    MoeCombineCase(2, 5376, partial_sums=2, dtype="float32", tags={"odd"}),
    MoeCombineCase(1, 2816, partial_sums=6, tags={"real", "compile"}),
    MoeCombineCase(4, 2816, rows_dtype="float32", tags={"compile"}),
    MoeCombineCase(8, 2816, partial_sums=6, tags={"real", "compile", "everyday"}),
    MoeCombineCase(2048, 2816, tags={"real", "compile"}),
    *(
        MoeCombineCase(tokens, 2816, partial_sums=6, tags={"bench", "real"})
        for tokens in (1, 5, 8, 9, 32, 64)
    ),
)
