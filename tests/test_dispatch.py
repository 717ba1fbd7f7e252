"""Work of the host in a call of a jitted step: JAX goes through all arguments without Python."""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from g4attn_jax import (
    CompactKVCache,
    Contiguous,
    Gemma4Config,
    Gemma4Decoder,
    Ring,
    Step,
    plan_step,
    split_weights,
)

NUM_WEIGHTS, NUM_CACHES = 662, 120  # of 31B


def numbers_like(structs):
    """As many arrays, of one number each."""
    return jax.tree.map(lambda x: jnp.zeros((), x.dtype), structs)


@functools.cache
def arguments():
    """(weights, their `nnx.State`, cache) of 31B, all but the numbers."""
    config = Gemma4Config.preset("gemma-4-31b")
    decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
    layouts = {
        "full_attention": Contiguous(1, 128),
        "sliding_attention": Ring(1, config.sliding_window, 1),
    }
    forms = {"full_attention": CompactKVCache}
    merge, weights = split_weights(decoder)
    cache = jax.eval_shape(lambda weights: merge(weights).init_cache(layouts, forms), weights)
    state = nnx.split(decoder)[1]
    assert len(jax.tree.leaves(state)) == len(weights) == NUM_WEIGHTS
    assert len(jax.tree.leaves(cache)) == NUM_CACHES
    return numbers_like(weights), numbers_like(state), numbers_like(cache)


def dispatch(weights, cache, *others):
    """A function that calls a program which has nothing to do; the cache is donated."""

    @functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
    def program(weights, cache, *others):
        return cache

    held = [jax.tree.map(jnp.copy, cache)]

    def call():
        held[0] = program(weights, held[0], *others)

    call()
    return call


def python_calls(f):
    """Names of the Python functions that run in a second call of f."""
    names = []

    def trace(frame, event, _):
        if event == "call":
            names.append(frame.f_code.co_qualname)

    f()
    sys.setprofile(trace)
    try:
        f()
    finally:
        sys.setprofile(None)
    return names


# Constructors of what is returned: of each layer's cache, and of the layouts with their checks.
CONSTRUCTORS = 60 + 60


def test_no_argument_is_flattened_in_python():
    weights, state, cache = arguments()
    assert len(python_calls(dispatch(weights, cache))) <= CONSTRUCTORS
    # The count would notice.
    assert len(python_calls(dispatch(state, cache))) > NUM_WEIGHTS


def test_a_step_that_was_planned_outside_costs_no_python_either():
    weights, _, cache = arguments()
    spec = Gemma4Config.preset("gemma-4-31b").attention_spec(0)
    positions = np.zeros((1, 1), np.int32)
    step = Step(positions, {"sliding": plan_step(spec, positions, Ring(1, 1024, 1))})
    assert len(python_calls(dispatch(weights, cache, step))) <= CONSTRUCTORS


def test_dispatch_takes_as_long_as_that_of_flat_tuples():
    """Not an absolute time, which a busy machine decides: the least of many, in turns."""
    weights, _, cache = arguments()
    ours, flat = dispatch(weights, cache), dispatch((*weights,), tuple(jax.tree.leaves(cache)))
    times = {ours: [], flat: []}
    for _ in range(200):
        for call, taken in times.items():
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    assert min(times[ours]) < 1.5 * min(times[flat])
