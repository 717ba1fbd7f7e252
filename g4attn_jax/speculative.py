"""Speculative decoding: an assistant drafts tokens, one step of the target verifies them.

A group makes 1 to k + 1 tokens of every sequence:

    drafts = draft(decoder, assistant, last, cache, rule, draft_tokens=k)
    verified = verify(decoder, last, drafts, cache, rule)

Drafting takes k passes of the assistant over the target's cache, verifying one step of the target
with k + 1 tokens.

Nothing is copied or undone where drafts are refused. Their keys and values stay in the cache at
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
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from g4attn_jax.checks import check_array, check_integer, check_type
from g4attn_jax.model.acceptance import Rule
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.sampling import token_log_probs
from g4attn_jax.model.step import ModelCache

# What is tested; attention would take up to 15 (`ops.decode_attention.MAX_DECODE_TOKENS`).
MAX_DRAFT_TOKENS = 8


class LastTokens(NamedTuple):
    """The last token of every sequence, which is not in the cache yet.

    Attributes:
        token: int32 [B].
        position: int32 [B], where it is; -1 where the sequence has ended.
        hidden: [B, E], the target's final hidden state of the token before; None where nothing is
            drafted.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    hidden: Float[Array, "B E"] | None = None


class Drafts(NamedTuple):
    """Tokens that may follow every sequence's last.

    Attributes:
        tokens: int32 [B, k].
        probs: what the rule is to be told of them, [B, k, ...], or None.
        count: int32 [B], 0 or more: how many of them are read; all k are if it is more.
    """

    tokens: Int[Array, "B k"]
    probs: Any
    count: Int[Array, " B"]

    @classmethod
    def none(cls, batch: int) -> Self:
        """No drafts (k = 0)."""
        return cls(jnp.zeros((batch, 0), jnp.int32), None, jnp.zeros(batch, jnp.int32))

    def at_most(self, count: Int[Array, " B"]) -> Self:
        """The drafts of which no more than `count` of each sequence are read."""
        return self._replace(count=jnp.clip(count, 0, self.count))


class Verified(NamedTuple):
    """Outcome of a group.

    Attributes:
        tokens: int32 [B, k + 1], the new tokens: the drafts that stay and one more, then -1. All -1
            where the sequence has ended.
        num_accepted: int32 [B], drafts that stay; 0 where the sequence has ended.
        hidden: [B, E], the target's final hidden state of the token before the last new one, from
            which the next group drafts.
        cache: the target's.
        log_probs: float32 [B, k + 1], log-probability of each new token under the target's own
            distribution, before suppression, temperature and filters; numbers beside a token -1
            mean nothing. None unless they were wanted.
    """

    tokens: Int[Array, "B k+1"]
    num_accepted: Int[Array, " B"]
    hidden: Float[Array, "B E"]
    cache: ModelCache
    log_probs: Float[Array, "B k+1"] | None = None


