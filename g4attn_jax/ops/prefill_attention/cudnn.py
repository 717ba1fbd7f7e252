"""cuDNN's flash attention, for a prompt from its start.

cuDNN's causal mask lets row t see columns 0 .. t. That is the op where position p lies in slot p
and token t is at position t, with padding behind the tokens: padding then sees what it may, and is
zeroed afterwards.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# cuDNN is 1.5 times faster (bench/results/h200/prefill_attention.json), but the host must read
# which of the two is to run: at 2048 tokens of 31B's sliding layers the kernel is done before.
_MIN_TOKENS = 4096
# cuDNN masks scores, but multiplies whole tiles of values, by weights of 0: none of its tiles has
# more rows or columns than this.
_MAX_TILE = 256


def is_faster(q, *_, **static) -> bool:
    """Whether cuDNN, where it takes the arguments, is the faster one."""
    return q.shape[1] >= _MIN_TOKENS


def refusal(q, cache, page_table, *_, sliding_window, scale, **static) -> str | None:
    """Reason for which JAX would not hand such arguments to cuDNN on these GPUs, or None."""
    capacity = cache.value_part.array.shape[1]
    accepted = {
        f"the default device is a {jax.default_backend()}; accepted: gpu": (
            jax.default_backend() == "gpu"
        ),
        "page_table is given; accepted: None": page_table is None,
        "values are keys too; accepted: a KVCache": not cache.values_are_keys,
        "the cache is float8; accepted: the dtype of q": cache.scale is None,
        f"there are {q.shape[1]} tokens; accepted: up to {capacity}, the slots of a sequence": (
            q.shape[1] <= capacity
        ),
    }
    for reason, is_so in accepted.items():
        if not is_so:
            return reason
    attend = functools.partial(_attend, sliding_window=sliding_window, scale=scale)
    try:
        jax.eval_shape(attend, q, cache)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # The head_dim, the dtype or the GPU is none of cuDNN's, or there is no cuDNN.
        return f"cuDNN does not take it ({error})"
    return None


def prefill_attention_or(
    otherwise: Callable[..., jax.Array], q, cache, positions, *, sliding_window, scale
) -> jax.Array:
    """cuDNN where the prompt starts at position 0, else `otherwise(q, cache, positions)`.

    Positions are known when the program runs, so it holds both.
    """
    attend = functools.partial(_attend, sliding_window=sliding_window, scale=scale)

    def without_padding(q, cache, positions):
        return attend(q, cache)

    def with_padding(q, cache, positions):
        return jnp.where((positions >= 0)[..., None, None], attend(q, cache), 0)

    # Under vmap each element of the batch chooses; of a batch of choices XLA would run all.
    @jax.custom_batching.sequential_vmap
    def run(q, cache, positions):
        branch = jnp.where(starts_at_0(cache, positions), 1 + (positions < 0).any(), 0)
        return lax.switch(branch, [otherwise, without_padding, with_padding], q, cache, positions)

    return run(q, cache, positions)


def _attend(q, cache, *, sliding_window, scale):
    return jax.nn.dot_product_attention(
        q,
        *cache.written,
        scale=scale,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )


def starts_at_0(cache, positions):
    """Whether token t is at position t, up to the padding, and nothing harmful lies behind it."""
    token, length = jnp.arange(positions.shape[1]), (positions >= 0).sum(axis=1)
    in_place = positions == jnp.where(token < length[:, None], token, -1)
    finite = [_is_finite_from(length, array) for array in cache.written]
    return in_place.all() & finite[0] & finite[1]


def _is_finite_from(length, array):
    """Whether the slots that a tile of the last token may reach, written or not, are finite."""
    size = min(_MAX_TILE, array.shape[1])

    def tail(sequence, first):
        return lax.dynamic_slice_in_dim(sequence, first, size)

    return jnp.isfinite(jax.vmap(tail)(array, length)).all()
