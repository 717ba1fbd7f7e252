"""From logits to the next token."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped, UInt32

_BITS = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; see `sample`. As it is, the most likely one is taken.

    Attributes:
        temperature: 0 or more; 0 takes the most likely token.
        top_k: 1 or more; None is off.
        top_p: above 0, at most 1; None is off.

    Raises:
        ValueError: a number is not accepted.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        for name, (_, accepted, _) in _PARAMETERS.items():
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            if not isinstance(value, numbers.Real):
                raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
            _parameter(name, value, batch=1)


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    *,
    temperature: float | Float[Array, " B"] = 1.0,
    top_k: int | Int[Array, " B"] | None = None,
    top_p: float | Float[Array, " B"] | None = None,
) -> Int[Array, " B"]:
    """Draws one token per sequence.

        p = softmax(logits / temperature)
        p = p of the tokens that fewer than top_k others exceed, over their sum
        p = p of the tokens that others with less than top_p in all exceed, over their sum

    The filters and their order are those of `generate` in Hugging Face transformers 5.23. Equally
    likely tokens are kept or dropped together (there top-p splits them as sorting leaves them).
    Each parameter is one for all sequences or one for each. Under `jax.jit` those that are arrays
    can change without compiling again.

    Args:
        logits: float32 [B, V]; -inf is never drawn.
        key: a key of `jax.random`; sequences draw independently of each other from it.
        temperature: 0 or more; 0 takes the most likely token, the first of several.
        top_k: 1 or more; None, or V or more, is off.
        top_p: above 0, at most 1; None, or 1, is off.

    Returns:
        int32 [B].

    Raises:
        ValueError: an argument has the wrong shape or dtype, or is a number that is not accepted.
            The numbers in JAX arrays are not looked at.
    """
    _check_logits(logits)
    batch = logits.shape[0]
    temperature = _parameter("temperature", temperature, batch)
    if top_k is not None:
        top_k = _parameter("top_k", top_k, batch)
    if top_p is not None:
        top_p = _parameter("top_p", top_p, batch)

    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if isinstance(temperature, np.ndarray) and not temperature.any():
        return best
    is_greedy = temperature == 0
    scaled = scaled_logits(logits, jnp.where(is_greedy, 1, temperature), top_k, top_p)
    drawn = jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)
    return jnp.where(is_greedy[:, 0], best, drawn)


def scaled_logits(
    logits: Float[Array, "*batch V"],
    temperature: Float[Array, "*#batch 1"],
    top_k: Int[Array, "*#batch 1"] | None,
    top_p: Float[Array, "*#batch 1"] | None,
) -> Float[Array, "*batch V"]:
    """The logits of `sample`'s p: softmax makes it of them, and those of dropped tokens are -inf.

    Parameters, as of `sample`, are not looked at. They are arrays, or scalars, that broadcast with
    the logits; temperature is above 0.
    """
    # No temperature, however low, makes the largest overflow.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        keep = _exceeded_by_less_than(top_k, scaled, jnp.ones_like(scaled))
        scaled = jnp.where(keep, scaled, -jnp.inf)
    if top_p is not None:
        keep = _exceeded_by_less_than(top_p, scaled, jax.nn.softmax(scaled, axis=-1))
        # Sums of probabilities are rounded: off is not left to them.
        scaled = jnp.where(keep | (top_p >= 1), scaled, -jnp.inf)
    return scaled


def _exceeded_by_less_than(
    limit: Shaped[Array, "*#batch 1"],
    logits: Float[Array, "*batch V"],
    weights: Float[Array, "*batch V"],
) -> Shaped[Array, "*batch V"]:
    """Which tokens have less than `limit` of weight in tokens of larger logits.

    That weight falls as logits rise, so they are all from some logit on, which is found by its
    bits: 32 passes over the logits, where sorting them would move all of them many times.
    """
    ranks = _ranks(logits)

    def clear_bit(i, lowest):
        lower = lowest - (jnp.uint32(1) << (_BITS - 1 - i))
        above = jnp.sum(jnp.where(ranks > lower, weights, 0), axis=-1, keepdims=True)
        return jnp.where(above < limit, lower, lowest)

    highest = jnp.full((*logits.shape[:-1], 1), jnp.iinfo(jnp.uint32).max)
    lowest = jax.lax.fori_loop(0, _BITS, clear_bit, highest)
    # The most likely token stays, whatever an array holds.
    return ranks >= jnp.minimum(lowest, jnp.max(ranks, axis=-1, keepdims=True))


def _ranks(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers in the order of float32 numbers."""
    # 0 and -0 are equal, and have different bits.
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << (_BITS - 1))
    return jnp.where(bits & sign, ~bits, bits | sign)


def _check_logits(logits):
    if not hasattr(logits, "shape") or logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {jnp.shape(logits)}; accepted: [B, V], neither 0")
    if logits.dtype != jnp.float32:
        raise ValueError(f"logits has dtype {logits.dtype}; accepted: float32")


def _parameter(name, value, batch):
    """As [1, 1] or [B, 1]: a NumPy array, with its numbers checked, unless it is JAX's."""
    kind, accepted, is_accepted = _PARAMETERS[name]
    if not isinstance(value, jax.Array):
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.ndarray)):
            raise ValueError(f"{name} is {value!r}; accepted: {accepted}, or an array of them")
        value = np.asarray(value)
        if kind is jnp.floating and np.issubdtype(value.dtype, np.integer):
            value = value.astype(np.float32)
    if value.shape not in ((), (batch,)):
        raise ValueError(f"{name} has shape {value.shape}; accepted: a number or [{batch}]")
    if not jnp.issubdtype(value.dtype, kind):
        raise ValueError(f"{name} has dtype {value.dtype}; accepted: {kind.__name__}")
    if isinstance(value, np.ndarray) and not is_accepted(value).all():
        raise ValueError(f"{name} is {value}; accepted: {accepted}")
    if kind is jnp.floating:
        value = value.astype(np.float32)
    return value.reshape(-1, 1)


def _not_below_0(x):
    return (x >= 0) & (x < math.inf)


def _from_1(x):
    return x >= 1


def _up_to_1(x):
    return (x > 0) & (x <= 1)


_PARAMETERS = {
    "temperature": (jnp.floating, "0 or more", _not_below_0),
    "top_k": (jnp.integer, "1 or more", _from_1),
    "top_p": (jnp.floating, "above 0, at most 1", _up_to_1),
}
