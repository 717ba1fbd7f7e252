"""Mixture of gated MLPs for one token or few: every expert's matrices read by all of the GPU."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from g4attn_jax.checks import check_array
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.moe_mlp import reference
from g4attn_jax.ops.moe_mlp.launch import choose_down_launch
from g4attn_jax.ops.op import XLA, Implementation, Kernel, Op

_op = Op(
    "moe_mlp",
    reference=reference.moe_mlp,
    kernels=[Kernel("triton", "g4attn_jax.ops.moe_mlp.triton:moe_mlp")],
)


def moe_mlp(
    h: Float[Array, "M E"],
    gate_up: Float[Array, "X E 2 F"],
    down: Float[Array, "X F E"],
    experts: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "partial_sums M E"]:
    """Partial sums of a mixture of gated MLPs, for what reads them to add.

        y = sum over i < k of weights_i * (gelu(h Wg) * (h Wu)) Wd      of the expert experts_i

    with the tanh form of gelu. Products and sums are float32; what Wd is multiplied by is rounded
    to the dtype of h, in the kernel together with its weight. Tokens are multiplied one by one, so
    that an expert that several choose is read for each: for many tokens `grouped_gated_matmul` and
    `grouped_matmul` are faster.

    Args:
        h: [M, E]. bfloat16, float16 or float32.
        gate_up: Wg and Wu of every expert, [X, E, 2, F], in the dtype of h.
        down: Wd of every expert, [X, F, E], in the dtype of h.
        experts: int32 [M, k], from 0 to X - 1.
        weights: float32 [M, k].
        implementation: None (two launches on an NVIDIA GPU of compute capability 8.0 or higher,
            else XLA), "triton", "xla", or "triton_interpret".

    Returns:
        Float32 [partial sums, M, E]: as many as the kernel makes, though XLA in its place fills the
        first alone. "xla" makes one.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: `Gemma4TextExperts` of Hugging Face transformers 5.23.
    """
    check_array("h", h, ("M", "E"), empty=True)
    check_array("gate_up", gate_up, ("X", h.shape[1], 2, "F"), h.dtype)
    check_array("down", down, (gate_up.shape[0], gate_up.shape[3], h.shape[1]), h.dtype)
    check_array("experts", experts, (h.shape[0], "k"), jnp.int32)
    check_array("weights", weights, experts.shape, jnp.float32)
    count = 1
    if _op.own(implementation) != XLA and isinstance(h.shape[0], int):
        count = choose_down_launch(
            gpu(),
            tokens=h.shape[0],
            top_k=experts.shape[1],
            depth=down.shape[1],
            columns=down.shape[2],
            itemsize=h.dtype.itemsize,
        ).parts
    arrays = h, gate_up, down, experts, weights
    return _op(*arrays, num_partial_sums=count, implementation=implementation)
