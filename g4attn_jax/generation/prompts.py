"""Prompts, checked and cut into chunks."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS


def chunks(
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


def following(
    prompts: Sequence[Int[np.ndarray, " length"]], positions: Int[np.ndarray, "B T"]
) -> Int[np.ndarray, "B T"]:
    """The token after each position of a chunk; 0 where the chunk has padding."""
    tokens = np.zeros_like(positions)
    for row, prompt in enumerate(prompts):
        is_token = positions[row] >= 0
        tokens[row, is_token] = prompt[positions[row, is_token] + 1]
    return tokens


def check_prompts(prompts, vocab_size, max_length, limits="this capacity and max_new_tokens"):
    """Each as int32 [n]; `limits` says what max_length was made of."""
    prompts = as_list("prompts", prompts, "sequences of tokens")
    if not prompts:
        raise ValueError("prompts is empty; accepted: one prompt or more")
    checked = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        tokens = check_tokens(name, prompt, vocab_size)
        if tokens.size == 0:
            raise ValueError(f"{name} is empty; accepted: one token or more")
        if tokens.size > max_length:
            raise ValueError(
                f"{name} has {tokens.size} tokens; accepted with {limits}: up to {max_length}"
            )
        checked.append(tokens)
    return checked


def check_embedded(prompts, num_embedded):
    """Refuses tokens of the vocabulary that have no per-layer embedding."""
    for index, prompt in enumerate(prompts):
        wrong = prompt >= num_embedded
        if wrong.any():
            raise ValueError(
                f"prompts[{index}] has {prompt[wrong][0]}, which has no per-layer embedding; "
                f"accepted with vocab_size_per_layer_input {num_embedded}: tokens 0 to "
                f"{num_embedded - 1}"
            )


def check_tokens(name, tokens, vocab_size):
    """Tokens as int32 [n], refused if the vocabulary does not have them."""
    refusal = f"{name} is {tokens!r}; accepted: a sequence of tokens"
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # sequences of unequal lengths
        raise ValueError(refusal) from error
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(refusal)
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        raise ValueError(f"{name} has {array[wrong][0]}; accepted: tokens 0 to {vocab_size - 1}")
    return array.astype(np.int32)


def as_list(name, values, accepted):
    """The list of what can be iterated over; else a ValueError that says what is accepted."""
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{name} is {values!r}; accepted: {accepted}") from error
