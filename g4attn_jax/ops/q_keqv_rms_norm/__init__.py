"""RMSNorm of Q and K = V from two buffers, in one launch."""

from jaxtyping import Array, Float

from g4attn_jax.checks import check_array
from g4attn_jax.ops import checks
from g4attn_jax.ops.op import Implementation, Kernel, Op
from g4attn_jax.ops.q_keqv_rms_norm import reference

_op = Op(
    "q_keqv_rms_norm",
    reference=reference.q_keqv_rms_norm,
    kernels=[Kernel("triton", "g4attn_jax.ops.q_keqv_rms_norm.triton:q_keqv_rms_norm")],
)


def q_keqv_rms_norm(
    q: Float[Array, "*batch Nq D"],
    kv: Float[Array, "*batch Nkv D"],
    q_norm: Float[Array, " D"],
    k_norm: Float[Array, " D"],
    v_norm: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch Nq D"], Float[Array, "*batch Nkv D"], Float[Array, "*batch Nkv D"]]:
    """Normalises Q, and K = V from one projection: `qkv_rms_norm` for buffers of your own.

    With rms(x) = x * rsqrt(mean(x^2) + eps), in float32 and rounded once at the end:

        q = rms(q) * q_norm        k = rms(kv) * k_norm       v = rms(kv)

    Every row of `kv` is loaded once and has one rsqrt. `jit`, `vmap`, `jvp`, `grad`, `jax.export`
    and the letters are as in `qkv_rms_norm`.

    Args:
        q: projected queries, [..., Nq, D]. bfloat16, float16 or float32.
        kv: the projection that is both K and V, [..., Nkv, D], of the dtype of `q`. Nq need not be
            a multiple of Nkv.
        q_norm: learned scale of Q, [D].
        k_norm: learned scale of K, [D].
        v_norm: learned scale of V, [D], for models that have one. Gemma 4 has none.
        eps: added to the mean square.
        scale_offset: added to every scale given; 1.0 for checkpoints in the form of Gemma 3.
        implementation: as in `qkv_rms_norm`.

    Returns:
        (q, k, v) in the dtype and the shapes of `q`, `kv` and `kv`.

    Raises:
        ValueError: an argument has the wrong rank, shape or dtype.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: the contract of SGLang's fused Q and K = V norm (PR 25461).
    """
    check_array("q", q, (..., "Nq", "D"))
    check_array("kv", kv, (*q.shape[:-2], "Nkv", q.shape[-1]), q.dtype)
    for name, scale in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_array(name, scale, q.shape[-1:])
    check_array("v_norm", v_norm, q.shape[-1:], none=True)
    checks.check_eps(eps, scale_offset)
    return _op(
        q,
        kv,
        q_norm,
        k_norm,
        v_norm,
        implementation=implementation,
        eps=eps,
        scale_offset=scale_offset,
    )
