"""Generator of the tokens that follow prompts."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PRNGKeyArray

from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.cache import FLOAT8, Cache, CompactKVCache
from g4attn_jax.checkpoint import load_assistant, load_hf, terminal_bar
from g4attn_jax.checkpoint.loading import Progress
from g4attn_jax.checkpoint.models import abstract_model, config_of
from g4attn_jax.checks import check_dtype, check_integer, check_type
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.generation.checks import check_assistant, check_choices, check_weights
from g4attn_jax.generation.programs import MAX_SLOTS, MAX_STEPS, Limits, Programs, Sequences
from g4attn_jax.generation.prompts import (
    as_list,
    check_embedded,
    check_prompts,
    check_tokens,
    chunks,
    following,
)
from g4attn_jax.generation.settings import GenerationSettings
from g4attn_jax.model.acceptance import Greedy, RejectionSampling, Rule
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.embedding import num_embedded_tokens
from g4attn_jax.model.flat_weights import split_weights
from g4attn_jax.model.sampling import Sampling
from g4attn_jax.ops.op import XLA
from g4attn_jax.speculative import DraftStatistics, LastTokens

_GREEDY = Sampling()


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
    for the steps, greedy or not, with or without top-k, top-p, suppressed tokens and
    log-probabilities. Prompts of another length in the same sizes, another max_new_tokens, other
    stop tokens, other suppressed tokens, keys and sampling parameters compile nothing.

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
        sampling: of calls that are given none.
        stop_tokens: of calls that are given none.
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
        sampling: Sampling = _GREEDY,
        stop_tokens: Iterable[int] = (),
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
            sampling: of calls that are given none.
            stop_tokens: of calls that are given none.

        Raises:
            ValueError: an argument is none that is accepted, the assistant is not one for this
                decoder or has another dtype, or as `Gemma4Decoder.init_cache` raises. The message
                names it.
            NotImplementedError: a kernel was demanded that cannot run a chunk or a step of these
                models here.
        """
        check_type("decoder", decoder, Gemma4Decoder)
        check_type("forms", forms, Mapping, none=True)
        check_type("sampling", sampling, Sampling)
        if cache_dtype is not None:
            check_dtype("cache_dtype", cache_dtype, (decoder.dtype, FLOAT8))
        self.capacity = check_integer("capacity", capacity, most=MAX_SLOTS)
        self.chunk_tokens = check_integer("chunk_tokens", chunk_tokens, most=MAX_SLOTS)
        self.draft_tokens = check_assistant(decoder, assistant, draft_tokens)
        self._config, self._dtype = decoder.config, decoder.dtype
        self.sampling = sampling
        self.stop_tokens = tuple(_checked_tokens("stop_tokens", stop_tokens, self._config).tolist())
        merge, self._weights = split_weights((decoder, assistant))
        programs = Programs(
            merge=merge,
            sliding_window=decoder.config.sliding_window,
            forms=_default_forms(decoder.config) | dict(forms or {}),
            cache_dtype=cache_dtype,
            capacity=self.capacity,
            chunk_tokens=self.chunk_tokens,
            draft_tokens=self.draft_tokens,
        )
        jax.eval_shape(functools.partial(programs.empty_cache, batch=1), self._weights)
        # With all weights as arguments, caches are placed as those are, and stay so.
        self._empty_cache = jax.jit(programs.empty_cache, static_argnames="batch", keep_unused=True)
        self._prefill = jax.jit(programs.prefill, donate_argnames="cache")
        self._score = jax.jit(programs.score, donate_argnames="cache")
        self._decode = jax.jit(
            programs.decode, static_argnames="with_log_probs", donate_argnames="cache"
        )
        models = [decoder] if assistant is None else [decoder, assistant]
        if any(model.layers[0].implementation not in (None, XLA) for model in models):
            self._check_kernels()

    @classmethod
    def from_hf(
        cls,
        directory: str | PathLike,
        *,
        capacity: int,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
        assistant: str | PathLike | None = None,
        progress: Progress | None = terminal_bar,
        **options: Any,
    ) -> Self:
        """A generator from a directory of Hugging Face's format.

            generator = Generator.from_hf("DIR", capacity=4096)

        Calls choose tokens, and end sequences, as the directory says unless they are told
        otherwise, see `GenerationSettings.from_hf`. Where it says that tokens are drawn, as those
        of published chat models do, calls need a key.

        Args:
            directory: of the decoder.
            capacity: the most tokens of a prompt and what follows it.
            dtype: of weights and activations.
            implementation: of the kernels, see `Gemma4Decoder`.
            assistant: directory of an assistant that drafts tokens, or None.
            progress: of loading, see `load_hf`.
            options: of the constructor; sampling and stop_tokens replace the directory's.

        Raises:
            ValueError: as `load_hf`, `load_assistant`, `GenerationSettings.from_hf` and the
                constructor raise.
            NotImplementedError: as the constructor raises; no weight has been read.

        Warns:
            UserWarning: the directory asks for what is not followed here; the fields are named.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loading says it again
            config = config_of(directory, Gemma4Config)
            drafts_config = assistant and config_of(assistant, AssistantConfig)
        # Before the weights: what is wrong with it is said soon.
        settings = GenerationSettings.from_hf(directory, config.vocab_size)
        if settings.not_followed:
            warnings.warn(
                f"{directory} has settings of generation that are not followed: "
                + ", ".join(f"{name} {value!r}" for name, value in settings.not_followed.items()),
                stacklevel=2,
            )
        defaults = {"sampling": settings.sampling, "stop_tokens": settings.stop_tokens}
        options = {"capacity": capacity} | defaults | options
        loading = {"dtype": dtype, "implementation": implementation}
        if implementation not in (None, XLA):
            # Without weights: what a demanded kernel refuses is said before they are read.
            drafts = None
            if drafts_config is not None:
                drafts = abstract_model(Gemma4Assistant, drafts_config, **loading)
            cls(abstract_model(Gemma4Decoder, config, **loading), assistant=drafts, **options)
        loading["progress"] = progress
        drafts = None if assistant is None else load_assistant(assistant, **loading)
        return cls(load_hf(directory, **loading), assistant=drafts, **options)

    @overload
    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = ...,
        stop_tokens: Iterable[int] | None = ...,
        key: PRNGKeyArray | None = ...,
        on_tokens: Callable[[list[list[int]]], Any] | None = ...,
        on_drafts: Callable[[DraftStatistics], Any] | None = ...,
        log_probs: Literal[False] = ...,
    ) -> list[list[int]]: ...

    @overload
    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = ...,
        stop_tokens: Iterable[int] | None = ...,
        key: PRNGKeyArray | None = ...,
        on_tokens: Callable[[list[list[int]]], Any] | None = ...,
        on_drafts: Callable[[DraftStatistics], Any] | None = ...,
        log_probs: Literal[True],
    ) -> tuple[list[list[int]], list[list[float]]]: ...

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_tokens: Iterable[int] | None = None,
        key: PRNGKeyArray | None = None,
        on_tokens: Callable[[list[list[int]]], Any] | None = None,
        on_drafts: Callable[[DraftStatistics], Any] | None = None,
        log_probs: bool = False,
    ) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
        """The tokens that follow each prompt.

        Args:
            prompts: one sequence of tokens or more, of any lengths but 0.
            max_new_tokens: the most that follow a prompt.
            sampling: None: the generator's, which is greedy unless told otherwise.
            stop_tokens: each ends the sequence that makes it, and is the last of it. None: the
                generator's.
            key: of `jax.random`, needed unless sampling is greedy, of impl threefry2x32: one, from
                which sequence b draws as from `jax.random.fold_in(key, b)`, or one of each
                sequence, [B]. The token that follows position p is drawn with the sequence's key,
                folded with p; with an assistant it is another of the same distribution, see
                `acceptance.RejectionSampling`.
            on_tokens: called with the new tokens of each sequence, several times; together they are
                what is returned.
            on_drafts: called at the end with what became of the drafts; with an assistant alone.
            log_probs: whether log-probabilities are returned too; a program of its own.

        Returns:
            The new tokens of each prompt: `max_new_tokens`, or as many as end with a stop token.
            With log_probs (tokens, log-probabilities): those of the new tokens, each given what is
            before it, under the decoder's own distribution as `score` has it: before temperature,
            filters and suppressed tokens, and of the decoder with an assistant too.

        Raises:
            ValueError: there is no prompt, or one is empty, has what is no token that the model can
                read, or does not fit into `capacity` together with max_new_tokens; or sampling
                could choose a token that the model cannot read; or another argument is none that is
                accepted, or the models have no weights. The message names it.
        """
        check_weights(self._weights)
        max_new_tokens = self._check_new_tokens(max_new_tokens)
        prompts = self._check_prompts(
            prompts, self.capacity - max_new_tokens, "this capacity and max_new_tokens"
        )
        sampling = self.sampling if sampling is None else sampling
        stop_tokens = self.stop_tokens if stop_tokens is None else stop_tokens
        stop_tokens = _checked_tokens("stop_tokens", stop_tokens, self._config)
        self._check_callbacks(on_tokens, on_drafts)
        check_type("log_probs", log_probs, bool)
        check_choices(sampling, self._config)
        rule = _rule(sampling, key, len(prompts), self._config.vocab_size)
        begin = np.asarray([prompt.size - 1 for prompt in prompts], np.int32)
        stops = _mask_of(stop_tokens, self._config.vocab_size)
        limits = Limits(begin, begin + np.int32(max_new_tokens), stops)

        answers, scores = [[] for _ in prompts], [[] for _ in prompts]
        for made, made_scores in self._runs(prompts, limits, rule, on_drafts, log_probs):
            new = _append(answers, made, made)
            if log_probs:
                _append(scores, made_scores, made)
            if on_tokens is not None:
                on_tokens(new)
        return (answers, scores) if log_probs else answers

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the tokens of each prompt, each given those before it.

            score of token i = log(softmax(logits after tokens 0 ... i - 1))[token i]

        The distribution is the decoder's own, in float32, after its softcapping and without
        temperature, filters and suppressed tokens. Prompts go through the decoder in chunks, and
        logits of 128 tokens are held at a time. Programs are compiled for a number of sequences,
        one for each size of chunk, as those of a call are.

        Args:
            prompts: one sequence of tokens or more, of any lengths but 0, up to `capacity`.

        Returns:
            n - 1 numbers for each prompt of n tokens: none for the first, which follows nothing.

        Raises:
            ValueError: as a call raises for its prompts.
        """
        check_weights(self._weights)
        prompts = self._check_prompts(prompts, self.capacity, "this capacity")
        cache, parts = self._empty_cache(self._weights, batch=len(prompts)), []
        for tokens, positions in chunks(prompts, self.chunk_tokens):
            follow = following(prompts, positions)
            scores, cache = self._score(self._weights, tokens, positions, follow, cache)
            parts.append((scores, positions))
        answers = [[] for _ in prompts]
        for scores, positions in jax.device_get(parts):
            _append(answers, scores, positions)
        return answers

    def _runs(self, prompts, limits, rule, on_drafts, log_probs):
        """Yields (tokens, log-probabilities) of each run of steps on the device."""
        cache = self._empty_cache(self._weights, batch=len(prompts))
        for tokens, positions in chunks(prompts, self.chunk_tokens):
            cache = self._prefill(self._weights, tokens, positions, cache)
        sequences, steps = self._sequences(prompts, limits.begin), 1
        while (sequences.last.position >= 0).any():
            of_steps, cache = self._decode(
                *(self._weights, sequences, cache, limits, np.int32(steps), rule),
                with_log_probs=log_probs,
            )
            made, made_scores, sequences = jax.device_get(of_steps)
            yield made, made_scores
            steps = min(2 * steps, MAX_STEPS)
        if on_drafts is not None:
            on_drafts(sequences.statistics)

    def _check_kernels(self):
        """Traces a chunk and a step of one sequence: a demanded kernel refuses them, or neither."""
        cache = jax.eval_shape(functools.partial(self._empty_cache, batch=1), self._weights)
        size = min(1 << (self.capacity - 1).bit_length(), self.chunk_tokens)
        chunk = jax.ShapeDtypeStruct((1, size), jnp.int32)
        jax.eval_shape(self._prefill, self._weights, chunk, chunk, cache)
        zero = np.zeros(1, np.int32)
        limits = Limits(zero, zero, np.zeros(self._config.vocab_size, bool))
        decode = functools.partial(self._decode, with_log_probs=False)
        arguments = self._sequences([zero], zero), cache, limits, np.int32(1), Greedy(None)
        jax.eval_shape(decode, self._weights, *arguments)

    def _check_callbacks(self, on_tokens, on_drafts):
        for name, called in (("on_tokens", on_tokens), ("on_drafts", on_drafts)):
            if called is not None and not callable(called):
                raise ValueError(f"{name} is {called!r}; accepted: a function, or None")
        if on_drafts is not None and not self.draft_tokens:
            raise ValueError("on_drafts is given; accepted with an assistant alone")

    def _check_prompts(self, prompts, max_length, what):
        prompts = check_prompts(prompts, self._config.vocab_size, max_length, what)
        check_embedded(prompts, num_embedded_tokens(self._config))
        if len(prompts) * self.capacity > MAX_SLOTS:
            raise ValueError(
                f"prompts has {len(prompts)}; accepted with capacity {self.capacity}: up to "
                f"{MAX_SLOTS // self.capacity}"
            )
        return prompts

    def _check_new_tokens(self, max_new_tokens):
        max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
        if max_new_tokens >= self.capacity:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; accepted with capacity {self.capacity}: up "
                f"to {self.capacity - 1}, after a prompt of one token"
            )
        return max_new_tokens

    def _sequences(self, prompts, position):
        """Sequences before the first step, as NumPy arrays like those between runs of steps."""
        batch, hidden, statistics = len(prompts), None, None
        if self.draft_tokens:
            hidden = np.zeros((batch, self._config.hidden_size), self._dtype)
            counts = (np.zeros(batch, np.int32) for _ in DraftStatistics._fields)
            statistics = DraftStatistics(*counts)
        token = np.asarray([prompt[-1] for prompt in prompts], np.int32)
        return Sequences(LastTokens(token, position, hidden), statistics)


