"""Where cuDNN's flash attention takes the case of a prompt from its start, and whether it is one.

cuDNN's causal mask lets row t see columns 0 .. t. That is the op where position p lies in slot p
and token t is at position t, with padding behind the tokens: padding then sees what it may, and is
zeroed afterwards.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from g4attn_jax.cache import KVCache

# cuDNN is 1.5 times faster (bench/results/h200/prefill_attention.json), but the host must read
# which of the two is to run: at 2048 tokens of 31B's sliding layers the kernel is done before.
_MIN_TOKENS = 4096
# cuDNN masks scores, but multiplies whole tiles of values, by weights of 0: none of its tiles has
# more rows or columns than this.
_MAX_TILE = 256


def takes(q, cache, page_table, *, sliding_window, scale) -> bool:
    """Whether cuDNN is the faster one for such arguments, where it supports them."""
    constants = {"sliding_window": sliding_window, "scale": scale}
    return q.shape[1] >= _MIN_TOKENS and supports(q, cache, page_table, **constants)


def supports(q, cache, page_table, *, sliding_window, scale) -> bool:
    """Whether JAX would hand such arguments to cuDNN on the GPUs of this process."""
    if jax.default_backend() != "gpu" or page_table is not None or not isinstance(cache, KVCache):
        return False
    if cache.scale is not None or q.shape[1] > cache.v.shape[1]:
        return False
    attend = functools.partial(_attend, sliding_window=sliding_window, scale=scale)
    try:
        jax.eval_shape(attend, q, cache)
    except (NotImplementedError, RuntimeError, ValueError):
        return False  # the head_dim, the dtype or the GPU is none of cuDNN's, or there is no cuDNN
    return True


def prefill_attention_or(kernel, q, cache, positions, *, sliding_window, scale):
    """cuDNN where the prompt starts at position 0, `kernel(q, cache, positions)` where it does not.

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
        return lax.switch(branch, [kernel, without_padding, with_padding], q, cache, positions)

    return run(q, cache, positions)


def _attend(q, cache, *, sliding_window, scale):
    return jax.nn.dot_product_attention(
        q,
        cache.k,
        cache.v,
        scale=scale,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )


def starts_at_0(cache, positions):
    """Whether token t is at position t, up to the padding, and nothing harmful lies behind it."""
    token, length = jnp.arange(positions.shape[1]), (positions >= 0).sum(axis=1)
    in_place = positions == jnp.where(token < length[:, None], token, -1)
    finite = [_is_finite_from(length, array) for array in (cache.k, cache.v)]
    return in_place.all() & finite[0] & finite[1]


def _is_finite_from(length, array):
    """Whether the slots that a tile of the last token may reach, written or not, are finite."""
    size = min(_MAX_TILE, array.shape[1])

    def tail(sequence, first):
        return lax.dynamic_slice_in_dim(sequence, first, size)

    return jnp.isfinite(jax.vmap(tail)(array, length)).all()
