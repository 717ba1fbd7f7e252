"""Products of a step's few tokens and a weight: `linear`, its split-K form, `geglu`, `logits`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from g4attn_jax.checks import check_array, check_choice
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear import reference
from g4attn_jax.ops.linear.launch import choose_num_partial_sums, geglu_is_faster
from g4attn_jax.ops.op import XLA, Implementation, Kernel, Op

# Up to this many tokens a step is bound by reading its weights, which the kernels do faster than
# XLA's matmul (`python -m bench tune linear`).
MAX_TOKENS = 64
# Numbers of an array that a kernel's 32-bit indices reach.
_MAX_SIZE = 2**31


def _refuses_large(x, w, *, interpret, **static):
    if w.size >= _MAX_SIZE:
        return f"the weight has {w.size} numbers; accepted: fewer than 2^31"
    return None


def _geglu_is_faster(x, w):
    rows, columns = x.size // x.shape[-1], w.shape[-1]
    return geglu_is_faster(gpu(), rows=rows, columns=columns)


_linear_partial_sums = Op(
    "linear_partial_sums",
    reference=reference.linear_partial_sums,
    kernels=[
        Kernel("triton", "g4attn_jax.ops.linear.triton:linear_partial_sums", refusal=_refuses_large)
    ],
)
_geglu = Op(
    "geglu",
    reference=reference.geglu,
    kernels=[
        Kernel(
            "triton",
            "g4attn_jax.ops.linear.triton:geglu",
            refusal=_refuses_large,
            is_faster=_geglu_is_faster,
        )
    ],
)
_logits = Op(
    "logits",
    reference=reference.logits,
    kernels=[Kernel("triton", "g4attn_jax.ops.linear.triton:logits", refusal=_refuses_large)],
)


def linear(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch N"]:
    """x w, summed in float32 and rounded once.

    Weights that are sharded over devices are gathered for a kernel, as for any custom call: run it
    inside `jax.shard_map`, or take "xla".

    Args:
        x: [..., K]. bfloat16, float16 or float32.
        w: [K, N], in x's dtype.
        implementation: None (on an NVIDIA GPU of compute capability 8.0 or higher the kernel for
            up to 64 tokens, else XLA), "triton" (the same, and an error where there is no such
            GPU), "xla", or "triton_interpret" (the kernel for any number of tokens). Under
            `jax.vmap` the tokens of one element count.

    Returns:
        [..., N] in x's dtype. XLA adds the kernel's partial sums, in the launch that reads them.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    partial_sums = linear_partial_sums(x, w, implementation=implementation)
    return add_partial_sums(partial_sums, x.dtype)


def linear_partial_sums(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "partial_sums *batch N"]:
    """Partial sums of x w (split-K), for what reads them to add: no launch is spent on that.

    With few columns several programs share them, which reads w faster.

    Args:
        x: [..., K]. bfloat16, float16 or float32.
        w: [K, N], in x's dtype.
        dtype: of a sum that is the only one, to which it is rounded: None is x's, or float32.
        implementation: see `linear`.

    Returns:
        One partial sum [1, ..., N] in `dtype`, or more in float32: as many as the kernel would
        make, though XLA in its place fills the first alone. "xla" and more than 64 tokens make one.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    _check(x, w, "N")
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    check_choice("dtype", dtype, (x.dtype, jnp.dtype(jnp.float32)))
    implementation, count = _for_tokens(_linear_partial_sums, x, implementation), 1
    if implementation != XLA:
        rows = x.size // x.shape[-1]
        count = choose_num_partial_sums(gpu(), rows=rows, k=w.shape[0], columns=w.shape[1])
    if count > 1:
        dtype = jnp.dtype(jnp.float32)
    return _linear_partial_sums(
        x, w, num_partial_sums=count, dtype=dtype, implementation=implementation
    )


def add_partial_sums(
    partial_sums: Float[Array, "partial_sums *batch N"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*batch N"]:
    """Sum of what `linear_partial_sums` returns.

    Args:
        partial_sums: [partial sums, ..., N].
        dtype: of the sum, to which it is rounded once.

    Returns:
        [..., N].
    """
    total = partial_sums[0] if len(partial_sums) == 1 else partial_sums.sum(axis=0)
    return total.astype(dtype)


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
        implementation: see `linear`; but from 17 tokens on None is XLA, which splits K, where
            columns are too few for programs to fill the memory bus (4224 on an H200).

    Returns:
        [..., N] in x's dtype. Up to 64 tokens both products stay in float32 until the end; above,
        XLA's are rounded first.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    _check(x, w, 2, "N")
    return _geglu(x, w, implementation=_for_tokens(_geglu, x, implementation))


def logits(
    hidden: Float[Array, "*batch K"],
    table: Float[Array, "V K"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch V"]:
    """Products of hidden states and the rows of a table, their float32 sums not rounded.

    A table that is sharded over devices is gathered for the kernel, see `linear`.

    Args:
        hidden: [..., K]. bfloat16, float16 or float32.
        table: [V, K], in hidden's dtype: an embedding, whose rows lie in memory as they are read.
        implementation: see `linear`.

    Returns:
        Float32 [..., V].

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    check_array("hidden", hidden, (..., "K"))
    check_array("table", table, ("V", hidden.shape[-1]), hidden.dtype)
    implementation = _for_tokens(_logits, hidden, implementation)
    return _logits(hidden, table, implementation=implementation)


def _check(x, w, *columns):
    check_array("x", x, (..., "K"))
    check_array("w", w, (x.shape[-1], *columns), x.dtype)


def _for_tokens(op, x, implementation):
    """Implementation of an op: XLA for many tokens, and where their number is symbolic."""
    tokens = math.prod(x.shape[:-1])
    return op.for_tokens(implementation, tokens, most=MAX_TOKENS)
