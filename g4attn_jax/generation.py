"""From prompts to the tokens that follow them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from g4attn_jax.cache import Cache, CompactKVCache
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.layout import Contiguous, Layout, Ring
from g4attn_jax.model.decoder import Gemma4Decoder
from g4attn_jax.model.sampling import Sampling, sample
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS

# The most steps between two looks of the host, during which the device has nothing to do.
_MAX_STEPS = 32
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
    for the steps, greedy or not, with or without top-k and top-p. Prompts of another length in the
    same sizes, another max_new_tokens, other stop tokens, keys and sampling parameters compile
    nothing.

    Sequences do not depend on each other, except that matmuls of another size may round in another
    order.

    Attributes:
        capacity: the most tokens of a prompt and what follows it.
        chunk_tokens: the most tokens of a prompt in one chunk.
    """

    def __init__(
        self,
        decoder: Gemma4Decoder,
        *,
        capacity: int,
        forms: Mapping[str, type[Cache]] | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
        chunk_tokens: int = 512,
    ):
        """Takes the weights that the decoder has now; compiles nothing yet.

        Args:
            decoder: the model.
            capacity: the most tokens of a prompt and what follows it.
            forms: of caches, by layer type; where none is named, `CompactKVCache` for full layers
                with K = V and `KVCache` for others.
            cache_dtype: of caches, see `Gemma4Attention.init_cache`.
            chunk_tokens: the most tokens of a prompt in one chunk. More use the device better, and
                take memory for activations and rings.

        Raises:
            ValueError: a number is not 1 or more, or as `Gemma4Decoder.init_caches` raises.
        """
        _check_number("capacity", capacity)
        _check_number("chunk_tokens", chunk_tokens)
        self.capacity, self.chunk_tokens = int(capacity), int(chunk_tokens)
        self._vocab_size = decoder.config.vocab_size
        graph, self._params = nnx.split(decoder)
        programs = _Programs(
            graph=graph,
            sliding_window=decoder.config.sliding_window,
            forms=_default_forms(decoder.config) | dict(forms or {}),
            cache_dtype=cache_dtype,
            capacity=self.capacity,
            chunk_tokens=self.chunk_tokens,
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
    ) -> list[list[int]]:
        """The tokens that follow each prompt.

        Args:
            prompts: one sequence of tokens or more, of any lengths but 0.
            max_new_tokens: the most that follow a prompt.
            sampling: greedy unless told otherwise.
            stop_tokens: each ends the sequence that makes it, and is the last of it.
            key: of `jax.random`, needed unless sampling is greedy: one, from which sequence b draws
                as from `jax.random.fold_in(key, b)`, or one of each sequence, [B]. The token that
                follows position p is drawn with the sequence's key, folded with p.
            on_tokens: called with the new tokens of each sequence, several times; together they are
                what is returned.

        Returns:
            The new tokens of each prompt: `max_new_tokens`, or as many as end with a stop token.

        Raises:
            ValueError: there is no prompt, or one is empty, has what is no token of the model, or
                does not fit into `capacity` together with max_new_tokens; or another argument is
                none that is accepted. The message names it.
        """
        _check_number("max_new_tokens", max_new_tokens)
        prompts = _check_prompts(prompts, self._vocab_size, self.capacity - max_new_tokens)
        stops = np.zeros(self._vocab_size, bool)
        stops[_check_tokens("stop_tokens", tuple(stop_tokens), self._vocab_size)] = True
        drawing = _drawing(sampling, key, len(prompts), self._vocab_size)

        caches = self._empty_caches(self._params, batch=len(prompts))
        for tokens, positions in _chunks(prompts, self.chunk_tokens):
            caches = self._prefill(self._params, tokens, positions, caches)
        token = np.asarray([prompt[-1] for prompt in prompts], np.int32)
        position = np.asarray([prompt.size - 1 for prompt in prompts], np.int32)
        end = position + np.int32(max_new_tokens)
        answers, steps = [[] for _ in prompts], 1
        while (position >= 0).any():
            made, caches = self._decode(
                self._params, token, position, caches, end, np.int32(steps), stops, drawing
            )
            made, token, position = jax.device_get(made)
            new = [row[row >= 0].tolist() for row in made]
            for answer, tokens in zip(answers, new, strict=True):
                answer += tokens
            if on_tokens is not None:
                on_tokens(new)
            steps = min(2 * steps, _MAX_STEPS)
        return answers


