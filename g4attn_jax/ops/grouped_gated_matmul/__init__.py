"""First half of a mixture of gated MLPs: both products and the gate in one launch."""

from jaxtyping import Array, Float, Int

from g4attn_jax.ops import checks
from g4attn_jax.ops.grouped_gated_matmul import reference
from g4attn_jax.ops.op import Implementation, Kernel, Op

_op = Op(
    "grouped_gated_matmul",
    reference=reference.grouped_gated_matmul,
    kernels=[Kernel("triton", "g4attn_jax.ops.grouped_gated_matmul.triton:grouped_gated_matmul")],
)


def grouped_gated_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "X K 2 N"],
    group_sizes: Int[Array, " X"],
    rows: Int[Array, " M"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """y_i = gelu(x_i w_g0) * (x_i w_g1), g being the group of row i, with the tanh form of gelu.

    Products, gelu and gate are float32, and rounded once. The rest is as in `grouped_matmul`.

    Args:
        x: [T, K]. bfloat16, float16 or float32.
        w: [X, K, 2, N], of the dtype of x: of every group the matrix of the gate and the other.
        group_sizes: int32 [X], none negative, M or less in all.
        rows: int32 [M], the row of x that row i of the result is of, from 0 to T - 1 (what is
            outside is clipped). Rows of x are read where they are, as often as they are needed.
            None: M is T, and row i is of row i.
        implementation: as in `grouped_matmul`.

    Returns:
        [M, N] in the dtype of x; rows past the last group are 0.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), for every group.
    """
    checks.check_grouped_matmul(x, w, group_sizes, columns=(2, "N"), rows=rows)
    return _op(x, w, group_sizes, rows, implementation=implementation)
