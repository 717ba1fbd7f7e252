"""RMSNorm and RoPE of Q and K, RMSNorm of V, from the packed projection, in one launch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from g4attn_jax.checks import check_array, check_dtype
from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops import checks
from g4attn_jax.ops.op import Implementation, Kernel, Op
from g4attn_jax.ops.qkv_norm_rope import reference

_op = Op(
    "qkv_norm_rope",
    reference=reference.qkv_norm_rope,
    kernels=[Kernel("triton", "g4attn_jax.ops.qkv_norm_rope.triton:qkv_norm_rope")],
)


def qkv_norm_rope(
    qkv: Float[Array, "*batch Nkv rows D"] | Float[Array, "partial_sums *batch Nkv rows D"],
    q_norm: Float[Array, " D"],
    k_norm: Float[Array, " D"] | None,
    cos: Float[Array, "*batch R/2"],
    sin: Float[Array, "*batch R/2"],
    *,
    mode: ProjectionMode,
    eps: float = 1e-6,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "*batch Nq D"],
    Float[Array, "*batch Nkv D"] | None,
    Float[Array, "*batch Nkv D"] | None,
]:
    """Queries, keys and values of new tokens, ready for attention: training, prefill without reuse.

    With rms(x) = x * rsqrt(mean(x^2) + eps), in float32 and rounded once at the end:

        q = rope(rms(x_q) * q_norm)      k = rope(rms(x_k) * k_norm)      v = rms(x_v)

    where rope rotates dims i and i + D/2 by the angle of pair i < R/2. In QK_ONLY x_k and x_v are
    the same row. Works under `jit`, `vmap`, `jvp`, `grad`; the derivative keeps the arguments only.

    Args:
        qkv: [..., Nkv, G + P, D], for each KV head its G query heads, then K, then V. bfloat16,
            float16 or float32; D even, fastest as a power of two. Or, with `dtype`, partial sums of
            it, [partial sums, ..., Nkv, G + P, D], see `ops.linear_partial_sums`: they are added
            in float32, in order.
        q_norm: learned scale of Q, [D], of any dtype that `qkv` may have.
        k_norm: learned scale of K, [D]; required unless mode is Q_ONLY, where it must be None.
        cos: float32 [..., R/2], from `rope.rope_cos_sin`; R is 0 to D.
        sin: float32 [..., R/2].
        mode: which heads the buffer holds.
        eps: added to the mean square.
        dtype: of the results, where `qkv` has partial sums; None: it has none.
        implementation: None (the kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret".

    Returns:
        (q, k, v) in the dtype of `qkv`, or in `dtype`: q [..., Nkv * G, D]; k and v [..., Nkv, D],
        both None for Q_ONLY.

    Raises:
        ValueError: an argument has the wrong rank, rows, length or dtype, or is missing or surplus.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Gemma 4's attention in Hugging Face transformers; Su et al., "RoFormer" (2021).
    """
    dtype = check_heads(qkv, q_norm, k_norm, cos, sin, mode=mode, eps=eps, dtype=dtype)
    checks.check_k_norm(k_norm, mode=mode)
    constants = {"mode": mode, "eps": eps, "dtype": dtype}
    return _op(qkv, q_norm, k_norm, cos, sin, implementation=implementation, **constants)


def check_heads(qkv, q_norm, k_norm, cos, sin, *, mode, eps, dtype) -> jnp.dtype | None:
    """Refuses what neither this op nor `qkv_norm_rope_write` takes.

    Returns:
        dtype as a `jnp.dtype`, or None.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    checks.check_packed(qkv, mode)
    tokens = qkv.shape[:-3]
    if dtype is not None:
        check_dtype("dtype", dtype)
        dtype = jnp.dtype(dtype)
        if len(tokens) == 0 or tokens[0] == 0:
            raise ValueError(
                f"qkv has shape {qkv.shape}; accepted together with dtype: one or more partial "
                "sums, [partial sums, ..., Nkv, G + P, D]"
            )
        tokens = tokens[1:]
    head_dim = qkv.shape[-1]
    if head_dim % 2:
        raise ValueError(f"qkv has shape {qkv.shape}; its last size, D, must be even")
    check_array("q_norm", q_norm, (head_dim,))
    check_array("k_norm", k_norm, (head_dim,), none=True)
    check_array("cos", cos, (*tokens, range(head_dim // 2 + 1)), "float32")
    check_array("sin", sin, cos.shape, "float32")
    checks.check_eps(eps, 0.0)
    return dtype
