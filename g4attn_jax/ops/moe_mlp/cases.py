"""Cases of `moe_mlp`."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops
from g4attn_jax.ops.grouped_matmul.cases import EMBED, EXPERTS, TOP_K, WIDTH, matrices
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, norm_error, struct


@dataclasses.dataclass(frozen=True)
class MoeMlpCase(Case):
    """Tokens with experts of their own.

    Attributes:
        embed: E.
        width: F.
        num_experts: X.
        top_k: k.
    """

    op = "moe_mlp"

    tokens: int
    embed: int = EMBED
    width: int = WIDTH
    num_experts: int = EXPERTS
    top_k: int = TOP_K

    def structs(self, dtype=None) -> list:
        """(h, gate_up, down, experts, weights)."""
        dtype, of_tokens = dtype or self.dtype, (self.tokens, self.top_k)
        return [
            struct(self.tokens, self.embed, dtype=dtype),
            struct(self.num_experts, self.embed, 2, self.width, dtype=dtype),
            struct(self.num_experts, self.width, self.embed, dtype=dtype),
            struct(*of_tokens, dtype="int32"),
            struct(*of_tokens, dtype="float32"),
        ]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`; the weights are the same for every seed, and kept."""
        draw, (h, gate_up, down, _, weights) = Draw(seed), self.structs(dtype)
        return [
            draw.normal(h),
            *(matrices(w.shape, w.dtype) for w in (gate_up, down)),
            jnp.asarray(self._experts(seed)),
            draw.uniform(weights, 0, 1),
        ]

    def _experts(self, seed):
        """Experts of every token, which change with the seed."""
        rng = np.random.default_rng(self.tokens)
        order = np.stack([rng.permutation(self.num_experts) for _ in range(self.tokens)])
        return np.roll(order, -self.top_k * seed, axis=1)[:, : self.top_k].astype(np.int32)

    def run(self, arguments, implementation=None):
        """The partial sums."""
        return ops.moe_mlp(*arguments, implementation=implementation)

    def result(self, outputs):
        """The sum."""
        return outputs.sum(axis=0)

    def exact(self, arguments):
        """The sum in float64."""
        return oracle.moe_mlp(*arguments)

    def usual(self, arguments):
        """The sum, with the usual path's roundings of the products and of what is gated."""
        h, gate_up, down, experts, weights = arguments
        rows, total = h.dtype, 0.0
        for i in range(self.top_k):
            answers = [
                self._usual_answer(h[m], gate_up[experts[m, i]], down[experts[m, i]], rows)
                for m in range(self.tokens)
            ]
            total += np.asarray(weights)[:, i, None].astype(np.float64) * np.stack(answers)
        return total.astype("float32")

    @staticmethod
    def _usual_answer(h, gate_up, down, dtype):
        def rounded(y):
            return y.astype(dtype).astype(np.float64)

        gated = rounded(oracle.geglu(h[None], gate_up, rounded=rounded))
        return rounded(oracle.linear(gated, down))[0]

    def bytes(self) -> int:
        """Tokens and matrices of their experts in, the sum out."""
        h, gate_up, down, *_ = self.structs()
        touched = len(np.unique(self._experts(0)))
        y = struct(*h.shape, dtype="float32")
        return nbytes([h, y]) + nbytes([gate_up, down]) * touched // self.num_experts

    error = relative_error = staticmethod(norm_error)


CASES = distinct(
    MoeMlpCase(1, 96, 40, 8, 3, dtype="float32", tags={"odd", "everyday"}),
    MoeMlpCase(2, 130, 67, 5, 2, dtype="float32", tags={"odd", "everyday"}),
    MoeMlpCase(3, 64, 64, 2, 2, dtype="float32", tags={"odd"}),
    MoeMlpCase(1, 16, 1, 1, 1, dtype="float32", tags={"odd"}),
    MoeMlpCase(1, tags={"real", "bench", "compile", "everyday"}),
    MoeMlpCase(2, tags={"real", "bench"}),
    MoeMlpCase(1, dtype="float32", tags={"compile"}),
    MoeMlpCase(3, 100, 72, 5, 2, dtype="float16", tags={"compile"}),
)
