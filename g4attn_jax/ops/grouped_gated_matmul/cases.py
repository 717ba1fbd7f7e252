"""Cases of `grouped_gated_matmul`."""

import dataclasses

import jax.numpy as jnp

from g4attn_jax import ops
from g4attn_jax.ops.grouped_matmul.cases import (
    EMBED,
    WIDTH,
    GroupedMatmulCase,
    matrices,
    of_experts,
    small,
)
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Draw, distinct, struct


@dataclasses.dataclass(frozen=True)
class GroupedGatedMatmulCase(GroupedMatmulCase):
    """Rows of x, read where they are, times both matrices of their group."""

    op = "grouped_gated_matmul"

    def structs(self, dtype=None) -> list:
        """(x, w, group_sizes, rows)."""
        dtype = dtype or self.dtype
        return [
            struct(self.tokens, self.depth, dtype=dtype),
            struct(self.groups, self.depth, 2, self.columns, dtype=dtype),
            struct(self.groups, dtype="int32"),
            struct(self.num_rows, dtype="int32"),
        ]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`; the weights are the same for every seed, and kept."""
        x, w, *_ = self.structs(dtype)
        routing = (jnp.asarray(array) for array in self.routing(seed))
        return [Draw(seed).normal(x), matrices(w.shape, w.dtype), *routing]

    def run(self, arguments, implementation=None):
        """The gated products."""
        return ops.grouped_gated_matmul(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The gated products in float64."""
        return oracle.grouped_gated_matmul(*arguments)

    def usual(self, arguments):
        """The gated products with the usual path's roundings."""
        return oracle.usual_grouped_gated_matmul(*arguments)


CASES = distinct(*of_experts(GroupedGatedMatmulCase, EMBED, WIDTH), *small(GroupedGatedMatmulCase))
