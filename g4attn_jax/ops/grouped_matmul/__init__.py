"""Rows times a matrix of their group: the matmul of a mixture of experts."""

from jaxtyping import Array, Float, Int

from g4attn_jax.ops import checks
from g4attn_jax.ops.grouped_matmul import reference
from g4attn_jax.ops.op import Implementation, Kernel, Op

_op = Op(
    "grouped_matmul",
    reference=reference.grouped_matmul,
    kernels=[Kernel("triton", "g4attn_jax.ops.grouped_matmul.triton:grouped_matmul")],
)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "X K N"],
    group_sizes: Int[Array, " X"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """y_i = x_i w_g, g being the group of row i: `jax.lax.ragged_dot` in one launch.

    Rows are sorted by group: the first `group_sizes[0]` are of group 0, and so on; rows past the
    last group are 0. The sum is float32 and rounded once (of float32 inputs every product is exact
    to float32 in the kernel; elsewhere JAX's matmul precision decides). The kernel reads the
    matrices of groups that have rows, no others, and of rows none but a group's own. `jit`, `jvp`
    and `grad` work, the derivatives by XLA; so does `vmap`, in XLA where all arguments are batched.

    Args:
        x: [M, K]. bfloat16, float16 or float32.
        w: [X, K, N], of the dtype of x.
        group_sizes: int32 [X], none negative, M or less in all.
        implementation: None (the kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret".

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Gale et al., "MegaBlocks: efficient sparse training with mixture-of-experts" (2022).
    """
    checks.check_grouped_matmul(x, w, group_sizes, columns=("N",))
    return _op(x, w, group_sizes, implementation=implementation)