class DraftStatistics(NamedTuple):
    """Numbers of steps, drafts and tokens, by sequence.

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
    last: LastTokens,
    cache: ModelCache,
    rule: Rule,
    *,
    draft_tokens: int,
    page_tables: Mapping[str, Int[Array, "B pages"]] | None = None,
) -> Drafts:
    """Drafts of the tokens that follow every sequence's last.

    The assistant reads [embedding of the token; hidden] and drafts one token; then the embedding of
    that and its own hidden state, and so on, always at the same position and over the same cache.

    Args:
        decoder: the target.
        assistant: that was made for it.
        last: of each sequence, with the hidden state. At position 0 there is none to draft from,
            and drafts are worth nothing.
        cache: the target's, of all tokens before.
        rule: `Greedy` or `RejectionSampling`.
        draft_tokens: k, 1 to 8.
        page_tables: see `Gemma4Decoder.plan`.

    Raises:
        ValueError: an argument has the wrong shape or dtype, draft_tokens is not accepted, or as
            `Gemma4Assistant` raises.
    """
    check_integer("draft_tokens", draft_tokens, most=MAX_DRAFT_TOKENS)
    batch = _check_last(last)
    check_array("last.hidden", last.hidden, (batch, "E"), "floating")
    check_type("cache", cache, ModelCache)
    step = assistant.plan(last.position[:, None], cache, page_tables)
    readable = decoder.readable(cache)

    def one(carry, at):
        token, hidden = carry
        with jax.named_scope("embed"):
            embeddings = decoder.embed_tokens(token[:, None])
        logits, hidden = assistant(embeddings, hidden, step, readable)
        with jax.named_scope("sample"):
            token, draft_probs = rule.draft(logits[:, 0], at)
        return (token, hidden), (token, draft_probs)

    with jax.named_scope("draft"):
        follows = last.position + jnp.arange(draft_tokens, dtype=jnp.int32)[:, None]
        start = last.token.astype(jnp.int32), last.hidden[:, None].astype(assistant.dtype)
        # A loop of known length: a pass is compiled once, and a GPU does not wait for the host.
        _, drafted = jax.lax.scan(one, start, follows)
        tokens, probs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)
    return Drafts(tokens, probs, jnp.full(batch, draft_tokens, jnp.int32))


def verify(
    decoder: Gemma4Decoder,
    last: LastTokens,
    drafts: Drafts,
    cache: ModelCache,
    rule: Rule,
    *,
    page_tables: Mapping[str, Int[Array, "B pages"]] | None = None,
    with_log_probs: bool = False,
) -> Verified:
    """One step of the target: the last token of each sequence and its drafts. k may be 0.

    Args:
        decoder: the target.
        last: of each sequence.
        drafts: of `draft`, or `Drafts.none`. The last that counts is at position + count, which
            must have a slot.
        cache: of all tokens before. Donate it to a jitted step to update it in place.
        rule: that the drafts were made with.
        page_tables: see `Gemma4Decoder.plan`.
        with_log_probs: whether `Verified.log_probs` is wanted.

    Raises:
        ValueError: an argument has the wrong shape or dtype, or as `Gemma4Decoder` raises.
    """
    batch = _check_last(last)
    check_array("drafts.tokens", drafts.tokens, (batch, range(MAX_DRAFT_TOKENS + 1)), "integer")
    check_array("drafts.count", drafts.count, (batch,), "integer")
    num_drafts = jnp.minimum(drafts.count, drafts.tokens.shape[1])
    index = jnp.arange(drafts.tokens.shape[1] + 1, dtype=jnp.int32)
    goes_on = last.position[:, None] >= 0
    is_read = goes_on & (index <= num_drafts[:, None])
    positions = jnp.where(is_read, last.position[:, None] + index, -1)
    with jax.named_scope("verify"):
        step = decoder.plan(positions, cache, page_tables)
        tokens = jnp.concatenate([last.token[:, None], drafts.tokens], axis=1)
        hidden, cache = decoder.hidden(tokens, step, cache)
        logits = decoder.logits(hidden)
    with jax.named_scope("sample"):
        num_accepted, following = rule.accept(
            logits, drafts.tokens, drafts.probs, num_drafts, last.position
        )
        count = num_accepted[:, None]
        one_more = jnp.where(index == count, following[:, None], -1)
        tokens = jnp.where(index < count, jnp.pad(drafts.tokens, ((0, 0), (0, 1))), one_more)
        log_probs = token_log_probs(logits, tokens) if with_log_probs else None
    return Verified(
        tokens=jnp.where(goes_on, tokens, -1),
        num_accepted=jnp.where(goes_on[:, 0], num_accepted, 0),
        hidden=jnp.take_along_axis(hidden, count[..., None], axis=1)[:, 0],
        cache=cache,
        log_probs=log_probs,
    )


def _check_last(last):
    """The number of sequences."""
    check_array("last.token", last.token, ("B",), "integer")
    [batch] = last.token.shape
    check_array("last.position", last.position, (batch,), "integer")
    return batch
