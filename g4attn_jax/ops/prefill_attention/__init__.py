"""Attention of a prompt, or a chunk of one, over a cache of any form and layout."""

import functools

from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.layout import SegmentIds
from g4attn_jax.ops import checks
from g4attn_jax.ops.flash_attention.launch import triton_refusal
from g4attn_jax.ops.op import XLA, Implementation, Kernel, Op
from g4attn_jax.ops.prefill_attention import cudnn, reference

_TRITON = Kernel(
    "triton",
    "g4attn_jax.ops.prefill_attention.triton:prefill_attention",
    refusal=triton_refusal,
)


def _by_cudnn(q, cache, page_table, positions, *, interpret, **constants):
    """Program that chooses between cuDNN and Triton, or XLA where Triton refuses."""
    otherwise = functools.partial(reference.prefill_attention, **constants)
    if _TRITON.refusal_here((q, cache, page_table, positions), constants) is None:
        otherwise = functools.partial(_TRITON.run, interpret=interpret, **constants)
    return cudnn.prefill_attention_or(
        lambda q, cache, positions: otherwise(q, cache, page_table, positions),
        q,
        cache,
        positions,
        **constants,
    )


_op = Op(
    "prefill_attention",
    reference=reference.prefill_attention,
    kernels=[
        Kernel(
            "cudnn",
            _by_cudnn,
            refusal=cudnn.refusal,
            is_faster=cudnn.is_faster,
            has_interpreter=False,
        ),
        _TRITON,
    ],
)


def prefill_attention(
    q: Float[Array, "B T Nq width"],
    cache: Cache,
    page_table: Int[Array, "B pages"] | None,
    positions: Int[Array, "B T"],
    *,
    sliding_window: int | None = None,
    scale: float = 1.0,
    segment_ids: SegmentIds | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T Nq D"]:
    """softmax(scale q k^T + mask) v over the cache, which holds the new tokens already.

    What `decode_attention` computes, by the same rules, for any number of tokens: a token at
    position p sees the keys at positions 0 .. p, with a window the last `sliding_window` of them,
    and position p of a sequence lies in slot p mod C of its C slots. So a prompt may come in
    chunks, each after what the cache holds of it. Scores are never all there at once; what grows
    with T and the context is nothing but the arguments and the result.

    Args:
        q: [B, T, Nq, D], or for a compact cache the absorbed query [B, T, Nq, D + R], as
            `qkv_norm_rope_write` returns it.
        cache: Nkv divides Nq.
        page_table: int32 [B, pages], pages of each sequence in order, -1 where it has none; of a
            multiple of 16 slots, 16 to 256. None: sequence b has page b, as in contiguous and ring
            caches.
        positions: int32 [B, T], -1 for padding, which may be anywhere, -2 for a token that has no
            slot. The others must have been written, and so must what lies between them.
        sliding_window: keys that a token sees, its own included; None: all.
        scale: of the scores; 1 in Gemma 4.
        segment_ids: int32 [B, T] and [B, C], with which a token sees only keys of its own id: a row
            has several sequences, as packed for training. XLA computes it. None: a row has one.
        implementation: None (on an NVIDIA GPU of compute capability 8.0 or higher the kernel, or
            cuDNN for a prompt of 4096 tokens or more from position 0 in a contiguous `KVCache` of
            bfloat16 or float16 with a head_dim that it takes: up to 256, on 8.x 128; else XLA),
            "triton" (the kernel), "cudnn" (where positions start at 0, which a program sees when it
            runs, cuDNN for any number of tokens), "xla", or "triton_interpret". float8 needs 8.9
            for the kernel.

    Returns:
        [B, T, Nq, D] in q's dtype; zeros for padding, NaN for -2.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype, or a position or page that is
            known does not exist.
        NotImplementedError: "triton" was demanded and there is no supported GPU, or not one with
            the shared memory for such heads (for some of 512 in float32 99 KiB are too little), or
            it cannot address a float8 array of 2^31 to 2^32 elements; None takes XLA then. Or a
            kernel was demanded with segment_ids.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al.,
    "FlashAttention: fast and memory-efficient exact attention with IO-awareness" (2022).
    """
    checks.check_attention(
        q, cache, page_table, positions, sliding_window=sliding_window, scale=scale
    )
    constants = {"sliding_window": sliding_window, "scale": scale}
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, q, cache, page_table)
        if _op.own(implementation) not in (None, XLA):
            raise NotImplementedError(
                f"implementation is {implementation!r}; with segment_ids accepted: None, 'xla'"
            )
        # Not through the op, whose derivative would compute all of this once more.
        return reference.prefill_attention(
            q, cache, page_table, positions, segment_ids, **constants
        )
    return _op(q, cache, page_table, positions, implementation=implementation, **constants)
