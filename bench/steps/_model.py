"""Steps of whole models that benchmarks compile: structs of weights and caches, programs, bytes."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx

from bench.steps._ablated import Variant, ablate
from bench.steps._experts import count_experts
from g4attn_jax import CompactKVCache, Contiguous, Gemma4Decoder, KVCache, Ring, split_weights
from g4attn_jax.cache import bytes_per_token

_THREADS = 8


class StepCase:
    """A model's step as a variant has it, for a number of sequences of `capacity` slots.

    Attributes:
        tokens_per_step: of a sequence in `step`.
        weights: structs, flat.
    """

    def __init__(self, config, variant, batch, capacity, max_new_tokens=1, tokens_per_step=1):
        self.config, self.batch, self.capacity = config, batch, capacity
        self.tokens_per_step = tokens_per_step
        self.merge, self.weights, self.named_weights = _abstract(config, variant)
        max_new_tokens = max(max_new_tokens, tokens_per_step)
        self.layouts = {
            "full_attention": Contiguous(batch, capacity),
            "sliding_attention": Ring(batch, config.sliding_window, max_new_tokens),
        }
        compact = variant.has(Variant.COMPACT) and config.attention_k_eq_v
        self.forms = {"full_attention": CompactKVCache if compact else KVCache}

    def compiled(self, f, *arguments):
        """f(decoder, *arguments), the last one donated, compiled for structs of arguments."""

        def program(weights, *arguments):
            return f(self.merge(weights), *arguments)

        jitted = jax.jit(program, donate_argnums=len(arguments))
        return jitted.lower(self.weights, *arguments).compile()

    def cache(self):
        """Structs of the caches."""
        return jax.eval_shape(
            lambda weights: self.merge(weights).init_cache(self.layouts, self.forms), self.weights
        )

    def next_state(self, decoder, state):
        """(tokens, positions, cache) after a step: the likeliest tokens, one position further.

        Each sequence's token is shifted by a number of its own, so that sequences stay different
        and all experts have work. A step of several tokens is a verification of which one stays.
        """
        tokens, positions, cache = state
        logits, cache = decoder(tokens, decoder.plan(positions, cache), cache)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        shift = 7919 * jnp.arange(1, self.batch + 1, dtype=jnp.int32)[:, None]
        return (likeliest + shift + positions) % self.config.vocab_size, positions + 1, cache

    def step(self):
        """The compiled step: (weights, (tokens, positions, cache)) to the next of the latter."""
        return self.compiled(self.next_state, self._state())

    def counting_step(self):
        """The compiled step that also counts: (weights, state) to (state, experts of layers).

        The latter are int32 [layers, experts], how many of the step's tokens chose each expert.
        """

        def step(decoder, state):
            return count_experts(decoder, self.next_state, state)

        return self.compiled(step, self._state())

    def chunk(self, tokens):
        """The compiled prefill of a chunk: (weights, tokens, positions, cache) to the cache."""

        def prefill(decoder, tokens, positions, cache):
            at = jnp.zeros((self.batch, 0), jnp.int32)
            return decoder(tokens, decoder.plan(positions, cache), cache, logits_at=at)[1]

        token = jax.ShapeDtypeStruct((self.batch, tokens), jnp.int32)
        return self.compiled(prefill, token, token, self.cache())

    def tokens(self, position):
        """Random tokens, of all sequences at one position and those after it."""
        shape = self.batch, self.tokens_per_step
        tokens = jax.random.randint(jax.random.key(1), shape, 0, self.config.vocab_size)
        positions = position + jnp.arange(self.tokens_per_step, dtype=jnp.int32)
        return tokens, jnp.tile(positions, (self.batch, 1))

    def uniform_experts(self):
        """Number of experts of a layer that the tokens of a step choose if all are as likely."""
        config = self.config
        others = 1 - config.top_k_experts / config.num_experts
        return config.num_experts * (1 - others ** (self.batch * self.tokens_per_step))

    def bytes(self, context, experts=None):
        """Bytes that a step must move with `context` tokens in the caches.

        Of per-layer embeddings the rows of the tokens, of caches what the tokens see.

        Args:
            context: tokens in the caches.
            experts: number of experts of a layer that are read; None is `uniform_experts`.
        """
        config, total = self.config, 0
        for path, leaf in self.named_weights:
            name = jax.tree_util.keystr(path)
            size = leaf.size * leaf.dtype.itemsize
            if "['per_layer_inputs']['embed_tokens']" in name:
                rows = self.batch * self.tokens_per_step
                size *= rows / config.vocab_size_per_layer_input
            elif "['moe']" in name and leaf.ndim > 2:
                read = self.uniform_experts() if experts is None else experts
                size *= read / config.num_experts
            total += size
        for layer in range(config.num_hidden_layers):
            spec = config.attention_spec(layer)
            producer = config.attention_spec(spec.kv_layer)
            seen = min(context, spec.sliding_window or context)
            form = self.forms.get(config.layer_types[layer], KVCache)
            total += self.batch * seen * bytes_per_token(producer, form)
        return total

    def _state(self):
        """Structs of (tokens, positions, cache)."""
        token = jax.ShapeDtypeStruct((self.batch, self.tokens_per_step), jnp.int32)
        return token, token, self.cache()


@functools.cache
def _abstract(config, variant):
    """(merge, structs, structs with their paths) of a decoder's weights, see `split_weights`."""
    decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
    decoder = ablate(decoder, variant)
    return *split_weights(decoder), jax.tree.leaves_with_path(nnx.state(decoder))


@functools.cache
def _normal(shape, dtype):
    """Compiled program from a key to random numbers."""

    def draw(key):
        return 0.02 * jax.random.normal(key, shape, dtype)

    return jax.jit(draw).lower(_key(0)).compile()


def _key(seed):
    # The generator that takes a GPU the least time, and XLA the least to compile.
    return jax.random.key(seed, impl="rbg")


def random_like(structs):
    """Random numbers of deviation 0.02 for matrices and caches, ones for vectors."""
    leaves, tree = jax.tree.flatten(structs)
    with ThreadPoolExecutor(_THREADS) as pool:  # a program for each shape, compiled side by side
        list(pool.map(lambda x: _normal(*x), {(x.shape, x.dtype) for x in leaves if x.ndim > 1}))
    arrays = [
        _normal(x.shape, x.dtype)(_key(i)) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


def compile_steps(cases):
    """Steps of several cases: one first, to choose matmuls in peace, the others side by side."""
    first = cases[0].step()
    with ThreadPoolExecutor(_THREADS) as pool:
        return [first, *pool.map(StepCase.step, cases[1:])]
