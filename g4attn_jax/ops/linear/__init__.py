"""Products of a step's few tokens and a weight: `linear`, its split-K form, and `geglu`."""

import jax
from jaxtyping import Array, Float

from g4attn_jax.checks import check_array
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear import reference
from g4attn_jax.ops.linear.launch import choose_num_partial_sums
from g4attn_jax.ops.op import XLA, Implementation, Kernel, Op, check_implementation

# Up to this many tokens a step is bound by reading its weights. The kernel reads those of 31B
# faster than XLA's matmul (`python -m bench tune linear`), but for full QKV of up to 8 tokens (XLA
# is 2 to 4 % faster) and the MLP of one token (less than 1 %). Measured by itself up to 32
# tokens; 8 sequences with 4 to 7 drafts need 64, and the benchmark "speculative" has 40 of them.
MAX_TOKENS = 64
# Without split-K fewer columns are too few programs; XLA, which splits K itself, takes them. Where
# one overtakes the other has not been measured.
_MIN_COLUMNS = 6144

_linear_partial_sums = Op(
    "linear_partial_sums",
    reference=reference.linear_partial_sums,
    kernels=[Kernel("triton", "g4attn_jax.ops.linear.triton:linear_partial_sums")],
)
_geglu = Op(
    "geglu",
    reference=reference.geglu,
    kernels=[Kernel("triton", "g4attn_jax.ops.linear.triton:geglu")],
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
            up to 64 tokens and 6144 columns or more; else XLA), "triton" (the kernel for up to 64
            tokens and any columns, XLA for more), "xla", or "triton_interpret" (the kernel for any
            number of tokens). Under `jax.vmap` the tokens of one element count.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    _check(x, w, "N")
    implementation = _without_split_k(_linear_partial_sums, x, w, implementation)
    return _linear_partial_sums(x, w, num_partial_sums=1, implementation=implementation)[0]


def linear_partial_sums(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "partial_sums *batch N"]:
    """Partial sums of x w (split-K), for what reads them to add: no launch is spent on that.

    With few columns several programs share them, which reads w faster.

    Args:
        x: [..., K]. bfloat16, float16 or float32.
        w: [K, N], in x's dtype.
        implementation: see `linear`, but for any number of columns.

    Returns:
        One partial sum [1, ..., N] in x's dtype, or more in float32: as many as the kernel would
        make, though XLA in its place fills the first alone. "xla" and more than 64 tokens make one.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.
    """
    _check(x, w, "N")
    implementation, count = _for_tokens(_linear_partial_sums, x, implementation), 1
    if implementation != XLA:
        count = choose_num_partial_sums(gpu(), k=w.shape[0], columns=w.shape[1])
    return _linear_partial_sums(x, w, num_partial_sums=count, implementation=implementation)


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
        implementation: see `linear`.

    Returns:
        [..., N] in x's dtype. Up to 64 tokens both products stay in float32 until the end; above,
        XLA's are rounded first.

    Raises:
        ValueError: an argument has the wrong rank, length or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    _check(x, w, 2, "N")
    return _geglu(x, w, implementation=_without_split_k(_geglu, x, w, implementation))


def _check(x, w, *columns):
    check_array("x", x, (..., "K"))
    check_array("w", w, (x.shape[-1], *columns), x.dtype)


def _for_tokens(op, x, implementation):
    """Implementation of an op: XLA for many tokens, and where their number is symbolic."""
    implementation = op.own(implementation)
    if implementation == XLA or op.is_interpreted(implementation):
        return implementation
    if isinstance(x.size, int) and x.size <= MAX_TOKENS * x.shape[-1]:
        return implementation
    check_implementation(implementation)  # a demand holds for any number
    return XLA


def _without_split_k(op, x, w, implementation):
    """Implementation of an op that has no partial sums: None leaves few columns to XLA."""
    implementation = op.own(implementation)
    is_narrow = implementation is None and w.shape[-1] < _MIN_COLUMNS
    return XLA if is_narrow else _for_tokens(op, x, implementation)
