"""RMSNorm of Q, K and V from the packed projection buffer, in one launch."""

from jaxtyping import Array, Float

from g4attn_jax.checks import check_array
from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops import checks
from g4attn_jax.ops.op import Implementation, Kernel, Op
from g4attn_jax.ops.qkv_rms_norm import reference

_op = Op(
    "qkv_rms_norm",
    reference=reference.qkv_rms_norm,
    kernels=[Kernel("triton", "g4attn_jax.ops.qkv_rms_norm.triton:qkv_rms_norm")],
)


def qkv_rms_norm(
    qkv: Float[Array, "*batch Nkv rows D"],
    q_norm: Float[Array, " D"],
    k_norm: Float[Array, " D"] | None = None,
    v_norm: Float[Array, " D"] | None = None,
    *,
    mode: ProjectionMode,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "*batch Nq D"],
    Float[Array, "*batch Nkv D"] | None,
    Float[Array, "*batch Nkv D"] | None,
]:
    """Normalises all heads of a layer, reading the packed projection once.

    With rms(x) = x * rsqrt(mean(x^2) + eps), in float32 and rounded once at the end:

        q = rms(x_q) * q_norm      k = rms(x_k) * k_norm      v = rms(x_v)

    In QK_ONLY x_k and x_v are the same row: it is loaded once and has one rsqrt. Letters: Nq and
    Nkv query and KV heads, G = Nq / Nkv, P = 0, 1, 2 for Q_ONLY, QK_ONLY, QKV_FULL, D head dim.

    Works under `jit`, `vmap`, `jvp`, `grad` and, for one platform at a time, `jax.export` (with the
    check of the custom call `__gpu$xla.gpu.triton` disabled; on a machine without a GPU inside
    `jax.sharding.use_abstract_mesh` of the target's mesh). The derivative keeps nothing but the
    arguments.

    Args:
        qkv: [..., Nkv, G + P, D], for each KV head its G query heads, then K, then V. bfloat16,
            float16 or float32; any number of tokens, none included; fastest for D a power of two.
        q_norm: learned scale of Q, [D], of any dtype that `qkv` may have.
        k_norm: learned scale of K, [D]; required unless mode is Q_ONLY, where it must be None.
        v_norm: learned scale of V, [D], for models that have one. Gemma 4 has none.
        mode: which heads the buffer holds.
        eps: added to the mean square.
        scale_offset: added to every scale given; 1.0 for checkpoints in the form of Gemma 3, whose
            norm multiplies by 1 + w.
        implementation: None (the kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret".

    Returns:
        (q, k, v) in the dtype of `qkv`: q [..., Nkv * G, D], query head g * G + r being row r of
        KV head g; k and v [..., Nkv, D], both None for Q_ONLY.

    Raises:
        ValueError: an argument has the wrong rank, rows, length or dtype, or is missing or surplus.
        NotImplementedError: "triton" was demanded and there is no supported GPU.

    Source: Gemma 4's attention in Hugging Face transformers, and SGLang's change that fused its
    QKV norms (PR 25461).
    """
    checks.check_packed(qkv, mode)
    checks.check_k_norm(k_norm, mode=mode)
    if mode is ProjectionMode.Q_ONLY and v_norm is not None:
        raise ValueError("v_norm was given; Q_ONLY normalises no V and accepts None")
    check_array("q_norm", q_norm, qkv.shape[-1:])
    for name, scale in (("k_norm", k_norm), ("v_norm", v_norm)):
        check_array(name, scale, qkv.shape[-1:], none=True)
    checks.check_eps(eps, scale_offset)
    return _op(
        qkv,
        q_norm,
        k_norm,
        v_norm,
        implementation=implementation,
        mode=mode,
        eps=eps,
        scale_offset=scale_offset,
    )
