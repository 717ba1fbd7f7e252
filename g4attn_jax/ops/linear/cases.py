"""Cases of `linear`, `linear_partial_sums`, `geglu` and `logits`, of all published models."""

import dataclasses
from typing import NamedTuple

from g4attn_jax import ops
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, norm_error, struct

BENCH_TOKENS = (1, 8, 32, 64)


class Weight(NamedTuple):
    """Sizes of a weight [K, matrices, N]."""

    depth: int
    matrices: int
    columns: int


def weights_of(config: Gemma4Config) -> dict[str, Weight]:
    """Weights that a decoder's step multiplies few tokens with, by what they are, each size once.

    KV-shared layers have QKV and, in E2B, gate and up and down of their own sizes.
    """
    embed, attention, others = config.hidden_size, {}, {}
    for layer in range(config.num_hidden_layers):
        spec = config.attention_spec(layer)
        is_shared = spec.mode is ProjectionMode.Q_ONLY
        rows = spec.num_kv_heads * (spec.group_size + spec.mode.num_kv_projections)
        kind = config.layer_types[layer].removesuffix("_attention")
        width = config.intermediate_size * (2 if config.use_double_wide_mlp and is_shared else 1)
        shared, wide = "shared " * is_shared, "wide " * (width > config.intermediate_size)
        attention[f"{shared}{kind} qkv"] = Weight(embed, 1, rows * spec.head_dim)
        attention[f"{kind} output"] = Weight(spec.num_q_heads * spec.head_dim, 1, embed)
        others[f"{wide}gate and up"] = Weight(embed, 2, width)
        others[f"{wide}down"] = Weight(width, 1, embed)
    if config.hidden_size_per_layer_input:
        per_layer = config.hidden_size_per_layer_input
        others["per-layer gate"] = Weight(embed, 1, per_layer)
        others["per-layer projection"] = Weight(per_layer, 1, embed)
        others["per-layer inputs"] = Weight(embed, 1, config.num_hidden_layers * per_layer)
    return attention | others | {"logits": Weight(embed, 1, config.vocab_size)}


