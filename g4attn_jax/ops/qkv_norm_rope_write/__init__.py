"""Everything between the QKV matmul and attention: norm, RoPE and cache write, in one launch."""

import jax
from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.checks import check_array
from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops import checks, float8_cache
from g4attn_jax.ops.op import Implementation, Kernel, Op, no_derivative
from g4attn_jax.ops.qkv_norm_rope import check_heads
from g4attn_jax.ops.qkv_norm_rope_write import reference


def _refusal(qkv, q_norm, k_norm, cos, sin, slots, cache, *, interpret, **static):
    return float8_cache.refusal(cache, interpret=interpret)


_write = Op(
    "qkv_norm_rope_write",
    reference=reference.qkv_norm_rope_write,
    kernels=[
        Kernel(
            "triton",
            "g4attn_jax.ops.qkv_norm_rope_write.triton:qkv_norm_rope_write",
            refusal=_refusal,
        )
    ],
    derivative=no_derivative(
        "qkv_norm_rope_write updates a cache and has no derivative; accepted: no cache, "
        "ops.qkv_norm_rope (Gemma4Attention with cache=None)"
    ),
)
_query = Op(
    "q_norm_rope",
    reference=reference.query,
    kernels=[Kernel("triton", "g4attn_jax.ops.qkv_norm_rope_write.triton:query")],
)


def qkv_norm_rope_write(
    qkv: Float[Array, "*batch Nkv rows D"] | Float[Array, "partial_sums *batch Nkv rows D"],
    q_norm: Float[Array, " D"],
    k_norm: Float[Array, " D"] | None,
    cos: Float[Array, "*batch R/2"],
    sin: Float[Array, "*batch R/2"],
    slots: Int[Array, "*batch"] | None,
    cache: Cache,
    *,
    mode: ProjectionMode,
    eps: float = 1e-6,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch Nq width"], Cache]:
    """Normalises and rotates all heads of a layer and writes K and V into the cache.

    With rms(x) = x * rsqrt(mean(x^2) + eps), in float32 and rounded once, where it is stored:

        q = rope(rms(x_q) * q_norm)      k = rope(rms(x_k) * k_norm)      v = rms(x_v)

    A `KVCache` takes k and v. A `CompactKVCache` takes v and the R rotating dims of k, and q is the
    absorbed query, of D + R numbers (see there). A Q_ONLY layer writes nothing.

    With the cache donated to a jitted step the update is in place; every other byte of the cache
    stays as it is. Inference only, but for Q_ONLY: differentiating it raises.

    Args:
        qkv: [..., Nkv, G + P, D], for each KV head its G query heads, then K, then V. bfloat16,
            float16 or float32; D even, fastest as a power of two; any number of tokens. Or, with
            `dtype`, partial sums of it, [partial sums, ..., Nkv, G + P, D], see
            `ops.linear_partial_sums`: they are added in float32, in order.
        q_norm: learned scale of Q, [D], of any dtype that `qkv` may have.
        k_norm: learned scale of K, [D]. For Q_ONLY that of the layer that made the cache, which
            is needed if it is compact.
        cos: float32 [..., R/2], from `rope.rope_cos_sin`; R is 0 to D.
        sin: float32 [..., R/2].
        slots: int32 [...], the slot of each token; those that the cache does not have (-1) write
            nothing, the others must differ. Not read in Q_ONLY, where it may be None.
        cache: its arrays have the dtype of q, or float8_e4m3fn together with `cache.scale`.
        mode: which heads the buffer holds.
        eps: added to the mean square.
        dtype: of q, where `qkv` has partial sums; None: it has none.
        implementation: None (the kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret". float8 needs 8.9 for the kernel.

    Returns:
        (q, cache): q in the dtype of `qkv`, or in `dtype`, [..., Nkv * G, D], or for a compact
        cache [..., Nkv * G, D + R]; the updated cache, in Q_ONLY the given one.

    Raises:
        ValueError: an argument has the wrong rank, rows, length or dtype, or is missing or surplus.
        NotImplementedError: "triton" was demanded and there is no supported GPU, or it cannot
            address a float8 array of 2^31 to 2^32 elements; or the op is differentiated.

    Source: Gemma 4's attention in Hugging Face transformers; the compact form is this project's.
    """
    dtype = check_heads(qkv, q_norm, k_norm, cos, sin, mode=mode, eps=eps, dtype=dtype)
    checks.check_cache(
        cache,
        mode=mode,
        dtype=dtype or qkv.dtype,
        num_kv_heads=qkv.shape[-3],
        head_dim=qkv.shape[-1],
        rotary_dim=2 * cos.shape[-1],
    )
    constants = {"mode": mode, "eps": eps, "dtype": dtype, "implementation": implementation}
    if k_norm is None and (cache.absorbs_k_norm or mode is not ProjectionMode.Q_ONLY):
        raise ValueError(
            f"k_norm is missing; {mode.name} with a {type(cache).__name__} needs it, of shape "
            f"({qkv.shape[-1]},)"
        )
    if mode is ProjectionMode.Q_ONLY:
        k_norm = k_norm if cache.absorbs_k_norm else None
        return _query(qkv, q_norm, k_norm, cos, sin, form=type(cache), **constants), cache
    check_array("slots", slots, cos.shape[:-1], "int32")
    return _write(qkv, q_norm, k_norm, cos, sin, slots, cache, **constants)
