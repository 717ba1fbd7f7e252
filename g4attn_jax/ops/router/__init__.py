"""Choice of each token's experts, and the order of rows in which they are multiplied."""

import jax
import numpy as np
from jaxtyping import Array, Float

from g4attn_jax.checks import check_array, check_integer
from g4attn_jax.ops import checks
from g4attn_jax.ops.op import Implementation, Kernel, Op
from g4attn_jax.ops.router import reference
from g4attn_jax.ops.router.reference import Routing

__all__ = ["Routing", "router"]

# Up to this many tokens one program sorts the rows of all; more are left to XLA.
MAX_TOKENS = 64
# Of more experts that program does not fit into the shared memory.
_MAX_EXPERTS = 256


def _refusal(x, scale, w, per_expert_scale, *, interpret, **static):
    if w.shape[1] > _MAX_EXPERTS:
        return f"w has {w.shape[1]} experts; accepted: up to {_MAX_EXPERTS}"
    return None


def _derivative(reference, primals, tangents):
    """Tangent of the reference's weights; what is an integer has none."""

    def weights(*arrays):
        return reference(*arrays).weights

    routing = jax.eval_shape(reference, *primals)
    of_integers = [np.zeros(x.shape, jax.dtypes.float0) for x in routing[1:]]
    tangent = jax.checkpoint(lambda *a: jax.jvp(weights, *a)[1])(primals, tangents)
    return Routing(tangent, *of_integers)


_op = Op(
    "router",
    reference=reference.router,
    kernels=[Kernel("triton", "g4attn_jax.ops.router.triton:router", refusal=_refusal)],
    derivative=_derivative,
)


def router(
    x: Float[Array, "*batch E"],
    scale: Float[Array, " E"],
    w: Float[Array, "E X"],
    per_expert_scale: Float[Array, " X"],
    *,
    top_k: int,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> Routing:
    """The `top_k` experts of every token, their weights, and rows sorted by expert.

        r = rms(x) * scale / sqrt(E)
        w = softmax(the k largest of r W) * per_expert_scale of those k

    All products and sums are float32, none rounded to TF32: what is rounded here does not change a
    number, it changes the expert. Of equal scores that of the lower expert is larger; NaN is larger
    than all numbers. Derivatives are those of the weights, by XLA.

    Args:
        x: [..., E], the residual stream. bfloat16, float16 or float32, as all arguments.
        scale: [E], of the norm.
        w: W, [E, X]; read as it is stored.
        per_expert_scale: [X].
        top_k: k, from 1 to X.
        eps: added to the mean squares.
        implementation: None (on an NVIDIA GPU of compute capability 8.0 or higher two launches for
            up to 64 tokens and 256 experts; else XLA), "triton" (the kernel for up to 64 tokens,
            XLA for more), "xla", or "triton_interpret".

    Returns:
        `Routing` of M tokens, the product of x's axes but the last.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype.
        NotImplementedError: "triton" was demanded, and there is no supported GPU or there are more
            than 256 experts.

    Source: `Gemma4TextRouter` of Hugging Face transformers 5.23. There the k largest of a softmax
    over all experts are divided by their sum: the softmax of these k alone.
    """
    check_array("x", x, (..., "E"))
    check_array("scale", scale, x.shape[-1:])
    check_array("w", w, (x.shape[-1], "X"))
    check_array("per_expert_scale", per_expert_scale, w.shape[1:])
    check_integer("top_k", top_k, least=1, most=w.shape[1])
    checks.check_eps(eps, 0.0)
    x = x.reshape(-1, x.shape[-1])
    implementation = _op.for_tokens(implementation, x.shape[0], most=MAX_TOKENS)
    return _op(x, scale, w, per_expert_scale, top_k=top_k, eps=eps, implementation=implementation)
