"""`add_rms_norm` as one launch: a program a token, whose row stays in registers throughout."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.triton_tiles import (
    WARP_LOAD_BYTES,
    first_program_id,
    iota,
    load,
    may_start_next,
)

NUM_WARPS = 8


def add_rms_norm(x, y, scale, next_scales, factor, *, eps, interpret=False):
    """Kernel of `g4attn_jax.ops.add_rms_norm`."""
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return x, (x,) * len(next_scales)
    inputs = {
        "x": x.reshape(rows, width),
        "y": y.reshape(-1, width),
        "scale": scale,
        "next_scales": next_scales,
        "factor": None if factor is None else factor.reshape(1),
    }
    outputs = [jax.ShapeDtypeStruct((rows, width), x.dtype)] * (1 + len(next_scales))
    total, *h = pl.pallas_call(
        functools.partial(_add_rms_norm, eps=eps, starts_next=may_start_next(interpret)),
        name="add_rms_norm",
        out_shape=outputs,
        grid=(rows,),
        in_specs=(jax.tree.map(lambda _: pl.no_block_spec, inputs),),
        out_specs=[pl.no_block_spec] * len(outputs),
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(inputs)
    return total.reshape(x.shape), tuple(norm.reshape(x.shape) for norm in h)


class Row(NamedTuple):
    """Row of a token, in pieces: each is a load of 16 bytes for every thread."""

    index: jax.Array
    width: int
    columns: list[jax.Array]  # of each piece
    masks: list[jax.Array | None]  # which of them the row has; None: all

    @classmethod
    def of(cls, x_ref, row, num_warps=NUM_WARPS):
        """Row `row` of x, for a program of `num_warps` warps."""
        width = x_ref.shape[1]
        piece = num_warps * WARP_LOAD_BYTES // x_ref.dtype.itemsize
        piece = min(piece, pl.next_power_of_2(width))
        columns = [start + iota(piece) for start in range(0, width, piece)]
        masks = [column < width if width % piece else None for column in columns]
        return cls(row, width, columns, masks)

    def load(self, ref, *index, eviction_policy="evict_last"):
        """Pieces of a row of `ref`, in float32."""
        return [
            load(
                ref.at[*index, column], mask, column.shape, eviction_policy=eviction_policy
            ).astype(jnp.float32)
            for column, mask in zip(self.columns, self.masks, strict=True)
        ]

    def load_sum(self, ref, *, rows):
        """Pieces of the sum of a branch's partial sums; these lie `rows` rows apart."""
        partial_sums = [
            self.load(ref, i * rows + self.index, eviction_policy="evict_first")
            for i in range(ref.shape[0] // rows)
        ]
        return [sum(pieces) for pieces in zip(*partial_sums, strict=True)]

    def store(self, ref, values):
        """Stores pieces of the row."""
        for value, column, mask in zip(values, self.columns, self.masks, strict=True):
            value = value.astype(ref.dtype)
            plgpu.store(ref.at[self.index, column], value, mask=mask, eviction_policy="evict_last")

    def rrms(self, values, eps):
        """Reciprocal root of the mean square of pieces."""
        squares = sum(value * value for value in values)
        return lax.rsqrt(jnp.sum(squares) * (1 / self.width) + eps)


def _add_rms_norm(inputs, total_ref, *h_refs, eps, starts_next):
    """Adds and norms one row.

    A step's weights pass through the L2 between one launch and the next: the stream and the scales
    are marked as what it should keep, the branch as what nothing reads again.
    """
    row = Row.of(inputs["x"], first_program_id(starts_next))
    stream = Stream.load(row, inputs)
    y = row.load_sum(inputs["y"], rows=inputs["x"].shape[0])
    stream.add(row, y, total_ref, h_refs, eps)


class Stream(NamedTuple):
    """Row of the residual stream, and scales and factor of its sum with a branch, in pieces.

    Attributes:
        x: the row.
        scale: of the branch's norm.
        next_scales: of the norms of the sum.
        factor: of the sum, or None.
    """

    x: list[jax.Array]
    scale: list[jax.Array]
    next_scales: list[list[jax.Array]]
    factor: jax.Array | None

    @classmethod
    def load(cls, row, inputs):
        """Loads all of it; `inputs` has a ref, or refs, of each name."""
        factor = inputs["factor"]
        return cls(
            row.load(inputs["x"], row.index),
            row.load(inputs["scale"]),
            [row.load(ref) for ref in inputs["next_scales"]],
            None if factor is None else factor[0].astype(jnp.float32),
        )

    def add(self, row, y, total_ref, h_refs, eps):
        """Stores the sum of the stream and the norm of a branch y, in pieces, and norms of the sum.

        y is multiplied by its scale before its root mean square is known, so that the load of the
        scale does not wait for it.
        """
        scaled = [a * b for a, b in zip(y, self.scale, strict=True)]
        rrms = row.rrms(y, eps)
        total = [a + b * rrms for a, b in zip(self.x, scaled, strict=True)]
        if self.factor is not None:
            total = [a * self.factor for a in total]
        # The norms are those of the sum as it is stored.
        total = [a.astype(total_ref.dtype).astype(jnp.float32) for a in total]
        row.store(total_ref, total)
        if h_refs:
            rrms = row.rrms(total, eps)
        for h_ref, scale in zip(h_refs, self.next_scales, strict=True):
            row.store(h_ref, [a * b * rrms for a, b in zip(total, scale, strict=True)])
