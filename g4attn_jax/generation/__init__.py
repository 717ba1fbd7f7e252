"""From prompts to the tokens that follow them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from g4attn_jax.cache import FLOAT8, Cache, CompactKVCache
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.generation.programs import MAX_SLOTS, MAX_STEPS, Programs, Sequences
from g4attn_jax.generation.prompts import as_list, check_prompts, check_tokens, chunks
from g4attn_jax.model.acceptance import Drawn, Greedy, Rule
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.sampling import Sampling
from g4attn_jax.speculative import DraftStatistics, check_draft_tokens

_GREEDY = Sampling()
# Drafts in a step unless told otherwise: what `bench/speculative.py` measures.
_DRAFT_TOKENS = 4


class Generator:
    """Continues prompts with a decoder, by programs that are compiled once.

        generator = Generator(decoder, capacity=4096)
        [answer] = generator([prompt], 100, stop_tokens=[1, 106])

    All tokens of a prompt but the last go through the decoder in chunks and need no logits: the
    head is not run, nor are the KV-shared layers. Then one program takes steps of one token a
    sequence, the last of the prompt first, and stays on the device until all sequences have
    stopped, or for 1, 2, 4 ... 32, 32 ... steps, after which the host sees what was made. Caches
    are donated from program to program: of sliding layers rings of the window and a chunk, of full
    ones `capacity` slots a sequence.

    Programs are compiled where they are first needed, for a number of sequences: one for each size
    of chunk, which is `chunk_tokens` and for the rest of a prompt a power of two of 16 or more; one
    for the steps, greedy or not, with or without top-k and top-p. Prompts of another length in the
    same sizes, another max_new_tokens, other stop tokens, keys and sampling parameters compile
    nothing.

    With an assistant a step is a group of `g4attn_jax.speculative`: the assistant drafts tokens,
    the decoder reads all of them at once, and a sequence gets 1 to draft_tokens + 1 tokens. The
    first step of a call reads no drafts, for want of the hidden state that they are made of, and no
    draft goes past max_new_tokens. What is generated stays the same: the same tokens if sampling is
    greedy (but for ties that products of more tokens round in another way), else tokens of the same
    distribution.

    Sequences do not depend on each other, except that matmuls of another size may round in another
    order.

    Attributes:
        capacity: the most tokens of a prompt and what follows it.
        chunk_tokens: the most tokens of a prompt in one chunk.
        draft_tokens: the most drafts in a step; 0 without an assistant.
    """

    def __init__(
        self,
        decoder: Gemma4Decoder,
        *,
        capacity: int,
        forms: Mapping[str, type[Cache]] | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
        chunk_tokens: int = 512,
        assistant: Gemma4Assistant | None = None,
        draft_tokens: int | None = None,
    ):
        """Takes the weights that the models have now; compiles nothing yet.

        Args:
            decoder: the model.
            capacity: the most tokens of a prompt and what follows it, below 2^31.
            forms: of caches, by layer type; where none is named, `CompactKVCache` for full layers
                with K = V and `KVCache` for others.
            cache_dtype: of caches, see `Gemma4Attention.init_cache`.
            chunk_tokens: the most tokens of a prompt in one chunk, below 2^31. More use the device
                better, and take memory for activations and rings.
            assistant: drafts tokens; None: one token a step.
            draft_tokens: with an assistant the most drafts in a step, 1 to 8; 4 if left out.

        Raises:
            ValueError: an argument is none that is accepted, the assistant is not one for this
                decoder or has another dtype, or as `Gemma4Decoder.init_caches` raises. The message
                names it.
        """
        if not isinstance(decoder, Gemma4Decoder):
            raise ValueError(f"decoder is a {type(decoder).__name__}; accepted: Gemma4Decoder")
        _check_number("capacity", capacity, MAX_SLOTS)
        _check_number("chunk_tokens", chunk_tokens, MAX_SLOTS)
        if forms is not None and not isinstance(forms, Mapping):
            raise ValueError(f"forms is {forms!r}; accepted: a dict by layer type, or None")
        if cache_dtype is not None:
            _check_cache_dtype(cache_dtype, decoder)
        self.capacity, self.chunk_tokens = int(capacity), int(chunk_tokens)
        self.draft_tokens = _check_assistant(decoder, assistant, draft_tokens)
        self._vocab_size = decoder.config.vocab_size
        self._hidden_size, self._dtype = decoder.config.hidden_size, decoder.dtype
        graph, params = nnx.split((decoder, assistant))
        # In variables of its own: those of the models may be set to other weights.
        self._params = jax.tree.map(lambda weight: weight, params)
        programs = Programs(
            graph=graph,
            sliding_window=decoder.config.sliding_window,
            forms=_default_forms(decoder.config) | dict(forms or {}),
            cache_dtype=cache_dtype,
            capacity=self.capacity,
            chunk_tokens=self.chunk_tokens,
            draft_tokens=self.draft_tokens,
        )
        jax.eval_shape(functools.partial(programs.empty_caches, batch=1), self._params)
        # With all weights as arguments, caches are placed as those are, and stay so.
        self._empty_caches = jax.jit(
            programs.empty_caches, static_argnames="batch", keep_unused=True
        )
        self._prefill = jax.jit(programs.prefill, donate_argnames="caches")
        self._decode = jax.jit(programs.decode, donate_argnames="caches")

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = _GREEDY,
        stop_tokens: Iterable[int] = (),
        key: PRNGKeyArray | None = None,
        on_tokens: Callable[[list[list[int]]], Any] | None = None,
        on_drafts: Callable[[DraftStatistics], Any] | None = None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt.

        Args:
            prompts: one sequence of tokens or more, of any lengths but 0.
            max_new_tokens: the most that follow a prompt.
            sampling: greedy unless told otherwise.
            stop_tokens: each ends the sequence that makes it, and is the last of it.
            key: of `jax.random`, needed unless sampling is greedy, of impl threefry2x32: one, from
                which sequence b draws as from `jax.random.fold_in(key, b)`, or one of each
                sequence, [B]. The token that follows position p is drawn with the sequence's key,
                folded with p; with an assistant it is another of the same distribution, see
                `acceptance.Drawn`.
            on_tokens: called with the new tokens of each sequence, several times; together they are
                what is returned.
            on_drafts: called at the end with what became of the drafts; with an assistant alone.

        Returns:
            The new tokens of each prompt: `max_new_tokens`, or as many as end with a stop token.

        Raises:
            ValueError: there is no prompt, or one is empty, has what is no token of the model, or
                does not fit into `capacity` together with max_new_tokens; or another argument is
                none that is accepted, or the models have no weights. The message names it.
        """
        _check_weights(self._params)
        max_new_tokens = self._check_new_tokens(max_new_tokens)
        prompts = check_prompts(prompts, self._vocab_size, self.capacity - max_new_tokens)
        if len(prompts) * self.capacity > MAX_SLOTS:
            raise ValueError(
                f"prompts has {len(prompts)}; accepted with capacity {self.capacity}: up to "
                f"{MAX_SLOTS // self.capacity}"
            )
        stops = np.zeros(self._vocab_size, bool)
        stop_tokens = as_list("stop_tokens", stop_tokens, "a sequence of tokens")
        stops[check_tokens("stop_tokens", stop_tokens, self._vocab_size)] = True
        for name, called in (("on_tokens", on_tokens), ("on_drafts", on_drafts)):
            if called is not None and not callable(called):
                raise ValueError(f"{name} is {called!r}; accepted: a function, or None")
        if on_drafts is not None and not self.draft_tokens:
            raise ValueError("on_drafts is given; accepted with an assistant alone")
        rule = _rule(sampling, key, len(prompts), self._vocab_size)

        caches = self._empty_caches(self._params, batch=len(prompts))
        for tokens, positions in chunks(prompts, self.chunk_tokens):
            caches = self._prefill(self._params, tokens, positions, caches)
        begin = np.asarray([prompt.size - 1 for prompt in prompts], np.int32)
        end = begin + np.int32(max_new_tokens)
        sequences = self._sequences(prompts)
        answers, steps = [[] for _ in prompts], 1
        while (sequences.position >= 0).any():
            (made, sequences), caches = self._decode(
                self._params, sequences, caches, begin, end, np.int32(steps), stops, rule
            )
            made, sequences = jax.device_get((made, sequences))
            new = [row[row >= 0].tolist() for row in made]
            for answer, tokens in zip(answers, new, strict=True):
                answer += tokens
            if on_tokens is not None:
                on_tokens(new)
            steps = min(2 * steps, MAX_STEPS)
        if on_drafts is not None:
            on_drafts(sequences.statistics)
        return answers

    def _check_new_tokens(self, max_new_tokens):
        _check_number("max_new_tokens", max_new_tokens)
        if max_new_tokens >= self.capacity:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; accepted with capacity {self.capacity}: up "
                f"to {self.capacity - 1}, after a prompt of one token"
            )
        return int(max_new_tokens)

    def _sequences(self, prompts):
        """Before the first step; NumPy's, as the device gets them back between steps."""
        batch, hidden, statistics = len(prompts), None, None
        if self.draft_tokens:
            hidden = np.zeros((batch, self._hidden_size), self._dtype)
            counts = (np.zeros(batch, np.int32) for _ in DraftStatistics._fields)
            statistics = DraftStatistics(*counts)
        token = np.asarray([prompt[-1] for prompt in prompts], np.int32)
        position = np.asarray([prompt.size - 1 for prompt in prompts], np.int32)
        return Sequences(token, position, hidden, statistics)


