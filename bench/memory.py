"""Memory of the published models: weights, caches, and what fits on a card. Needs no GPU."""

import functools
import math

import jax
from flax import nnx

from g4attn_jax import Gemma4Config, Gemma4Decoder, Ring
from g4attn_jax.cache import model_bytes

SIZES = ("e2b", "e4b", "12b", "26b-a4b", "31b")
CARDS = (24, 32, 40, 48, 80, 96, 141)  # GB, as they are sold
CHUNK = 512  # tokens of a prompt that `Generator` reads at a time
CONTEXTS = (8 * 1024, 128 * 1024)
# Of a card. The rest is for activations, the logits of a step, programs and fragments.
USABLE = 0.9


@functools.cache
def weight_bytes(size: str) -> int:
    """Bytes of a model's weights in bfloat16."""
    decoder = nnx.eval_shape(lambda: Gemma4Decoder(config_of(size), rngs=nnx.Rngs(0)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(decoder)))


def cache_bytes(size: str, tokens: int) -> int:
    """Bytes of a sequence's caches as `Generator` makes them: rings, compact for K = V layers."""
    config = config_of(size)
    ring = Ring(1, config.sliding_window, CHUNK).capacity
    return model_bytes(config, tokens, compact=True, ring_capacity=min(ring, tokens))


def sequences(size: str, card: int, tokens: int) -> int:
    """Sequences of so many tokens that fit on a card of so many GB beside the weights."""
    free = USABLE * card * 2**30 - weight_bytes(size)
    return max(0, math.floor(free / cache_bytes(size, tokens)))


def table() -> str:
    """The README's table in Markdown: GiB, and sequences of each context on each card."""
    head = ["model", "weights", *(f"cache, {t // 1024}k" for t in CONTEXTS)]
    head += [f"{card} GB" for card in CARDS]
    lines = [head, ["---"] * len(head), *(_row(size) for size in SIZES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(size):
    name = size.upper()
    cells = [name, _gib(weight_bytes(size)), *(_gib(cache_bytes(size, t)) for t in CONTEXTS)]
    for card in CARDS:
        counts = [sequences(size, card, tokens) for tokens in CONTEXTS]
        cells.append(" / ".join(map(str, counts)) if counts[0] else "-")
    return cells


def _gib(number):
    return f"{number / 2**30:.2f}" if number < 2**30 else f"{number / 2**30:.1f}"


def config_of(size: str) -> Gemma4Config:
    """The published config of a size."""
    return Gemma4Config.preset(f"gemma-4-{size}")