def _append(lists: list[list], rows: np.ndarray, marks: np.ndarray) -> list[list]:
    """Adds numbers whose mark is 0 or more to the list of their row; returns those that are new."""
    new = [row[mark >= 0].tolist() for row, mark in zip(rows, marks, strict=True)]
    for whole, part in zip(lists, new, strict=True):
        whole += part
    return new


def _rule(sampling: Sampling, key: PRNGKeyArray | None, batch: int, vocab_size: int) -> Rule:
    suppressed = None
    if sampling.suppress_tokens:
        suppressed = _mask_of(list(sampling.suppress_tokens), vocab_size)
    # Lower ones are 0 in float32, or are on some devices.
    if sampling.temperature < np.finfo(np.float32).tiny:
        return Greedy(suppressed)
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
    return RejectionSampling(
        temperature=np.float32(sampling.temperature),
        top_k=None if sampling.top_k is None else np.int32(min(sampling.top_k, vocab_size)),
        top_p=None if sampling.top_p is None else np.float32(sampling.top_p),
        keys=keys,
        suppressed=suppressed,
    )


def _checked_tokens(name, tokens, config):
    return check_tokens(name, as_list(name, tokens, "a sequence of tokens"), config.vocab_size)


def _mask_of(tokens: Sequence[int], vocab_size: int) -> Bool[np.ndarray, " V"]:
    mask = np.zeros(vocab_size, bool)
    mask[tokens] = True
    return mask


def _default_forms(config: Gemma4Config) -> dict[str, type[Cache]]:
    specs = map(config.attention_spec, range(config.num_hidden_layers))
    if any(spec.mode is ProjectionMode.QK_ONLY and spec.rotary_dim for spec in specs):
        return {"full_attention": CompactKVCache}
    return {}