class _Drawing(NamedTuple):
    """How tokens are drawn, as arrays; what is None is known to be off when compiling."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    keys: PRNGKeyArray


@dataclasses.dataclass(frozen=True, eq=False)
class _Programs:
    """Pure functions of the weights. They hold none, so that these go with the generator.

    Letters: B sequences, T tokens of a chunk, V vocabulary.
    """

    graph: nnx.GraphDef
    sliding_window: int
    forms: Mapping[str, type[Cache]]
    cache_dtype: jax.typing.DTypeLike | None
    capacity: int
    chunk_tokens: int

    def empty_caches(self, params: nnx.State, batch: int) -> dict[int, Cache]:
        """The caches of `batch` sequences."""
        decoder = nnx.merge(self.graph, params)
        return decoder.init_caches(self._layouts(batch), self.forms, dtype=self.cache_dtype)

    def prefill(
        self,
        params: nnx.State,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        caches: dict[int, Cache],
    ) -> dict[int, Cache]:
        """The caches with a chunk of every prompt."""
        decoder, batch = nnx.merge(self.graph, params), tokens.shape[0]
        nowhere = jnp.zeros((batch, 0), jnp.int32)
        layouts = self._layouts(batch)
        return decoder.hidden(tokens, positions, caches, layouts, logits_at=nowhere)[1]

    def decode(
        self,
        params: nnx.State,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        caches: dict[int, Cache],
        end: Int[Array, " B"],
        steps: Int[Array, ""],
        stops: Bool[Array, " V"],
        drawing: _Drawing | None,
    ):
        """Up to `steps` steps, fewer if all sequences stop.

        Args:
            params: of the decoder.
            token: the last token of each sequence, which is not in the caches yet.
            position: where it is; -1 where the sequence has stopped.
            caches: donated.
            end: the position of the last token that each sequence may have.
            steps: up to 32.
            stops: which tokens end a sequence.
            drawing: None is greedy.

        Returns:
            ((made, token, position), caches): made [B, 32], the new tokens, -1 where there is none;
            the others as above.
        """
        batch = token.shape[0]
        layouts = self._layouts(batch)

        def goes_on(carry):
            step, _, _, position, _ = carry
            return (step < steps) & (position >= 0).any()

        def one(carry):
            step, made, token, position, caches = carry
            # On a CPU, XLA converts bfloat16 weights to float32 for a matmul. Without the barrier
            # it does so before the loop, and holds all of them.
            weights, token = jax.lax.optimization_barrier((params, token))
            decoder = nnx.merge(self.graph, weights)
            logits, caches = decoder(token[:, None], position[:, None], caches, layouts)
            token = _draw(logits[:, 0], position, drawing)
            made = made.at[:, step].set(jnp.where(position >= 0, token, -1))
            has_ended = (position < 0) | (position + 1 >= end) | stops[token]
            position = jnp.where(has_ended, -1, position + 1)
            return step + 1, made, token, position, caches

        made = jnp.full((batch, _MAX_STEPS), -1, jnp.int32)
        start = jnp.int32(0), made, token, position, caches
        _, made, token, position, caches = jax.lax.while_loop(goes_on, one, start)
        return (made, token, position), caches

    def _layouts(self, batch: int) -> dict[str, Layout]:
        full = Contiguous(batch, self.capacity)
        ring = Ring(batch, self.sliding_window, self.chunk_tokens)
        return {
            "full_attention": full,
            "sliding_attention": ring if ring.capacity < full.capacity else full,
        }


def _draw(
    logits: Float[Array, "B V"], position: Int[Array, " B"], drawing: _Drawing | None
) -> Int[Array, " B"]:
    """The token that follows each position, whatever the other sequences are."""
    if drawing is None:
        return sample(logits, None, temperature=0.0)

    def draw_one(logits, key, position):
        [token] = sample(
            logits[None],
            jax.random.fold_in(key, position),
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
        )
        return token

    return jax.vmap(draw_one)(logits, drawing.keys, position)


def _drawing(
    sampling: Sampling, key: PRNGKeyArray | None, batch: int, vocab_size: int
) -> _Drawing | None:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is a {type(sampling).__name__}; accepted: Sampling")
    if sampling.temperature == 0:
        return None
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape not in ((), (batch,)):
        given = f"has shape {key.shape}" if is_key else f"is {key!r}"
        raise ValueError(
            f"key {given}; accepted with a temperature above 0: one of jax.random.key, or {batch}"
        )
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch))
    return _Drawing(
        temperature=np.float32(sampling.temperature),
        top_k=None if sampling.top_k is None else np.int32(min(sampling.top_k, vocab_size)),
        top_p=None if sampling.top_p is None else np.float32(sampling.top_p),
        keys=keys,
    )


def _chunks(
    prompts: Sequence[Int[np.ndarray, " length"]], chunk_tokens: int
) -> Iterator[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]]:
    """(tokens, positions) of each chunk of all prompts but for their last tokens."""
    remaining, begin = max(prompt.size for prompt in prompts) - 1, 0
    while remaining > begin:
        rest = max(remaining - begin, MAX_DECODE_TOKENS)
        size = min(1 << (rest - 1).bit_length(), chunk_tokens)
        tokens = np.zeros((len(prompts), size), np.int32)
        positions = np.full((len(prompts), size), -1, np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[begin : min(begin + size, prompt.size - 1)]
            tokens[row, : part.size] = part
            positions[row, : part.size] = begin + np.arange(part.size)
        yield tokens, positions
        begin += size


def _default_forms(config: Gemma4Config) -> dict[str, type[Cache]]:
    specs = map(config.attention_spec, range(config.num_hidden_layers))
    if any(spec.mode is ProjectionMode.QK_ONLY and spec.rotary_dim for spec in specs):
        return {"full_attention": CompactKVCache}
    return {}


def _check_prompts(prompts, vocab_size, max_length):
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; accepted: one prompt or more")
    checked = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        tokens = _check_tokens(name, prompt, vocab_size)
        if tokens.size == 0:
            raise ValueError(f"{name} is empty; accepted: one token or more")
        if tokens.size > max_length:
            raise ValueError(
                f"{name} has {tokens.size} tokens; accepted with this capacity and max_new_tokens: "
                f"up to {max_length}"
            )
        checked.append(tokens)
    return checked


def _check_tokens(name, tokens, vocab_size):
    """As int32 [n]."""
    array = np.asarray(tokens)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is {tokens!r}; accepted: a sequence of tokens")
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        raise ValueError(f"{name} has {array[wrong][0]}; accepted: tokens 0 to {vocab_size - 1}")
    return array.astype(np.int32)


def _check_number(name, number):
    is_int = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not is_int or number < 1:
        raise ValueError(f"{name} is {number!r}; accepted: an integer of 1 or more")
