"""End of a layer with experts: both branches, the residual sum and the next norm in one launch."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from g4attn_jax.checks import check_array
from g4attn_jax.ops import checks
from g4attn_jax.ops.moe_combine import reference
from g4attn_jax.ops.moe_combine.reference import CombineNorms
from g4attn_jax.ops.op import Implementation, Kernel, Op

__all__ = ["CombineNorms", "moe_combine"]

_op = Op(
    "moe_combine",
    reference=reference.moe_combine,
    kernels=[Kernel("triton", "g4attn_jax.ops.moe_combine.triton:moe_combine")],
)


def moe_combine(
    x: Float[Array, "*batch E"],
    y: Float[Array, "*batch E"] | Float[Array, "partial_sums *batch E"],
    rows: Float[Array, "rows E"],
    weights: Float[Array, "M k"],
    place: Int[Array, "M k"],
    norms: CombineNorms,
    next_scales: Sequence[Float[Array, " E"]] = (),
    factor: Float[Array, ""] | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch E"], tuple[Float[Array, "*batch E"], ...]]:
    """Adds the MLP and the experts, under norms, to the residual stream, and norms the sum.

    With rms(x) = x * rsqrt(mean(x^2) + eps), in float32, of each of M tokens:

        experts = sum over i < k of weights_i * rows[place_i]           in the order of i
        both = rms(y) * norms.mlp + rms(experts) * norms.experts
        sum = (x + rms(both) * norms.both) * factor                     rounded to x's dtype
        h_i = rms(sum) * next_scales_i

    Args:
        x: [..., E], the residual stream. bfloat16, float16 or float32.
        y: [..., E], the MLP's branch, of any of these dtypes, or [partial sums, ..., E] of it.
        rows: [rows, E], answers of experts, of any of these dtypes.
        weights: float32 [M, k], M being the tokens of x.
        place: int32 [M, k], the row of each answer to a token, from 0 to rows - 1.
        norms: scales [E], of any of these dtypes, as all scales are.
        next_scales: [E] each, of the norms of the sum; there may be none.
        factor: [], of the sum; None is 1.
        eps: added to the mean squares.
        implementation: None (the kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret".

    Returns:
        (sum, h), h a tuple as long as `next_scales`, all in the shape and dtype of x.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: `Gemma4TextDecoderLayer` of Hugging Face transformers 5.23.
    """
    scales = {f"norms.{name}": scale for name, scale in norms._asdict().items()}
    scales |= {f"next_scales[{i}]": scale for i, scale in enumerate(next_scales)}
    checks.check_residual_sum(x, y, scales, factor)
    tokens = math.prod(x.shape[:-1])
    check_array("rows", rows, ("rows", x.shape[-1]), empty=True)
    check_array("weights", weights, (tokens, "k"), jnp.float32)
    check_array("place", place, weights.shape, jnp.int32)
    checks.check_eps(eps, 0.0)
    arrays = x, y, rows, weights, place, norms, tuple(next_scales), factor
    return _op(*arrays, eps=eps, implementation=implementation)
