"""Steps of whole models that benchmarks compile: structs of weights and caches, programs, bytes."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx

from bench.steps._ablated import Variant, ablate
from g4attn_jax import CompactKVCache, Contiguous, Gemma4Decoder, KVCache, Ring, split_weights
from g4attn_jax.cache import bytes_per_token


class StepCase:
    """A model's step as a variant has it, for a number of sequences of `capacity` slots.

    Attributes:
        weights: structs, flat.
    """

    def __init__(self, config, variant, batch, capacity, max_new_tokens=1):
        self.config, self.batch, self.capacity = config, batch, capacity
        decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
        decoder = ablate(decoder, variant)
        self.merge, self.weights = split_weights(decoder)
        self.named_weights = jax.tree.leaves_with_path(nnx.state(decoder))
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
        and all experts have work.
        """
        tokens, positions, cache = state
        logits, cache = decoder(tokens, decoder.plan(positions, cache), cache)
        likeliest = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        shift = 7919 * jnp.arange(1, self.batch + 1, dtype=jnp.int32)
        tokens = (likeliest + shift + positions[:, 0]) % self.config.vocab_size
        return tokens[:, None], positions + 1, cache

    def step(self):
        """The compiled step: (weights, (tokens, positions, cache)) to the next of the latter."""
        token = jax.ShapeDtypeStruct((self.batch, 1), jnp.int32)
        return self.compiled(self.next_state, (token, token, self.cache()))

    def chunk(self, tokens):
        """The compiled prefill of a chunk: (weights, tokens, positions, cache) to the cache."""

        def prefill(decoder, tokens, positions, cache):
            at = jnp.zeros((self.batch, 0), jnp.int32)
            return decoder(tokens, decoder.plan(positions, cache), cache, logits_at=at)[1]

        token = jax.ShapeDtypeStruct((self.batch, tokens), jnp.int32)
        return self.compiled(prefill, token, token, self.cache())

    def tokens(self, position):
        """Random tokens, all at one position."""
        tokens = jax.random.randint(jax.random.key(1), (self.batch, 1), 0, self.config.vocab_size)
        return tokens, jnp.full((self.batch, 1), position, jnp.int32)

    def bytes(self, context):
        """Bytes that a step must move with `context` tokens in the caches.

        Of experts those that so many tokens choose if all are as likely; of per-layer embeddings
        the rows of the tokens; of caches what the tokens see.
        """
        config, total = self.config, 0
        for path, leaf in self.named_weights:
            name = jax.tree_util.keystr(path)
            size = leaf.size * leaf.dtype.itemsize
            if "['per_layer_inputs']['embed_tokens']" in name:
                size *= self.batch / config.vocab_size_per_layer_input
            elif "['moe']" in name and leaf.ndim > 2:
                chosen = config.top_k_experts / config.num_experts
                size *= 1 - (1 - chosen) ** self.batch
            total += size
        for layer in range(config.num_hidden_layers):
            spec = config.attention_spec(layer)
            producer = config.attention_spec(spec.kv_layer)
            seen = min(context, spec.sliding_window or context)
            form = self.forms.get(config.layer_types[layer], KVCache)
            total += self.batch * seen * bytes_per_token(producer, form)
        return total


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return 0.02 * jax.random.normal(key, shape, dtype)


def random_like(structs):
    """Random numbers of deviation 0.02 for matrices and caches, ones for vectors."""
    leaves, tree = jax.tree.flatten(structs)
    arrays = [
        _normal(jax.random.key(i), x.shape, x.dtype) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


def compile_steps(cases):
    """Steps of several cases: one first, to choose matmuls in peace, the others side by side."""
    first = cases[0].step()
    with ThreadPoolExecutor(8) as pool:
        return [first, *pool.map(StepCase.step, cases[1:])]
