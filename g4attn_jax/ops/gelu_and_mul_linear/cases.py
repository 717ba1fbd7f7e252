"""Cases of `gelu_and_mul_linear`."""

import dataclasses

from g4attn_jax import ops
from g4attn_jax.config import Gemma4Config
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, norm_error, struct


@dataclasses.dataclass(frozen=True)
class GeluAndMulLinearCase(Case):
    """A gate, what it lets through, and its projection.

    Attributes:
        depth: K.
        columns: N.
        partial_sums: of the gate, in float32; None is a gate in the dtype of all.
    """

    op = "gelu_and_mul_linear"

    tokens: int
    depth: int
    columns: int
    partial_sums: int | None = dataclasses.field(default=None, kw_only=True)

    def structs(self, dtype=None) -> list:
        """(gate, up, w)."""
        dtype = dtype or self.dtype
        up = struct(self.tokens, self.depth, dtype=dtype)
        gate = up
        if self.partial_sums is not None:
            gate = struct(self.partial_sums, *up.shape, dtype="float32")
        return [gate, up, struct(self.depth, self.columns, dtype=dtype)]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`."""
        draw, (gate, up, w) = Draw(seed), self.structs(dtype)
        return [draw.normal(gate), draw.normal(up), draw.normal(w, self.depth**-0.5)]

    def run(self, arguments, implementation=None):
        """The projection."""
        return ops.gelu_and_mul_linear(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The projection in float64."""
        return oracle.gelu_and_mul_linear(*arguments)

    def usual(self, arguments):
        """The projection with the usual path's roundings: of the product with the gate too."""
        dtype = arguments[2].dtype
        y = oracle.gelu_and_mul_linear(*arguments, rounded=lambda y: y.astype(dtype))
        return y.astype(dtype)

    def bytes(self) -> int:
        """Gate, up and weight in, the result out."""
        arrays = self.structs()
        return nbytes([*arrays, struct(self.tokens, self.columns, dtype=arrays[2].dtype)])

    error = relative_error = staticmethod(norm_error)


def _of_per_layer_inputs():
    for model in ("gemma-4-e2b", "gemma-4-e4b"):
        config = Gemma4Config.preset(model)
        sizes = config.hidden_size_per_layer_input, config.hidden_size
        for tokens in (1, 8):
            tags = {"real", "compile"} | ({"everyday"} if tokens == 1 else set())
            yield GeluAndMulLinearCase(tokens, *sizes, partial_sums=8, tags=tags)


CASES = distinct(
    *_of_per_layer_inputs(),
    GeluAndMulLinearCase(1, 256, 96, dtype="float32", tags={"odd"}),
    GeluAndMulLinearCase(3, 40, 50, partial_sums=3, dtype="float32", tags={"odd", "everyday"}),
    GeluAndMulLinearCase(17, 130, 33, partial_sums=1, dtype="float32", tags={"odd"}),
    GeluAndMulLinearCase(64, 512, 64, partial_sums=2, dtype="float32", tags={"odd"}),
)