@dataclasses.dataclass(frozen=True)
class LinearCase(Case):
    """Tokens times a weight.

    Attributes:
        depth: K.
        columns: N.
        model: whose weight it is.
        weight: what it is there, see `weights_of`.
    """

    op = "linear"

    tokens: int
    depth: int
    columns: int
    model: str = dataclasses.field(default="", kw_only=True, compare=False)
    weight: str = dataclasses.field(default="", kw_only=True, compare=False)

    @property
    def num_matrices(self) -> int:
        """Matrices of the weight."""
        return 1

    def structs(self, dtype=None) -> list:
        """(x, w)."""
        dtype = dtype or self.dtype
        matrices = () if self.num_matrices == 1 else (self.num_matrices,)
        return [
            struct(self.tokens, self.depth, dtype=dtype),
            struct(self.depth, *matrices, self.columns, dtype=dtype),
        ]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`, with results of deviation 1."""
        draw, (x, w) = Draw(seed), self.structs(dtype)
        return [draw.normal(x), draw.normal(w, self.depth**-0.5)]

    def run(self, arguments, implementation=None):
        """The product."""
        return ops.linear(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The product in float64."""
        return oracle.linear(*arguments)

    def usual(self, arguments):
        """The product, rounded once."""
        return self.exact(arguments).astype(arguments[0].dtype)

    def bytes(self) -> int:
        """The weight and tokens in, the result out."""
        x, w = self.structs()
        return nbytes([x, w, struct(self.tokens, self.columns, dtype=x.dtype)])

    error = relative_error = staticmethod(norm_error)


@dataclasses.dataclass(frozen=True)
class LinearPartialSumsCase(LinearCase):
    """Tokens times a weight, in partial sums."""

    @property
    def label(self) -> str:
        """The function."""
        return "linear_partial_sums"

    def run(self, arguments, implementation=None):
        """The partial sums."""
        return ops.linear_partial_sums(*arguments, implementation=implementation)

    def result(self, outputs):
        """The sum of the partial sums."""
        return ops.add_partial_sums(outputs, self.dtype)


@dataclasses.dataclass(frozen=True)
class GegluCase(LinearCase):
    """Tokens times the gate and up matrices, gated."""

    @property
    def label(self) -> str:
        """The function."""
        return "geglu"

    @property
    def num_matrices(self) -> int:
        """Gate and up."""
        return 2

    def run(self, arguments, implementation=None):
        """The gated products."""
        return ops.geglu(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The gated products in float64."""
        return oracle.geglu(*arguments)

    def usual(self, arguments):
        """The gated products with the usual path's roundings, of both products."""
        dtype = arguments[0].dtype
        return oracle.geglu(*arguments, rounded=lambda y: y.astype(dtype)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class LogitsCase(LinearCase):
    """Hidden states of tokens times the rows of a table."""

    @property
    def label(self) -> str:
        """The function."""
        return "logits"

    def structs(self, dtype=None) -> list:
        """(hidden, table)."""
        dtype = dtype or self.dtype
        return [
            struct(self.tokens, self.depth, dtype=dtype),
            struct(self.columns, self.depth, dtype=dtype),
        ]

    def run(self, arguments, implementation=None):
        """The products."""
        return ops.logits(*arguments, implementation=implementation)

    def exact(self, arguments):
        """The products in float64."""
        hidden, table = arguments
        return oracle.linear(hidden, table.T)

    def usual(self, arguments):
        """The products, not rounded: float32 is what the usual path makes of them."""
        return self.exact(arguments).astype("float32")

    def bytes(self) -> int:
        """The table and hidden states in, float32 out."""
        return nbytes([*self.structs(), struct(self.tokens, self.columns, dtype="float32")])


def case_of(model: str, name: str, weight: Weight, tokens: int, tags=frozenset()) -> LinearCase:
    """A weight's case: the function that the model multiplies it with."""
    if name == "logits":
        of = LogitsCase
    else:
        of = GegluCase if weight.matrices == 2 else LinearPartialSumsCase
    return of(tokens, weight.depth, weight.columns, model=model, weight=name, tags=tags)


# Compiled for GPUs that are not there, besides those of 31B: an instruction of other rows or a tile
# of other columns each.
_COMPILED = {
    ("gemma-4-e4b", "per-layer gate", 1),
    ("gemma-4-e4b", "gate and up", 1),
    ("gemma-4-e4b", "logits", 1),
    ("gemma-4-e2b", "sliding output", 8),
    ("gemma-4-e2b", "per-layer projection", 32),
    ("gemma-4-26b-a4b", "gate and up", 64),
    ("gemma-4-12b", "logits", 64),
}
_EVERYDAY = {
    ("gemma-4-31b", "down", 8),
    ("gemma-4-31b", "gate and up", 1),
    ("gemma-4-e4b", "logits", 1),
}


def _real():
    for model in Gemma4Config.preset_names():
        for name, weight in weights_of(Gemma4Config.preset(model)).items():
            for tokens in BENCH_TOKENS:
                place, tags = (model, name, tokens), {"bench", "real"}
                is_compiled = place in _COMPILED or (model == "gemma-4-31b" and name != "logits")
                tags |= {"compile"} if is_compiled else set()
                tags |= {"everyday"} if place in _EVERYDAY else set()
                yield case_of(model, name, weight, tokens, tags)


def _odd():
    # Edges of tiles and of the blocks of columns.
    for sizes in ((1, 512, 64), (3, 300, 80), (16, 64, 7000), (17, 130, 129), (64, 1024, 192)):
        tags = {"odd", "everyday"} if sizes[0] in (3, 17) else {"odd"}
        for of in (LinearCase, LinearPartialSumsCase, GegluCase, LogitsCase):
            yield of(*sizes, dtype="float32", tags=tags)


CASES = distinct(*_real(), *_odd())
