"""Checks of a `Generator`'s arguments: messages name the argument and what is accepted."""

import jax
import numpy as np

from g4attn_jax.checks import check_integer, check_type
from g4attn_jax.config import Gemma4Config
from g4attn_jax.generation.prompts import check_tokens
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.embedding import num_embedded_tokens
from g4attn_jax.model.sampling import Sampling
from g4attn_jax.speculative import MAX_DRAFT_TOKENS

# Drafts in a step unless told otherwise: what `python -m bench run speculative` measures.
_DRAFT_TOKENS = 4


def check_choices(sampling: Sampling, config: Gemma4Config) -> None:
    """Refuses a sampling that leaves no token, or one which the model cannot read next.

    Raises:
        ValueError: it is no `Sampling`, suppresses what is no token or all of them, or does not
            suppress a token without a per-layer embedding.
    """
    check_type("sampling", sampling, Sampling)
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
    check_type("assistant", assistant, Gemma4Assistant, none=True)
    try:
        assistant.config.check_target(decoder.config)
    except ValueError as error:
        raise ValueError(f"assistant was made for another decoder: {error}") from error
    if assistant.dtype != decoder.dtype:
        raise ValueError(f"assistant has dtype {assistant.dtype}; the decoder has {decoder.dtype}")
    if draft_tokens is None:
        return _DRAFT_TOKENS
    return check_integer("draft_tokens", draft_tokens, most=MAX_DRAFT_TOKENS)


def check_weights(weights):
    if any(isinstance(weight, jax.ShapeDtypeStruct) for weight in weights):
        raise ValueError(
            "the decoder or the assistant is abstract; accepted: models with weights, as the new "
            "ones that load_hf and load_assistant return"
        )
