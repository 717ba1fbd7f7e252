"""Choice of the next token from logits."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

_BITS = 32

_PARAMETERS = {
    "temperature": (
        numbers.Real,
        "0 or more, finite in float32",
        lambda x: 0 <= x <= np.finfo(np.float32).max.item(),
    ),
    "top_k": (numbers.Integral, "an integer of 1 or more, or None", lambda x: x >= 1),
    "top_p": (numbers.Real, "above 0, at most 1, or None", lambda x: 0 < x <= 1),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature and filters of drawing tokens; by default the most likely token is taken.

        p = softmax(logits / temperature), of tokens that are not suppressed
        p = p of the tokens that fewer than top_k others exceed, over their sum
        p = p of the tokens that others with less than top_p in all exceed, over their sum

    The filters and their order are those of `generate` in Hugging Face transformers 5.24. Equally
    likely tokens are kept or dropped together (there top-p splits them as sorting leaves them), and
    those of logit -inf are never drawn.

    Attributes:
        temperature: 0 or more, finite in float32; 0 takes the most likely token, the first of
            several.
        top_k: 1 or more; None, or the size of the vocabulary or more, is off.
        top_p: above 0, at most 1; None, or 1, is off.
        suppress_tokens: never chosen, greedily neither; any iterable of tokens, held as a tuple.

    Raises:
        ValueError: an argument is none that is accepted.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "suppress_tokens", _tokens(self.suppress_tokens))
        for name, (kind, accepted, is_accepted) in _PARAMETERS.items():
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            # A float16 would be compared in float16, where the largest temperature is inf.
            number = value.item() if isinstance(value, np.generic) else value
            is_kind = isinstance(number, kind) and not isinstance(number, bool)
            if not is_kind or not is_accepted(number):
                raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


def _tokens(given):
    refusal = f"suppress_tokens is {given!r}; accepted: a sequence of tokens, integers of 0 or more"
    try:
        tokens = tuple(given)
    except TypeError as error:
        raise ValueError(refusal) from error
    for token in tokens:
        is_integer = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        if not is_integer or token < 0:
            raise ValueError(refusal)
    return tuple(map(int, tokens))


def without_suppressed(
    logits: Float[Array, "*batch V"], suppressed: Bool[Array, " V"] | None
) -> Float[Array, "*batch V"]:
    """Logits that are -inf for suppressed tokens; None suppresses none.

    Source: `SuppressTokensLogitsProcessor` of Hugging Face transformers 5.24, which runs before
    temperature, top-k and top-p.
    """
    return logits if suppressed is None else jnp.where(suppressed, -jnp.inf, logits)


def token_log_probs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """log(softmax(logits)) of one token of each row, without an array of all of them.

        logits[token] - log(sum(exp(logits)))

    A negative token stands for none: its number means nothing.
    """
    of_token = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return of_token - jax.nn.logsumexp(logits, axis=-1)


def scaled_logits(
    logits: Float[Array, "*batch V"],
    temperature: Float[Array, "*#batch 1"],
    top_k: Int[Array, "*#batch 1"] | None,
    top_p: Float[Array, "*#batch 1"] | None,
) -> Float[Array, "*batch V"]:
    """The logits of `Sampling`'s p: softmax makes it of them, and those of dropped tokens are -inf.

    Parameters, as of `Sampling`, are not looked at. They are arrays, or scalars, that broadcast
    with the logits; temperature is above 0.
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
    """Mask of tokens with less than `limit` of weight in tokens of larger logits.

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
