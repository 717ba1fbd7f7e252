"""Tables of attention shapes: all of some sizes, and few in which every two sizes meet."""

import itertools
from collections.abc import Iterator

import numpy as np

from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS
from g4attn_jax.ops.decode_attention.cases import NOT_FINITE, AttentionCase, DecodeAttentionCase
from g4attn_jax.ops.prefill_attention.cases import PrefillAttentionCase
from tests.pairwise import pairwise

GROUPS = (1, 2, 4, 8, 16, 32, 64)
KV_HEADS = (1, 2, 4)
LAYOUTS = ("contiguous", "paged", "ring")
HEAD_DIMS = (512, 256)
SPLITS = (None, 1, 7, 64)
PREFILL_TOKENS = range(1, 131)
_PAGE_SIZE, _PAGES, _WINDOW = 64, 16, 200
# Tokens and heads a group of which two blocks of a cluster have the middle token both.
ODD_IN_TWO_BLOCKS = ((9, 8), (11, 8), (13, 8), (15, 8), (5, 16), (7, 16), (3, 32))
# Of weights and outputs in bfloat16, norm-wise.
MAX_ERROR = 3e-3


def shape(
    of: type[AttentionCase],
    tokens: int,
    group: int,
    num_kv_heads: int,
    compact: bool,
    layout: str = "contiguous",
    head_dim: int = 512,
    num_splits: int | None = None,
) -> AttentionCase:
    """A case of four sequences: one that is full, one within a tile, one of a tile, an empty one.

    Of a ring the window is 200; other layouts keep every token.
    """
    last = (1023, 449, 63, -1)
    if of is PrefillAttentionCase:  # after 70, 57 and no tokens
        last = (tokens + 69, tokens + 56, tokens - 1, -1)
    form, window, context = KVCache, None, _PAGE_SIZE * _PAGES
    if compact:
        form = CompactKVCache
    if layout == "ring":
        window, context = _WINDOW, -(-(_WINDOW + tokens) // _PAGE_SIZE) * _PAGE_SIZE
    splits = "" if num_splits is None else f"-splits{num_splits}"
    name = f"T{tokens}-G{group}-Nkv{num_kv_heads}-{'compact' if compact else 'separate'}"
    return of(
        form,
        num_kv_heads * group,
        num_kv_heads,
        head_dim,
        tokens,
        last,
        context,
        sliding_window=window,
        page_size=_PAGE_SIZE if layout == "paged" else None,
        about=f"{name}-{layout}-D{head_dim}{splits}",
        **({} if num_splits is None else {"num_splits": num_splits}),
    )


def error(case: AttentionCase) -> float:
    """The output's against float64, by norms; NaN if padding is not 0."""
    arguments = case.arguments(poison=NOT_FINITE)
    o = np.asarray(case.run(arguments), np.float64)
    if (o[case.positions < 0] != 0).any():
        return np.nan
    return case.error(o, case.exact(arguments))


def whole_decode() -> Iterator[AttentionCase]:
    """Every number of tokens, group, number of KV heads and form at head_dim 512; `some_decode`."""
    tokens = range(1, MAX_DECODE_TOKENS + 1)
    for t, group, heads, compact in itertools.product(tokens, GROUPS, KV_HEADS, (False, True)):
        yield shape(DecodeAttentionCase, t, group, heads, compact)
    yield from some_decode()


def some_decode() -> Iterator[AttentionCase]:
    """Shapes in which every two sizes meet, and the odd ones in two blocks over every layout."""
    tokens = (1, 2, 3, 4, 5, 6, 8, 9, 11, 15, 16)
    factors = tokens, GROUPS, KV_HEADS, (False, True), LAYOUTS, HEAD_DIMS, SPLITS
    shapes = [shape(DecodeAttentionCase, *row) for row in pairwise(*factors)]
    odd = itertools.product(ODD_IN_TWO_BLOCKS, (False, True), LAYOUTS[:2])
    for i, ((t, group), compact, layout) in enumerate(odd):
        splits, heads = SPLITS[i % 4], KV_HEADS[i % 3]
        shapes.append(shape(DecodeAttentionCase, t, group, heads, compact, layout, 512, splits))
    yield from dict.fromkeys(shapes)


def whole_prefill() -> Iterator[AttentionCase]:
    """Every number of tokens and form at head_dim 512, 8 heads a group; `some_prefill`."""
    for t, compact in itertools.product(PREFILL_TOKENS, (False, True)):
        yield shape(PrefillAttentionCase, t, 8, KV_HEADS[t % 3], compact)
    yield from some_prefill()


def some_prefill() -> Iterator[AttentionCase]:
    """Shapes in which every two sizes meet, of tokens around the sizes of tiles."""
    tokens = (1, 16, 17, 33, 64, 65, 129, 130)
    factors = tokens, GROUPS, KV_HEADS, (False, True), LAYOUTS, HEAD_DIMS
    for row in pairwise(*factors):
        yield shape(PrefillAttentionCase, *row)
