"""End of a residual branch and the norms of what follows it, in one launch."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from g4attn_jax.ops import checks
from g4attn_jax.ops.add_rms_norm import reference
from g4attn_jax.ops.op import Implementation, Kernel, Op

_op = Op(
    "add_rms_norm",
    reference=reference.add_rms_norm,
    kernels=[Kernel("triton", "g4attn_jax.ops.add_rms_norm.triton:add_rms_norm")],
)


def add_rms_norm(
    x: Float[Array, "*batch E"],
    y: Float[Array, "*batch E"] | Float[Array, "partial_sums *batch E"],
    scale: Float[Array, " E"],
    next_scales: Sequence[Float[Array, " E"]] = (),
    factor: Float[Array, ""] | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch E"], tuple[Float[Array, "*batch E"], ...]]:
    """Adds a branch, under its norm, to the residual stream, and norms the sum for what is next.

    With rms(x) = x * rsqrt(mean(x^2) + eps), in float32:

        sum = (x + rms(y) * scale) * factor        rounded to x's dtype
        h_i = rms(sum) * next_scales_i

    Args:
        x: [..., E], the residual stream. bfloat16, float16 or float32.
        y: [..., E], the branch, of any of these dtypes, or [partial sums, ..., E] of it.
        scale: [E], of the branch's norm, of any of these dtypes, as all scales are.
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
    scales = {f"next_scales[{i}]": next_scale for i, next_scale in enumerate(next_scales)}
    checks.check_residual_sum(x, y, scales | {"scale": scale}, factor)
    checks.check_eps(eps, 0.0)
    return _op(x, y, scale, tuple(next_scales), factor, eps=eps, implementation=implementation)
