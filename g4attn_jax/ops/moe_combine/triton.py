"""`moe_combine` as one launch: a program a token, whose row stays in registers throughout."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.add_rms_norm.triton import NUM_WARPS, Row, Stream
from g4attn_jax.ops.triton_tiles import first_program_id, may_start_next


def moe_combine(
    x,
    y,
    rows,
    weights,
    place,
    norms,
    next_scales,
    factor,
    *,
    eps,
    interpret=False,
    num_warps=NUM_WARPS,
):
    """Kernel of `g4attn_jax.ops.moe_combine`; `num_warps` is for tuning."""
    width = x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    if tokens == 0:
        return x, (x,) * len(next_scales)
    inputs = {
        "x": x.reshape(tokens, width),
        "y": y.reshape(-1, width),
        "rows": rows,
        "weights": weights,
        "place": place,
        "mlp_norm": norms.mlp,
        "experts_norm": norms.experts,
        "scale": norms.both,
        "next_scales": next_scales,
        "factor": None if factor is None else factor.reshape(1),
    }
    outputs = [jax.ShapeDtypeStruct((tokens, width), x.dtype)] * (1 + len(next_scales))
    starts_next = may_start_next(interpret)
    total, *h = pl.pallas_call(
        functools.partial(_combine, eps=eps, num_warps=num_warps, starts_next=starts_next),
        name="moe_combine",
        out_shape=outputs,
        grid=(tokens,),
        in_specs=(jax.tree.map(lambda _: pl.no_block_spec, inputs),),
        out_specs=[pl.no_block_spec] * len(outputs),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
    )(inputs)
    return total.reshape(x.shape), tuple(norm.reshape(x.shape) for norm in h)


def _combine(inputs, total_ref, *h_refs, eps, num_warps, starts_next):
    """Combines and norms one row. All loads are issued before the first sum of squares is taken."""
    row = Row.of(inputs["x"], first_program_id(starts_next), num_warps)
    experts = _weighted_sum(row, inputs["rows"], inputs["weights"], inputs["place"])
    mlp = row.load_sum(inputs["y"], rows=inputs["x"].shape[0])
    norms = row.load(inputs["mlp_norm"]), row.load(inputs["experts_norm"])
    stream = Stream.load(row, inputs)
    rrms = row.rrms(mlp, eps), row.rrms(experts, eps)
    both = [
        a * scale_a * rrms[0] + b * scale_b * rrms[1]
        for a, scale_a, b, scale_b in zip(mlp, norms[0], experts, norms[1], strict=True)
    ]
    stream.add(row, both, total_ref, h_refs, eps)


def _weighted_sum(row, rows_ref, weights_ref, place_ref):
    """Pieces of the sum of a token's rows times their weights, in the order of its experts."""
    total = None
    for i in range(weights_ref.shape[1]):
        place = jnp.clip(place_ref[row.index, i], 0, rows_ref.shape[0] - 1)
        weight = weights_ref[row.index, i]
        answer = [weight * a for a in row.load(rows_ref, place, eviction_policy="evict_first")]
        total = answer if total is None else [a + b for a, b in zip(total, answer, strict=True)]
    return total
