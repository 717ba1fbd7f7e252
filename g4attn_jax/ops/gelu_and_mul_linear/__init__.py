"""The end of a narrow gated MLP in one launch: gate, and projection of what it lets through."""

from jaxtyping import Array, Float

from g4attn_jax.checks import check_array
from g4attn_jax.ops.gelu_and_mul_linear import reference
from g4attn_jax.ops.op import Implementation, Kernel, Op

# Every program adds and gates all that it multiplies; of more tokens that takes longer than a
# launch of its own.
_MAX_TOKENS = 16
_MAX_WIDTH = 512  # K, which a program holds at once


def _refusal(gate, up, w, *, interpret):
    if w.shape[0] > _MAX_WIDTH:
        return f"K is {w.shape[0]}; accepted: up to {_MAX_WIDTH}"
    return None


def _is_faster(gate, up, w):
    return up.size <= _MAX_TOKENS * up.shape[-1]


_op = Op(
    "gelu_and_mul_linear",
    reference=reference.gelu_and_mul_linear,
    kernels=[
        Kernel(
            "triton",
            "g4attn_jax.ops.gelu_and_mul_linear.triton:gelu_and_mul_linear",
            refusal=_refusal,
            is_faster=_is_faster,
        )
    ],
)


def gelu_and_mul_linear(
    gate: Float[Array, "*batch K"] | Float[Array, "partial_sums *batch K"],
    up: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch N"]:
    """(gelu(gate) * up) w, with the tanh form of gelu.

    The product of gate and up is made in float32 and rounded to w's dtype; sums are in float32 and
    rounded once.

    Args:
        gate: [..., K], or [partial sums, ..., K] of it. bfloat16, float16 or float32.
        up: [..., K]. bfloat16, float16 or float32.
        w: [K, N]. bfloat16, float16 or float32.
        implementation: None (on an NVIDIA GPU of compute capability 8.0 or higher the kernel for
            up to 16 tokens and a K of up to 512; else XLA), "triton" (the kernel for any number of
            tokens), "xla", or "triton_interpret".

    Returns:
        [..., N] in w's dtype.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded, and there is no supported GPU or K is too large.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    check_array("up", up, (..., "K"))
    check_array("gate", gate, (..., "K"))
    check_array("w", w, (up.shape[-1], "N"))
    if gate.shape[-up.ndim :] != up.shape or gate.ndim > up.ndim + 1 or gate.size < up.size:
        raise ValueError(
            f"gate has shape {gate.shape}; accepted: {up.shape}, that of up, or partial sums of "
            "this shape"
        )
    return _op(gate, up, w, implementation=implementation)
