"""Rules that choose the tokens of a step and accept drafts.

A rule has two methods. `draft` chooses a token from the assistant's logits, `accept` compares all
drafts of a step with the target's logits and chooses the token after the last one that stays.
Rules are pytrees: under `jax.jit` one rule's numbers can change without compiling again.

Letters: B sequences, k drafts of a sequence in a step, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from g4attn_jax.model.sampling import scaled_logits, without_suppressed

# Folded into a sequence's key they are the keys of its drafts and of their acceptance. No position
# is as large, so neither is the key of a token.
_OF_DRAFTS, _OF_ACCEPTANCE = 2**32 - 1, 2**32 - 2


class Rule(Protocol):
    """Choice of a step's tokens."""

    def draft(
        self, logits: Float[Array, "B V"], position: Int[Array, " B"]
    ) -> tuple[Int[Array, " B"], Any]:
        """The token that is to follow each position.

        Args:
            logits: float32 [B, V], the assistant's.
            position: integer [B].

        Returns:
            (token, draft_probs): int32 [B], and the probabilities [B, V] that it was drawn with, or
            None.
        """

    def accept(
        self,
        logits: Float[Array, "B k+1 V"],
        drafts: Int[Array, "B k"],
        draft_probs: Any,
        num_drafts: Int[Array, " B"],
        position: Int[Array, " B"],
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Counts the drafts that stay, and chooses the token after them.

        Args:
            logits: float32 [B, k + 1, V], the target's: row i is of what follows position + i.
            drafts: int32 [B, k], draft i the one to follow position + i.
            draft_probs: what `draft` said of them, [B, k, ...], or None.
            num_drafts: int32 [B], 0 to k: of the others nothing is to be known.
            position: integer [B], of the token before the drafts.

        Returns:
            (num_accepted, token): int32 [B], up to num_drafts, and int32 [B].
        """


class Greedy(NamedTuple):
    """The likeliest token; drafts stay as long as each is the target's likeliest.

    Attributes:
        suppressed: [V], tokens that are neither drafted nor chosen; None is none, and known to be
            when compiling.
    """

    suppressed: Bool[Array, " V"] | None = None

    def draft(self, logits, position):
        """The likeliest token, the first of several, and no draft_probs."""
        return self._best(logits), None

    def accept(self, logits, drafts, draft_probs, num_drafts, position):
        """Accepts drafts as long as each is the likeliest token; the likeliest one follows."""
        best = self._best(logits)
        num_accepted = _count_first(drafts == best[:, :-1], num_drafts)
        return num_accepted, _row(best, num_accepted)

    def _best(self, logits):
        logits = without_suppressed(logits, self.suppressed)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


class RejectionSampling(NamedTuple):
    """Tokens drawn from a distribution, which drafts do not change.

        draft d ~ q,   stays if u q(d) < p(d)        p and q: of `Sampling`, the target's and the
        else the token ~ max(p - q, 0) / its sum              assistant's; u uniform in [0, 1)
        after the last draft, if all stay: the token ~ p

    So a token is t with probability min(p, q)(t) + max(p - q, 0)(t) = p(t). The token that follows
    position n is drawn with the sequence's key folded with n, its draft and u with keys of other
    streams, folded with n too: no number that a choice was made of is used for another one.

    Attributes:
        temperature: above 0.
        top_k: None is off, and known to be when compiling.
        top_p: as top_k.
        keys: [B], of the sequences, of impl threefry2x32: others draw for all of them by the
            first.
        suppressed: [V], tokens of probability 0 in p and q; None is none, and known to be when
            compiling.

    Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2023).
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    keys: PRNGKeyArray
    suppressed: Bool[Array, " V"] | None = None

    def draft(self, logits, position):
        """A token drawn from q, and q [B, V]."""
        scaled = self._scaled(logits)
        token = _draw(_fold(self._stream(_OF_DRAFTS), position), scaled)
        # Of an assistant that knows few tokens all may be suppressed: then q is 0, and no draft is.
        return token, jnp.where(jnp.isfinite(scaled), jax.nn.softmax(scaled, axis=-1), 0)

    def accept(self, logits, drafts, draft_probs, num_drafts, position):
        """See above."""
        scaled = self._scaled(logits)
        if not drafts.shape[1]:
            return jnp.zeros_like(num_drafts), _draw(_fold(self.keys, position), scaled[:, 0])
        p, q = jax.nn.softmax(scaled, axis=-1), draft_probs
        p_of_draft, q_of_draft = (
            jnp.take_along_axis(x[:, : drafts.shape[1]], drafts[..., None], axis=-1)[..., 0]
            for x in (p, q)
        )
        stays = self._uniform(position, drafts.shape[1]) * q_of_draft < p_of_draft
        stays &= q_of_draft > 0
        num_accepted = _count_first(stays, num_drafts)
        # Of the draft that goes; the last one stands in where none does.
        left = jnp.maximum(_row(p, num_accepted) - _row(q, num_accepted, mode="clip"), 0)
        # Where p and q are equal but for rounding nothing may be left to draw from.
        is_p = (num_accepted == num_drafts)[:, None] | ~left.any(axis=-1, keepdims=True)
        scaled = jnp.where(is_p, _row(scaled, num_accepted), jnp.log(left))
        return num_accepted, _draw(_fold(self.keys, position + num_accepted), scaled)

    def _scaled(self, logits):
        logits = without_suppressed(logits, self.suppressed)
        return scaled_logits(logits, self.temperature, self.top_k, self.top_p)

    def _stream(self, number):
        return jax.vmap(jax.random.fold_in, (0, None))(self.keys, jnp.uint32(number))

    def _uniform(self, position, k):
        """[B, k], by the position before each draft."""
        keys = self._stream(_OF_ACCEPTANCE)
        by_draft = jax.vmap(lambda i: jax.vmap(jax.random.uniform)(_fold(keys, position + i)))
        return by_draft(jnp.arange(k)).T


def _fold(keys: PRNGKeyArray, position: Int[Array, " B"]) -> PRNGKeyArray:
    return jax.vmap(jax.random.fold_in)(keys, position)


def _draw(keys: PRNGKeyArray, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """A token of each sequence, whatever the others are."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _count_first(stays: Bool[Array, "B k"], num_drafts: Int[Array, " B"]) -> Int[Array, " B"]:
    """Number of drafts before the first that is refused, of the first `num_drafts`."""
    stays &= jnp.arange(stays.shape[1]) < num_drafts[:, None]
    stays = jnp.cumprod(stays.astype(jnp.int32), axis=1)
    return jnp.sum(stays, axis=1, dtype=jnp.int32)


def _row(array: Array, index: Int[Array, " B"], mode: str | None = None) -> Array:
    """Row `index[b]` of each sequence's rows [B, rows, ...]."""
    index = index.reshape(-1, *[1] * (array.ndim - 1))
    return jnp.take_along_axis(array, index, axis=1, mode=mode)[:, 0]
