"""A program a token; the row stays in registers from the first load to the last store."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.triton_tiles import WARP_LOAD_BYTES, iota, load

_NUM_WARPS = 8


def add_rms_norm(x, y, scale, next_scales, factor, *, eps, interpret=False):
    """See `g4attn_jax.ops.add_rms_norm`."""
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
        functools.partial(_add_rms_norm, eps=eps),
        name="add_rms_norm",
        out_shape=outputs,
        grid=(rows,),
        in_specs=(jax.tree.map(lambda _: pl.no_block_spec, inputs),),
        out_specs=[pl.no_block_spec] * len(outputs),
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(inputs)
    return total.reshape(x.shape), tuple(norm.reshape(x.shape) for norm in h)


def _add_rms_norm(inputs, total_ref, *h_refs, eps):
    """The row in pieces, each a load of 16 bytes for every thread.

    What is multiplied by a root is multiplied by its scale before the root is known, so that no
    load waits for it. A step's weights pass through the L2 between one launch and the next: the
    stream and the scales are marked as what it should keep, the branch as what nothing reads again.
    """
    row, width = pl.program_id(0), inputs["x"].shape[1]
    piece = _NUM_WARPS * WARP_LOAD_BYTES // inputs["x"].dtype.itemsize
    piece = min(piece, pl.next_power_of_2(width))
    columns = [start + iota(piece) for start in range(0, width, piece)]
    masks = [column < width if width % piece else None for column in columns]

    def pieces(ref, *index, eviction_policy="evict_last"):
        return [
            load(
                ref.at[*index, column], mask, column.shape, eviction_policy=eviction_policy
            ).astype(jnp.float32)
            for column, mask in zip(columns, masks, strict=True)
        ]

    def store(ref, values):
        for value, column, mask in zip(values, columns, masks, strict=True):
            value = value.astype(ref.dtype)
            plgpu.store(ref.at[row, column], value, mask=mask, eviction_policy="evict_last")

    def root(values):
        squares = sum(value * value for value in values)
        return lax.rsqrt(jnp.sum(squares) * (1 / width) + eps)

    x, scale = pieces(inputs["x"], row), pieces(inputs["scale"])
    rows, y_rows = inputs["x"].shape[0], inputs["y"].shape[0]
    parts = [
        pieces(inputs["y"], part * rows + row, eviction_policy="evict_first")
        for part in range(y_rows // rows)
    ]
    y = [sum(piece) for piece in zip(*parts, strict=True)]
    next_scales = [pieces(ref) for ref in inputs["next_scales"]]
    scaled = [a * b for a, b in zip(y, scale, strict=True)]
    rrms = root(y)
    total = [a + b * rrms for a, b in zip(x, scaled, strict=True)]
    if inputs["factor"] is not None:
        factor = inputs["factor"][0].astype(jnp.float32)
        total = [a * factor for a in total]
    # The norms are those of the sum as it is stored.
    total = [a.astype(total_ref.dtype).astype(jnp.float32) for a in total]
    store(total_ref, total)
    if h_refs:
        rrms = root(total)
    for h_ref, scale in zip(h_refs, next_scales, strict=True):
        store(h_ref, [a * b * rrms for a, b in zip(total, scale, strict=True)])