def _rule(sampling: Sampling, key: PRNGKeyArray | None, batch: int, vocab_size: int) -> Rule:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is a {type(sampling).__name__}; accepted: Sampling")
    # Lower ones are 0 in float32, or are on some devices.
    if sampling.temperature < np.finfo(np.float32).tiny:
        return Greedy()
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    impl = str(jax.random.key_impl(key)) if is_key else None
    # Other generators draw for a batch of keys from the first of them.
    if impl != "threefry2x32" or key.shape not in ((), (batch,)):
        given = f"has shape {key.shape} and impl {impl!r}" if is_key else f"is {key!r}"
        raise ValueError(
            f"key {given}; accepted with a temperature above 0: one of jax.random.key, or {batch}, "
            "of impl 'threefry2x32'"
        )
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch))
    return Drawn(
        temperature=np.float32(sampling.temperature),
        top_k=None if sampling.top_k is None else np.int32(min(sampling.top_k, vocab_size)),
        top_p=None if sampling.top_p is None else np.float32(sampling.top_p),
        keys=keys,
    )


def _default_forms(config: Gemma4Config) -> dict[str, type[Cache]]:
    specs = map(config.attention_spec, range(config.num_hidden_layers))
    if any(spec.mode is ProjectionMode.QK_ONLY and spec.rotary_dim for spec in specs):
        return {"full_attention": CompactKVCache}
    return {}


