"""What `Generator` runs on the device: chunks of prompts, and steps until all have stopped."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.layout import Contiguous, Layout, Ring
from g4attn_jax.model.acceptance import Rule
from g4attn_jax.model.sampling import token_log_probs
from g4attn_jax.speculative import DraftStatistics, Verified, draft, verify

# The most steps between two looks of the host, during which the device has nothing to do.
MAX_STEPS = 32
# The most slots of all sequences together, which are numbered in int32; see `g4attn_jax.layout`.
MAX_SLOTS = 2**31 - 1
# Tokens whose logits are held at a time: float32 of a vocabulary of 262144 are 128 MiB.
_ROWS_OF_LOGITS = 128


class Sequences(NamedTuple):
    """What goes from step to step beside the caches.

    Attributes:
        token: int32 [B], the last token of each sequence, which is not in the caches yet.
        position: int32 [B], where it is; -1 where the sequence has stopped.
        hidden: [B, E], the decoder's final hidden state of the token before; None without an
            assistant.
        statistics: so far; None without an assistant.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    hidden: Float[Array, "B E"] | None
    statistics: DraftStatistics | None

    def advance(
        self,
        verified: Verified,
        num_drafts: Int[Array, " B"],
        end: Int[Array, " B"],
        stops: Bool[Array, " V"],
    ) -> tuple[Int[Array, "B k+1"], Self]:
        """The new tokens of a step, none after a stop token, and the sequences with them."""
        is_stop = (verified.tokens >= 0) & stops[verified.tokens]
        comes_after = jnp.cumsum(is_stop, axis=1) - is_stop > 0
        new = jnp.where(comes_after, -1, verified.tokens)
        count = jnp.sum(new >= 0, axis=1, dtype=jnp.int32)
        last = jnp.take_along_axis(new, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        token = jnp.where(count > 0, last, self.token)
        position = self.position + count
        has_ended = (self.position < 0) | (position >= end) | is_stop.any(axis=1)
        hidden, statistics = self.hidden, self.statistics
        if statistics is not None:
            hidden = verified.hidden
            made = DraftStatistics(
                steps=self.position >= 0,
                drafted=num_drafts,
                accepted=jnp.minimum(verified.num_accepted, count),
                tokens=count,
            )
            statistics = jax.tree.map(jnp.add, statistics, made)
        position = jnp.where(has_ended, -1, position)
        return new, Sequences(token, position, hidden, statistics)


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """Pure functions of the weights. They hold none, so that these go with the generator.

    Letters: B sequences, T tokens of a chunk, k drafts in a step, V vocabulary.
    """

    graph: nnx.GraphDef
    sliding_window: int
    forms: Mapping[str, type[Cache]]
    cache_dtype: jax.typing.DTypeLike | None
    capacity: int
    chunk_tokens: int
    draft_tokens: int

    def empty_caches(self, params: nnx.State, batch: int) -> dict[int, Cache]:
        """The caches of `batch` sequences."""
        decoder, _ = nnx.merge(self.graph, params)
        return decoder.init_caches(self._layouts(batch), self.forms, dtype=self.cache_dtype)

    def prefill(
        self,
        params: nnx.State,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        caches: dict[int, Cache],
    ) -> dict[int, Cache]:
        """The caches with a chunk of every prompt."""
        decoder, _ = nnx.merge(self.graph, params)
        batch = tokens.shape[0]
        nowhere = jnp.zeros((batch, 0), jnp.int32)
        layouts = self._layouts(batch)
        return decoder.hidden(tokens, positions, caches, layouts, logits_at=nowhere)[1]

    def decode(
        self,
        params: nnx.State,
        sequences: Sequences,
        caches: dict[int, Cache],
        begin: Int[Array, " B"],
        end: Int[Array, " B"],
        steps: Int[Array, ""],
        stops: Bool[Array, " V"],
        rule: Rule,
        *,
        with_log_probs: bool = False,
    ):
        """Up to `steps` steps, fewer if all sequences stop.

        Args:
            params: of the models.
            sequences: see there.
            caches: donated.
            begin: the position of the last token of each prompt.
            end: the position of the last token that each sequence may have.
            steps: up to 32.
            stops: which tokens end a sequence.
            rule: how tokens are chosen.
            with_log_probs: whether log-probabilities are wanted.

        Returns:
            ((made, log_probs, sequences), caches): made [B, 32, k + 1], the new tokens of each
            step, -1 where there is none; log_probs float32 [B, 32, k + 1], of these tokens as in
            `Verified`, or None; the others as above.
        """
        batch = sequences.token.shape[0]
        layouts = self._layouts(batch)

        def goes_on(carry):
            step, _, _, sequences, _ = carry
            return (step < steps) & (sequences.position >= 0).any()

        def one(carry):
            step, made, log_probs, sequences, caches = carry
            # On a CPU, XLA converts bfloat16 weights to float32 for a matmul. Without the barrier
            # it does so before the loop, and holds all of them.
            weights, sequences = jax.lax.optimization_barrier((params, sequences))
            decoder, assistant = nnx.merge(self.graph, weights)
            token, position, hidden, _ = sequences
            drafts, draft_probs = jnp.zeros((batch, 0), jnp.int32), None
            if assistant is not None:
                of_target = token, position, hidden, caches, layouts
                drafts, draft_probs = draft(
                    decoder, assistant, *of_target, rule, draft_tokens=self.draft_tokens
                )
            # The first step has no hidden state to draft from; tokens past the end have no room.
            room = jnp.where(position > begin, end - position - 1, 0)
            num_drafts = jnp.clip(room, 0, self.draft_tokens)
            of_drafts = drafts, draft_probs, num_drafts
            verified = verify(
                *(decoder, token, position, *of_drafts, caches, layouts, rule),
                with_log_probs=with_log_probs,
            )
            new, sequences = sequences.advance(verified, num_drafts, end, stops)
            made = made.at[:, step].set(new)
            if with_log_probs:
                log_probs = log_probs.at[:, step].set(verified.log_probs)
            return step + 1, made, log_probs, sequences, verified.caches

        made = jnp.full((batch, MAX_STEPS, self.draft_tokens + 1), -1, jnp.int32)
        log_probs = jnp.zeros(made.shape, jnp.float32) if with_log_probs else None
        start = jnp.int32(0), made, log_probs, sequences, caches
        _, *of_steps, caches = jax.lax.while_loop(goes_on, one, start)
        return tuple(of_steps), caches

    def score(
        self,
        params: nnx.State,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        following: Int[Array, "B T"],
        caches: dict[int, Cache],
    ) -> tuple[Float[Array, "B T"], dict[int, Cache]]:
        """The log-probability of the token that follows each one of a chunk, and the caches.

        Logits are made of a few tokens at a time, `_ROWS_OF_LOGITS`.
        """
        decoder, _ = nnx.merge(self.graph, params)
        layouts = self._layouts(tokens.shape[0])
        hidden, caches = decoder.hidden(tokens, positions, caches, layouts)
        rows = min(_ROWS_OF_LOGITS, tokens.size)
        padding = -tokens.size % rows
        hidden = jnp.pad(hidden.reshape(tokens.size, -1), ((0, padding), (0, 0)))
        of_rows = hidden.reshape(-1, rows, hidden.shape[-1])
        following_of_rows = jnp.pad(following.reshape(-1), (0, padding)).reshape(-1, rows)

        def one(part):
            hidden, following = part
            return token_log_probs(decoder.logits(hidden[None])[0], following)

        scores = jax.lax.map(one, (of_rows, following_of_rows)).reshape(-1)
        return scores[: tokens.size].reshape(tokens.shape), caches

    def _layouts(self, batch: int) -> dict[str, Layout]:
        full = Contiguous(batch, self.capacity)
        sliding, step = full, max(self.chunk_tokens, self.draft_tokens + 1)
        # Of a much larger one the slots may be too many to be numbered.
        if self.sliding_window + step < self.capacity:
            ring = Ring(batch, self.sliding_window, step)
            sliding = ring if ring.capacity < full.capacity else full
        return {"full_attention": full, "sliding_attention": sliding}
