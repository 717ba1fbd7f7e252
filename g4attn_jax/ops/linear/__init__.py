"""Products of a step's few tokens and a weight, bound by reading the weight."""

import jax
from jaxtyping import Array, Float

from g4attn_jax.ops import checks
from g4attn_jax.ops.implementation import Implementation, differentiable_op
from g4attn_jax.ops.linear import reference, triton

# Up to this many tokens a step is bound by reading its weights, and the kernel reads them faster
# than XLA's matmul (bench/results/h200/tune_linear.json).
MAX_TOKENS = 32
# Blocks of 64 columns that fill a GPU: fewer need parts, or go to XLA, which makes parts itself.
_MIN_BLOCKS = 96
_FULL = 256
_MAX_PARTS = 8

_linear_parts = differentiable_op(kernel=triton.linear_parts, reference=reference.linear_parts)
_geglu = differentiable_op(kernel=triton.geglu, reference=reference.geglu)


def linear(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch N"]:
    """x w, summed in float32 and rounded once.

    Args:
        x: [..., K]. bfloat16, float16 or float32.
        w: [K, N], in x's dtype.
        implementation: None (on an NVIDIA GPU of compute capability 8.0 or higher the kernel for
            up to 32 tokens and 6144 columns or more; else XLA), "triton" (the kernel for up to 32
            tokens), "xla", or "triton_interpret" (the kernel for any number of them).

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    _check(x, w, "K, N")
    return _linear_parts(x, w, num_parts=1, implementation=_whole(x, w, implementation))[0]


def linear_parts(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "parts *batch N"]:
    """Parts that add up to x w, for what reads them to add: no launch is spent on that.

    With few columns several programs share them, which reads w faster.

    Args:
        x: [..., K]. bfloat16, float16 or float32.
        w: [K, N], in x's dtype.
        implementation: see `linear`, but for any number of columns. XLA makes one part.

    Returns:
        One part [1, ..., N] in x's dtype, or more in float32.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    _check(x, w, "K, N")
    implementation, parts = _for_tokens(x, implementation), 1
    if implementation != "xla":
        parts = max(1, min(_MAX_PARTS, round(_FULL / _blocks(w))))
    return _linear_parts(x, w, num_parts=parts, implementation=implementation)


def sum_parts(
    parts: Float[Array, "parts *batch N"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*batch N"]:
    """What `linear_parts` made parts of, rounded once to a dtype."""
    return (parts[0] if len(parts) == 1 else parts.sum(axis=0)).astype(dtype)


def geglu(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K 2 N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch N"]:
    """gelu(x Wg) * (x Wu), with the tanh form of gelu.

    Args:
        x: [..., K]. bfloat16, float16 or float32.
        w: Wg and Wu, [K, 2, N], in x's dtype.
        implementation: see `linear`.

    Returns:
        [..., N] in x's dtype. Up to 32 tokens both products stay in float32 until the end; above,
        XLA's are rounded first.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    _check(x, w, "K, 2, N")
    if w.shape[1] != 2:
        raise ValueError(f"w has shape {w.shape}; accepted: [K, 2, N]")
    return _geglu(x, w, implementation=_whole(x, w, implementation))


def _check(x, w, dims):
    checks.check_buffer("x", x, dims="K")
    checks.check_buffer("w", w, dims=dims)
    if w.ndim != len(dims.split(", ")) or w.shape[0] != x.shape[-1]:
        raise ValueError(
            f"w has shape {w.shape}; with x of shape {x.shape} accepted: "
            f"[{dims}] with K {x.shape[-1]}"
        )
    if w.dtype != x.dtype:
        raise ValueError(f"w has dtype {w.dtype}; accepted: {x.dtype}, that of x")


def _for_tokens(x, implementation):
    is_few = x.size <= MAX_TOKENS * x.shape[-1]
    return implementation if is_few or implementation not in (None, "triton") else "xla"


def _whole(x, w, implementation):
    """Without parts: None leaves few columns to XLA."""
    few_columns = implementation is None and _blocks(w) < _MIN_BLOCKS
    return "xla" if few_columns else _for_tokens(x, implementation)


def _blocks(w):
    return -(-w.shape[-1] // 64)
