"""Speculative decoding: an assistant drafts tokens, one step of the target verifies them.

A group makes 1 to k + 1 tokens of every sequence:

    drafts, draft_probs = draft(...)        k passes of the assistant over the target's caches
    verified = verify(..., drafts)       one step of the target with k + 1 tokens

Nothing is copied or undone where drafts are refused. Their keys and values stay in the caches at
positions that no token sees: attention reads positions up to a token's own, and the next group
begins at the first of them and writes before it reads. A ring must hold a window and a whole group,
`Ring(batch, sliding_window, k + 1)` or larger: then neither a refused key lies in the slot of one
that is still seen, nor has it overwritten one.

Both are pure functions, for programs of any layout; `Generator` has the loop around them.

Letters: B sequences, k drafts of each in a group, V vocabulary, E the target's width.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2023);
`SinglePositionMultiTokenCandidateGenerator` of Hugging Face transformers 5.23.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.layout import Layout
from g4attn_jax.model.acceptance import Rule
from g4attn_jax.model.assistant import Gemma4Assistant, last_caches
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.sampling import token_log_probs

# What is tested; attention would take up to 15 (`ops.decode_attention.MAX_DECODE_TOKENS`).
MAX_DRAFT_TOKENS = 8


class Verified(NamedTuple):
    """What a group made.

    Attributes:
        tokens: int32 [B, k + 1], the new tokens: the drafts that stay and one more, then -1. All -1
            where the sequence has ended.
        num_accepted: int32 [B], drafts that stay; 0 where the sequence has ended.
        hidden: [B, E], the target's final hidden state of the token before the last new one, from
            which the next group drafts.
        caches: the target's.
        log_probs: float32 [B, k + 1], log-probability of each new token under the target's own
            distribution, before suppression, temperature and filters; numbers beside a token -1
            mean nothing. None unless they were wanted.
    """

    tokens: Int[Array, "B k+1"]
    num_accepted: Int[Array, " B"]
    hidden: Float[Array, "B E"]
    caches: dict[int, Cache]
    log_probs: Float[Array, "B k+1"] | None = None


class DraftStatistics(NamedTuple):
    """What became of drafts, by sequence.

    Attributes:
        steps: int [B], steps of the target.
        drafted: int [B], drafts that they read.
        accepted: int [B], drafts that are in the answer.
        tokens: int [B], of the answer.
    """

    steps: Int[np.ndarray, " B"]
    drafted: Int[np.ndarray, " B"]
    accepted: Int[np.ndarray, " B"]
    tokens: Int[np.ndarray, " B"]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted of all sequences; NaN if nothing was drafted."""
        drafted = int(self.drafted.sum())
        return int(self.accepted.sum()) / drafted if drafted else math.nan

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a sequence that a step of the target made, 1 to k + 1."""
        return int(self.tokens.sum()) / int(self.steps.sum())


def draft(
    decoder: Gemma4Decoder,
    assistant: Gemma4Assistant,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    hidden: Float[Array, "B E"],
    caches: Mapping[int, Cache],
    layouts: Mapping[str, Layout],
    rule: Rule,
    *,
    draft_tokens: int,
) -> tuple[Int[Array, "B k"], Any]:
    """Drafts of the tokens that follow every sequence's last.

    The assistant reads [embedding of `token`; `hidden`] and drafts one token; then the embedding of
    that and its own hidden state, and so on, always at the same position and over the same caches.

    Args:
        decoder: the target.
        assistant: that was made for it.
        token: int32 [B], the last of each sequence, which is not in the caches yet.
        position: int32 [B], where it is; -1 where the sequence has ended. At position 0 there is no
            hidden state to draft from, and drafts are worth nothing.
        hidden: [B, E], the target's final hidden state of the token before.
        caches: the target's, of all tokens before.
        layouts: that they were made with.
        rule: `Greedy` or `RejectionSampling`.
        draft_tokens: k, 1 to 8.

    Returns:
        (drafts, draft_probs): int32 [B, k], and what `verify` is to be told of them, [B, k, ...].

    Raises:
        ValueError: an argument has the wrong shape or dtype, draft_tokens is not accepted, or as
            `Gemma4Assistant` raises.
    """
    check_draft_tokens(draft_tokens)
    _check(token=token, position=position)
    read, k_norms = last_caches(decoder, caches)
    plans = assistant.plan(position[:, None], layouts)

    def one(carry, at):
        token, hidden = carry
        embeddings = decoder.embed_tokens(token[:, None])
        logits, hidden = assistant.step(embeddings, hidden, plans, read, k_norms)
        token, draft_probs = rule.draft(logits[:, 0], at)
        return (token, hidden), (token, draft_probs)

    follows = position + jnp.arange(draft_tokens, dtype=jnp.int32)[:, None]
    start = token.astype(jnp.int32), hidden[:, None].astype(assistant.dtype)
    # A loop of known length: a pass is compiled once, and a GPU does not wait for the host in it.
    _, drafted = jax.lax.scan(one, start, follows)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)


def verify(
    decoder: Gemma4Decoder,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    drafts: Int[Array, "B k"],
    draft_probs: Any,
    num_drafts: Int[Array, " B"],
    caches: Mapping[int, Cache],
    layouts: Mapping[str, Layout],
    rule: Rule,
    *,
    with_log_probs: bool = False,
) -> Verified:
    """One step of the target: the last token of each sequence and its drafts. k may be 0.

    Args:
        decoder: the target.
        token: int32 [B], the last of each sequence, which is not in the caches yet.
        position: int32 [B], where it is; -1 where the sequence has ended.
        drafts: int32 [B, k], of `draft`; k is 0 to 8.
        draft_probs: of `draft`.
        num_drafts: int32 [B], 0 or more: how many of them there is room for; all k are read if it
            is more. The last read is at position + num_drafts, which must have a slot.
        caches: of all tokens before. Donate them to a jitted step to update them in place.
        layouts: that they were made with.
        rule: that the drafts were made with.
        with_log_probs: whether `Verified.log_probs` is wanted.

    Raises:
        ValueError: an argument has the wrong shape or dtype, or as `Gemma4Decoder` raises.
    """
    _check(token=token, position=position, drafts=drafts, num_drafts=num_drafts)
    index = jnp.arange(drafts.shape[1] + 1, dtype=jnp.int32)
    num_drafts = jnp.minimum(num_drafts, drafts.shape[1])
    goes_on = position[:, None] >= 0
    is_read = goes_on & (index <= num_drafts[:, None])
    hidden, caches = decoder.hidden(
        jnp.concatenate([token[:, None], drafts], axis=1),
        jnp.where(is_read, position[:, None] + index, -1),
        caches,
        layouts,
    )
    logits = decoder.logits(hidden)
    num_accepted, last = rule.accept(logits, drafts, draft_probs, num_drafts, position)
    drafts_and_last = jnp.pad(drafts, ((0, 0), (0, 1)))
    count = num_accepted[:, None]
    tokens = jnp.where(index < count, drafts_and_last, jnp.where(index == count, last[:, None], -1))
    return Verified(
        tokens=jnp.where(goes_on, tokens, -1),
        num_accepted=jnp.where(goes_on[:, 0], num_accepted, 0),
        hidden=jnp.take_along_axis(hidden, count[..., None], axis=1)[:, 0],
        caches=caches,
        log_probs=token_log_probs(logits, tokens) if with_log_probs else None,
    )


def check_draft_tokens(draft_tokens: int) -> None:
    """Refuses what is no number of drafts.

    Raises:
        ValueError: saying what is accepted.
    """
    is_int = isinstance(draft_tokens, (int, np.integer)) and not isinstance(draft_tokens, bool)
    if not is_int or not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"draft_tokens is {draft_tokens!r}; accepted: an integer from 1 to {MAX_DRAFT_TOKENS}"
        )


def _check(**arrays):
    """Refuses what is not one integer of every sequence, or of `drafts` up to 8."""
    batch = "B"
    for name, array in arrays.items():
        shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", None)
        is_of_drafts = name == "drafts"
        fits = len(shape) == 1 + is_of_drafts and batch in ("B", shape[0])
        if is_of_drafts:
            fits = fits and shape[1] <= MAX_DRAFT_TOKENS
        if not fits or not jnp.issubdtype(dtype, jnp.integer):
            accepted = f"[{batch}, 0 to {MAX_DRAFT_TOKENS}]" if is_of_drafts else f"[{batch}]"
            raise ValueError(
                f"{name} is a {type(array).__name__} of shape {shape} and dtype {dtype}; "
                f"accepted: integer {accepted}"
            )
        batch = shape[0]