def _check_assistant(decoder, assistant, draft_tokens):
    """The number of drafts."""
    if assistant is None:
        if draft_tokens is not None:
            raise ValueError(f"draft_tokens is {draft_tokens!r}; accepted with an assistant alone")
        return 0
    if not isinstance(assistant, Gemma4Assistant):
        raise ValueError(
            f"assistant is a {type(assistant).__name__}; accepted: Gemma4Assistant, or None"
        )
    try:
        assistant.config.check_target(decoder.config)
    except ValueError as error:
        raise ValueError(f"assistant was made for another decoder: {error}") from error
    if assistant.dtype != decoder.dtype:
        raise ValueError(f"assistant has dtype {assistant.dtype}; the decoder has {decoder.dtype}")
    if draft_tokens is None:
        return _DRAFT_TOKENS
    check_draft_tokens(draft_tokens)
    return int(draft_tokens)


def _check_cache_dtype(cache_dtype, decoder):
    accepted = decoder.dtype, FLOAT8
    refusal = f"accepted: {accepted[0]} or {accepted[1]}"
    try:
        dtype = jnp.dtype(cache_dtype)
    except TypeError as error:
        raise ValueError(f"cache_dtype is {cache_dtype!r}; {refusal}") from error
    if dtype not in accepted:
        raise ValueError(f"cache_dtype is {dtype}; {refusal}")


def _check_weights(params):
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "the decoder or the assistant is abstract; accepted: models with weights, as the new "
            "ones that load_hf and load_assistant return"
        )


def _check_number(name, number, most=None):
    is_int = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not is_int or number < 1 or (most is not None and number > most):
        accepted = "or more" if most is None else f"to {most}"
        raise ValueError(f"{name} is {number!r}; accepted: an integer of 1 {accepted}")
