"""Attention of a few new tokens per sequence over a cache of any form and layout."""

from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.checks import check_integer
from g4attn_jax.ops import checks
from g4attn_jax.ops.decode_attention import mosaic_limits, reference
from g4attn_jax.ops.decode_attention.splits import MAX_SPLITS
from g4attn_jax.ops.flash_attention.launch import triton_refusal
from g4attn_jax.ops.op import Implementation, Kernel, Op

# Up to this many tokens a sequence a step decodes (16 is the most that speculative decoding
# verifies at once) and is bound by reading the cache; above, it is a prefill, bound by arithmetic.
MAX_DECODE_TOKENS = 16

_op = Op(
    "decode_attention",
    reference=reference.decode_attention,
    kernels=[
        Kernel(
            "mosaic_gpu",
            "g4attn_jax.ops.decode_attention.mosaic:decode_attention",
            refusal=mosaic_limits.refusal,
            min_compute_capability=9.0,
            min_jax=(0, 11),  # names of Mosaic GPU
        ),
        Kernel(
            "triton",
            "g4attn_jax.ops.decode_attention.triton:decode_attention",
            refusal=triton_refusal,
        ),
    ],
)


def decode_attention(
    q: Float[Array, "B T Nq width"],
    cache: Cache,
    page_table: Int[Array, "B pages"] | None,
    positions: Int[Array, "B T"],
    *,
    sliding_window: int | None = None,
    scale: float = 1.0,
    num_splits: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T Nq D"]:
    """softmax(scale q k^T + mask) v over the cache, which holds the new tokens already.

    A token at position p sees the keys at positions 0 .. p, with a window the last `sliding_window`
    of them. Position p of a sequence lies in slot p mod C of its C slots, which are those of its
    pages in order: contiguous, ring and paged caches are read by this one rule. Only in a ring may
    p be C or more; elsewhere that is refused where positions are known, and under `jax.jit` the
    result is unspecified. What no token sees has no effect on the result, be it NaN or infinite;
    but where XLA computes it on a GPU, without a page table, and in a derivative it must be finite.
    Softmax in float32; nothing grows with the context but the partial results of the splits.

    Args:
        q: [B, T, Nq, D], or for a compact cache the absorbed query [B, T, Nq, D + R], as
            `qkv_norm_rope_write` returns it. T is 1 to 16.
        cache: Nkv divides Nq.
        page_table: int32 [B, pages], pages of each sequence in order, -1 where it has none; of a
            multiple of 16 slots, 16 to 256. None: sequence b has page b, as in contiguous and ring
            caches.
        positions: int32 [B, T], -1 for padding, -2 for a token that has no slot. The others must
            have been written, and so must all positions between them.
        sliding_window: keys that a token sees, its own included; None: all.
        scale: of the scores; 1 in Gemma 4.
        num_splits: programs that share a sequence and KV head, up to 256; None chooses. Results at
            one number do not depend on the other sequences of the batch.
        implementation: None (a kernel on an NVIDIA GPU of compute capability 8.0 or higher, else
            XLA), "triton", "xla", or "triton_interpret"; float8 needs 8.9 for the kernel. Or
            "mosaic_gpu", the kernel for several tokens on Hopper, which None takes where it can:
            with JAX 0.11 or later, compute capability 9.0, no window, 17 to 128 query rows a KV
            head (at most 64 of half of the tokens, rounded up), 8, 16, 32 or 64 of them a token,
            pages of a multiple of 64 slots, D 512, R 128, bfloat16 or float16. Under `vmap` it runs
            one by one. "mosaic_gpu_interpret" interprets it.

    Returns:
        [B, T, Nq, D] in q's dtype; zeros for padding, NaN for -2.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype, or a position or page that is
            known does not exist.
        NotImplementedError: "mosaic_gpu" was demanded of what it does not do, or "triton" and there
            is no supported GPU, or not one with the shared memory for such heads (for some of 512
            in float32 99 KiB are too little), or it cannot address a float8 array of 2^31 to 2^32
            elements. None takes XLA then.

    Source: Dao et al., "Flash-Decoding for long-context inference" (2023); Kwon et al., "Efficient
    memory management for large language model serving with PagedAttention" (2023).
    """
    checks.check_attention(
        q,
        cache,
        page_table,
        positions,
        sliding_window=sliding_window,
        scale=scale,
        max_tokens=MAX_DECODE_TOKENS,
    )
    check_integer("num_splits", num_splits, most=MAX_SPLITS, none=True)
    return _op(
        q,
        cache,
        page_table,
        positions,
        sliding_window=sliding_window,
        scale=scale,
        num_splits=num_splits,
        implementation=implementation,
    )
