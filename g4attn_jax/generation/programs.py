"""Programs that `Generator` runs on the device: chunks of prompts, and steps until all stop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from g4attn_jax.cache import Cache
from g4attn_jax.layout import Contiguous, Layout, Ring
from g4attn_jax.model.acceptance import Rule
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.sampling import token_log_probs
from g4attn_jax.model.step import ModelCache
from g4attn_jax.speculative import Drafts, DraftStatistics, LastTokens, Verified, draft, verify

Weights = tuple[Array, ...]

# The most steps between two looks of the host, during which the device has nothing to do.
MAX_STEPS = 32
# The most slots of all sequences together, which are numbered in int32; see `g4attn_jax.layout`.
MAX_SLOTS = 2**31 - 1
# Tokens whose logits are held at a time: float32 of a vocabulary of 262144 are 128 MiB.
_ROWS_OF_LOGITS = 128


class Sequences(NamedTuple):
    """State of the sequences that goes from step to step beside the cache.

    Attributes:
        last: the last token of each sequence; its position is -1 where the sequence has stopped.
        statistics: of drafts so far; None without an assistant.
    """

    last: LastTokens
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
        newest = jnp.take_along_axis(new, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        position = self.last.position + count
        has_ended = (self.last.position < 0) | (position >= end) | is_stop.any(axis=1)
        last = LastTokens(
            token=jnp.where(count > 0, newest, self.last.token),
            position=jnp.where(has_ended, -1, position),
            hidden=None if self.last.hidden is None else verified.hidden,
        )
        return new, Sequences(last, self._statistics(verified, num_drafts, count))

    def _statistics(self, verified, num_drafts, count):
        if self.statistics is None:
            return None
        made = DraftStatistics(
            steps=self.last.position >= 0,
            drafted=num_drafts,
            accepted=jnp.minimum(verified.num_accepted, count),
            tokens=count,
        )
        return jax.tree.map(jnp.add, self.statistics, made)


class Limits(NamedTuple):
    """Positions at which sequences begin and end, and tokens that end them.

    Attributes:
        begin: int32 [B], the position of the last token of each prompt.
        end: int32 [B], the position of the last token that each sequence may have.
        stops: bool [V], which tokens end a sequence.
    """

    begin: Int[Array, " B"]
    end: Int[Array, " B"]
    stops: Bool[Array, " V"]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """Pure functions of the weights. They hold none, so that these go with the generator.

    Letters: B sequences, T tokens of a chunk, k drafts in a step, V vocabulary.

    Attributes:
        merge: makes (decoder, assistant) of flat weights, see `split_weights`.
        sliding_window: of the decoder.
        forms: of caches, by layer type.
        cache_dtype: see `Gemma4Decoder.init_cache`.
        capacity: slots of each sequence.
        chunk_tokens: the most tokens of a chunk.
        draft_tokens: the most drafts in a step; 0 without an assistant.
    """

    merge: Callable[[Weights], tuple[Gemma4Decoder, Gemma4Assistant | None]]
    sliding_window: int
    forms: Mapping[str, type[Cache]]
    cache_dtype: jax.typing.DTypeLike | None
    capacity: int
    chunk_tokens: int
    draft_tokens: int

    def empty_cache(self, weights: Weights, batch: int) -> ModelCache:
        """The cache of `batch` sequences."""
        decoder, _ = self.merge(weights)
        layouts = self._layouts(batch)
        layouts = {layer_type: layouts[layer_type] for layer_type in decoder.config.layer_types}
        return decoder.init_cache(layouts, self.forms, dtype=self.cache_dtype)

    def prefill(
        self,
        weights: Weights,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: ModelCache,
    ) -> ModelCache:
        """The cache with a chunk of every prompt."""
        decoder, _ = self.merge(weights)
        nowhere = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        step = decoder.plan(positions, cache)
        return decoder.hidden(tokens, step, cache, logits_at=nowhere)[1]

    def decode(
        self,
        weights: Weights,
        sequences: Sequences,
        cache: ModelCache,
        limits: Limits,
        steps: Int[Array, ""],
        rule: Rule,
        *,
        with_log_probs: bool = False,
    ):
        """Up to `steps` steps, fewer if all sequences stop.

        Args:
            weights: of the models.
            sequences: see there.
            cache: donated.
            limits: see there.
            steps: up to 32.
            rule: how tokens are chosen.
            with_log_probs: whether log-probabilities are wanted.

        Returns:
            ((made, log_probs, sequences), cache): made [B, 32, k + 1], the new tokens of each
            step, -1 where there is none; log_probs float32 [B, 32, k + 1], of these tokens as in
            `Verified`, or None; the others as above.
        """
        batch = sequences.last.token.shape[0]

        def goes_on(carry):
            step, _, _, sequences, _ = carry
            return (step < steps) & (sequences.last.position >= 0).any()

        def one(carry):
            step, made, log_probs, sequences, cache = carry
            # On a CPU, XLA converts bfloat16 weights to float32 for a matmul. Without the barrier
            # it does so before the loop, and holds all of them.
            held, sequences = jax.lax.optimization_barrier((weights, sequences))
            verified, num_drafts = self._step(
                *(held, sequences.last, cache, limits, rule), with_log_probs=with_log_probs
            )
            new, sequences = sequences.advance(verified, num_drafts, limits.end, limits.stops)
            made = made.at[:, step].set(new)
            if with_log_probs:
                log_probs = log_probs.at[:, step].set(verified.log_probs)
            return step + 1, made, log_probs, sequences, verified.cache

        made = jnp.full((batch, MAX_STEPS, self.draft_tokens + 1), -1, jnp.int32)
        log_probs = jnp.zeros(made.shape, jnp.float32) if with_log_probs else None
        start = jnp.int32(0), made, log_probs, sequences, cache
        _, *of_steps, cache = jax.lax.while_loop(goes_on, one, start)
        return tuple(of_steps), cache

    def _step(self, weights, last, cache, limits, rule, *, with_log_probs):
        """(verified, number of drafts) of one step."""
        decoder, assistant = self.merge(weights)
        drafts = Drafts.none(last.token.shape[0])
        if assistant is not None:
            drafts = draft(*(decoder, assistant, last, cache, rule), draft_tokens=self.draft_tokens)
        # The first step has no hidden state to draft from; tokens past the end have no room.
        room = jnp.where(last.position > limits.begin, limits.end - last.position - 1, 0)
        drafts = drafts.at_most(room)
        verified = verify(decoder, last, drafts, cache, rule, with_log_probs=with_log_probs)
        return verified, drafts.count

    def score(
        self,
        weights: Weights,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        following: Int[Array, "B T"],
        cache: ModelCache,
    ) -> tuple[Float[Array, "B T"], ModelCache]:
        """The log-probability of the token that follows each one of a chunk, and the cache.

        Logits are made of a few tokens at a time, `_ROWS_OF_LOGITS`.
        """
        decoder, _ = self.merge(weights)
        hidden, cache = decoder.hidden(tokens, decoder.plan(positions, cache), cache)
        rows = min(_ROWS_OF_LOGITS, tokens.size)
        padding = -tokens.size % rows
        hidden = jnp.pad(hidden.reshape(tokens.size, -1), ((0, padding), (0, 0)))
        of_rows = hidden.reshape(-1, rows, hidden.shape[-1])
        following_of_rows = jnp.pad(following.reshape(-1), (0, padding)).reshape(-1, rows)

        def one(part):
            hidden, following = part
            return token_log_probs(decoder.logits(hidden[None])[0], following)

        scores = jax.lax.map(one, (of_rows, following_of_rows)).reshape(-1)
        return scores[: tokens.size].reshape(tokens.shape), cache

    def _layouts(self, batch: int) -> dict[str, Layout]:
        full = Contiguous(batch, self.capacity)
        sliding, step = full, max(self.chunk_tokens, self.draft_tokens + 1)
        # Of a much larger one the slots may be too many to be numbered.
        if self.sliding_window + step < self.capacity:
            ring = Ring(batch, self.sliding_window, step)
            sliding = ring if ring.capacity < full.capacity else full
        return {"full_attention": full, "sliding_attention": sliding}
