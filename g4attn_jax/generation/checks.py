"""What a `Generator` is given, checked: the message names it, and says what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax.cache import FLOAT8
from g4attn_jax.config import Gemma4Config
from g4attn_jax.generation.prompts import check_tokens
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.embedding import num_embedded_tokens
from g4attn_jax.model.sampling import Sampling
from g4attn_jax.speculative import check_draft_tokens

# Drafts in a step unless told otherwise: what `bench/speculative.py` measures.
_DRAFT_TOKENS = 4


def check_sampling(sampling: Sampling) -> None:
    """Refuses what is no `Sampling`."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is a {type(sampling).__name__}; accepted: Sampling")


def check_choices(sampling: Sampling, config: Gemma4Config) -> None:
    """Refuses a sampling that leaves no token, or one which the model cannot read next.

    Raises:
        ValueError: it is no `Sampling`, suppresses what is no token or all of them, or does not
            suppress a token without a per-layer embedding.
    """
    check_sampling(sampling)
    suppressed = check_tokens("suppress_tokens", sampling.suppress_tokens, config.vocab_size)
    if np.unique(suppressed).size == config.vocab_size:
        raise ValueError(
            f"suppress_tokens has all {config.vocab_size} tokens; accepted: all but one, or fewer"
        )
    embedded, vocab_size = num_embedded_tokens(config), config.vocab_size
    allowed = set(range(embedded, vocab_size)).difference(sampling.suppress_tokens)
    if allowed:
        raise ValueError(
            f"sampling could choose {min(allowed)}, which has no per-layer embedding "
            f"(vocab_size is {vocab_size}, vocab_size_per_layer_input {embedded}); accepted: "
            f"suppress_tokens with all of {embedded} to {vocab_size - 1}"
        )


def check_assistant(decoder, assistant, draft_tokens):
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


def check_cache_dtype(cache_dtype, decoder):
    accepted = decoder.dtype, FLOAT8
    refusal = f"accepted: {accepted[0]} or {accepted[1]}"
    try:
        dtype = jnp.dtype(cache_dtype)
    except TypeError as error:
        raise ValueError(f"cache_dtype is {cache_dtype!r}; {refusal}") from error
    if dtype not in accepted:
        raise ValueError(f"cache_dtype is {dtype}; {refusal}")


def check_weights(params):
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "the decoder or the assistant is abstract; accepted: models with weights, as the new "
            "ones that load_hf and load_assistant return"
        )


def check_number(name, number, most=None):
    is_int = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not is_int or number < 1 or (most is not None and number > most):
        accepted = "or more" if most is None else f"to {most}"
        raise ValueError(f"{name} is {number!r}; accepted: an integer of 1 {accepted}")
