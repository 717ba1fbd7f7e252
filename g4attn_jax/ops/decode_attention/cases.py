"""Cases of `decode_attention`, and what those of `prefill_attention` share with them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, Cache, CompactKVCache, KVCache
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import (
    PUBLISHED_HEAD_DIMS,
    PUBLISHED_HEADS,
    Case,
    Draw,
    cache_struct,
    distinct,
    nbytes,
    norm_error,
    struct,
)

FORMS = (KVCache, CompactKVCache)
NAN = (np.nan,)
# What unheld slots of arrays with an infinity hold by turns.
NOT_FINITE = (np.nan, np.inf, -np.inf)


@dataclasses.dataclass(frozen=True)
class AttentionCase(Case):
    """Attention of new tokens over the cache of a layer, in which sequences have come far.

    Attributes:
        tokens: T, new ones of a sequence.
        last: position of the newest token of each sequence, -1 for none.
        context: slots of a sequence. With a window it may be less than `last`: a ring.
        page_size: None is a contiguous cache, otherwise pages are in random order.
        storage: name of the dtype of the cache; None is that of the query.
    """

    form: type[Cache]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    last: tuple[int, ...]
    context: int
    rotary_dim: int = dataclasses.field(default=128, kw_only=True)
    sliding_window: int | None = dataclasses.field(default=None, kw_only=True)
    page_size: int | None = dataclasses.field(default=None, kw_only=True)
    storage: str | None = dataclasses.field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        """The op, the form that it reads, and the window."""
        window = "" if self.sliding_window is None else f" window {self.sliding_window}"
        return f"{self.op} {self.form.__name__}{window}"

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.last)

    @property
    def group(self) -> int:
        """G: query heads of a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def layout(self) -> str:
        """Layout of the cache, in words."""
        return "contiguous" if self.page_size is None else f"paged({self.page_size})"

    @property
    def is_full(self) -> bool:
        """Whether sequences fill their slots; otherwise some pages are of no sequence."""
        return min(self.last) + 1 >= self.context

    @property
    def positions(self) -> np.ndarray:
        """Positions of the new tokens, int32 [B, T], -1 for padding."""
        last = np.array(self.last, np.int32)[:, None]
        return np.maximum(last + np.arange(1 - self.tokens, 1, dtype=np.int32), -1)

    def structs(self, dtype=None) -> list:
        """(q, cache, page_table, positions)."""
        dtype, page_size = dtype or self.dtype, self.page_size or self.context
        columns = -(-self.context // page_size)
        spare = 3 if self.page_size is not None and not self.is_full else 0
        cache = cache_struct(
            self.form,
            num_pages=self.batch * columns + spare,
            page_size=page_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary_dim=self.rotary_dim,
            dtype=self.storage or dtype,
        )
        width = self.form.query_width(self.head_dim, self.rotary_dim)
        table = None
        if self.page_size is not None:
            table = struct(self.batch, columns, dtype="int32")
        return [
            struct(self.batch, self.tokens, self.num_q_heads, width, dtype=dtype),
            cache,
            table,
            struct(self.batch, self.tokens, dtype="int32"),
        ]

    def arguments(self, dtype=None, seed=0, poison=NAN) -> list:
        """Random arrays of `structs`: scores of deviation 1, poison in slots of no sequence.

        Args:
            dtype: of the query.
            seed: another one gives other numbers.
            poison: numbers that take turns.
        """
        q, cache, table, _ = self.structs(dtype)
        draw = Draw(seed)
        if table is not None:
            pages = draw.rng.permutation(cache.v.shape[0])[: table.size]
            table = jnp.asarray(pages.reshape(table.shape), jnp.int32)
        held = None if self.is_full else self._held(cache.v.shape[:2], table)
        arrays = [_stored(draw.normal(array), held, poison) for array in jax.tree.leaves(cache[:2])]
        scale = None if cache.scale is None else jnp.array([0.5, 0.25])
        q = draw.normal(q, q.shape[-1] ** -0.5)
        return [q, type(cache)(*arrays, scale), table, jnp.asarray(self.positions)]

    def _held(self, shape, table):
        """Slots that a sequence has written, [num_pages, page_size]."""
        held = np.zeros(shape, bool)
        capacity = self.context if table is None else table.shape[1] * self.page_size
        for sequence, last in enumerate(self.last):
            place = np.unique(np.arange(last + 1)[-capacity:] % capacity)
            page = sequence if table is None else np.asarray(table)[sequence, place // shape[1]]
            held[page, place % shape[1]] = True
        return held

    def exact(self, arguments):
        """The output in float64."""
        return oracle.cached_attention(*arguments, sliding_window=self.sliding_window)

    def usual(self, arguments):
        """The output with the usual path's roundings."""
        return oracle.usual_cached_attention(*arguments, sliding_window=self.sliding_window)

    def bytes(self) -> int:
        """Slots that a token sees and queries in, outputs out."""
        q, cache, *_ = self.structs()
        window = self.context
        if self.sliding_window is not None:
            window = self.sliding_window + self.tokens - 1
        slots = sum(min(last + 1, self.context, window) for last in self.last)
        num_slots = cache.v.shape[0] * cache.v.shape[1]
        output = struct(*q.shape[:-1], self.head_dim, dtype=q.dtype)
        return slots * nbytes(cache._replace(scale=None)) // num_slots + nbytes([q, output])

    def flops(self) -> int:
        """Operations of both products over what a token sees: nothing masked, no absorbed query."""
        seen = self.positions.astype(np.int64) + 1
        if self.sliding_window is not None:
            seen = np.minimum(seen, self.sliding_window)
        return 4 * self.head_dim * self.num_q_heads * int(seen.sum())

    error = relative_error = staticmethod(norm_error)


@dataclasses.dataclass(frozen=True)
class DecodeAttentionCase(AttentionCase):
    """A decode step or a verification.

    Attributes:
        num_splits: of the op.
    """

    op = "decode_attention"

    num_splits: int | None = dataclasses.field(default=None, kw_only=True)

    def run(self, arguments, implementation=None):
        """The output."""
        return ops.decode_attention(
            *arguments,
            sliding_window=self.sliding_window,
            num_splits=self.num_splits,
            implementation=implementation,
        )


def _stored(array, held, poison):
    if held is None:
        return array
    poison = np.resize(np.asarray(poison, np.float32), array.shape[-1]).astype(array.dtype)
    return jnp.asarray(np.where(held[..., None, None], array, poison))


def published(of, tokens):
    """Sliding, full, and full with K = V over the published head dims and heads.

    Args:
        of: class of the cases.
        tokens: numbers of new tokens; the first is for everyday.
    """
    for d, (nq, nkv), m in itertools.product(PUBLISHED_HEAD_DIMS, PUBLISHED_HEADS, tokens):
        for form, window in ((KVCache, 50), (KVCache, None), (CompactKVCache, None)):
            everyday = m == tokens[0] and (d, nkv) in ((128, 16), (256, 8))
            yield of(
                form,
                nq,
                nkv,
                d,
                m,
                (149, max(m, 50), -1),
                150,
                rotary_dim=d // 4,
                sliding_window=window,
                page_size=16,
                tags={"published", "everyday"} if everyday else {"published"},
            )


_TILE = 64  # keys of the kernel's
_SMALL = {
    "one token": {"last": (5, 0, 40), "context": 48},
    "empty and full sequences": {"last": (-1, 0, 143), "context": 144, "tokens": 2},
    "ends around a tile": {"last": (_TILE - 1, _TILE, _TILE + 1, _TILE - 2), "context": 150},
    "several tokens": {"last": (70, 3, 15), "context": 96, "tokens": 6},
    "16 tokens, 16 heads a group": {"last": (60, 20), "context": 64, "tokens": 16, "group": 16},
    "paged": {"last": (70, -1, 3, 79), "context": 80, "page_size": 16, "tokens": 3},
    "compact": {
        "last": (70, 3),
        "context": 96,
        "form": CompactKVCache,
        "tokens": 2,
        "group": 3,
    },
    "compact, paged": {
        "last": (70, 33),
        "context": 80,
        "page_size": 16,
        "form": CompactKVCache,
    },
    "odd sizes": {
        "last": (70, 33),
        "context": 80,
        "page_size": 16,
        "head_dim": 24,
        "num_kv_heads": 3,
        "group": 5,
    },
    "window inside a tile": {"last": (70, 3, 19), "context": 96, "sliding_window": 10},
    "window of whole tiles": {"last": (200, 127, 128), "context": 256, "sliding_window": _TILE},
    "window of one": {"last": (70, 0), "context": 96, "sliding_window": 1},
    "window past the start": {
        "last": (70, 9),
        "context": 80,
        "page_size": 16,
        "sliding_window": 500,
        "tokens": 4,
    },
    "ring, wrapped": {
        "last": (300, 63, 64, 127, 130),
        "context": 64,
        "sliding_window": 56,
        "tokens": 4,
    },
}
_SMALL_EVERYDAY = {
    "empty and full sequences",
    "16 tokens, 16 heads a group",
    "paged",
    "compact, paged",
    "odd sizes",
    "window past the start",
    "ring, wrapped",
}


def small(of, sizes, everyday):
    """Cases in float32 of few and small heads.

    Args:
        of: class of the cases.
        sizes: of each, by what it is about.
        everyday: those that are.
    """
    for about, given in sizes.items():
        default = {"form": KVCache, "num_kv_heads": 2, "group": 2, "head_dim": 16, "tokens": 1}
        given = default | {"rotary_dim": 8} | given
        yield of(
            num_q_heads=given["num_kv_heads"] * given.pop("group"),
            **given,
            dtype="float32",
            about=about,
            tags={"odd", "everyday"} if about in everyday else {"odd"},
        )


def _real():
    """Sequences that do not fill their slots."""
    for (batch, context, nkv, group, d, window, tokens), form in itertools.product(
        (
            (2, 5000, 4, 8, 512, None, 1),
            (1, 4096, 1, 16, 512, None, 6),
            (2, 192, 1, 8, 512, None, 6),
            (3, 1024, 16, 2, 256, 1024, 4),
            (2, 2048, 2, 4, 256, 512, 16),
        ),
        FORMS,
    ):
        last = tuple(context - 1 - 100 * sequence for sequence in range(batch))
        sizes = nkv * group, nkv, d, tokens, last, context
        yield DecodeAttentionCase(form, *sizes, sliding_window=window, tags={"real"})


def _compiled():
    # One of each launch configuration and kind of cache: batch, context, Nq, Nkv, D, form, tokens,
    # dtype of the query, of the cache.
    bf16, f16, f32 = "bfloat16", "float16", "float32"
    for number, (batch, context, *heads, form, tokens, dtype, storage) in enumerate(
        (
            (8, 8192, 32, 4, 512, KVCache, 1, bf16, None),
            (8, 8192, 32, 4, 512, CompactKVCache, 1, bf16, None),
            (1, 131072, 32, 4, 512, CompactKVCache, 6, bf16, None),
            (2, 4096, 16, 1, 512, KVCache, 16, bf16, None),
            (32, 1088, 32, 16, 256, KVCache, 1, bf16, None),
            (1, 1088, 32, 16, 256, KVCache, 6, bf16, None),
            (2, 512, 8, 2, 512, KVCache, 1, f32, None),
            (2, 512, 8, 2, 512, CompactKVCache, 6, f32, None),
            (3, 100, 15, 3, 96, KVCache, 3, f16, None),
            (3, 100, 8, 1, 320, KVCache, 6, f16, None),
            (3, 100, 8, 1, 320, CompactKVCache, 6, f16, None),
            (8, 8192, 32, 4, 512, KVCache, 1, bf16, FLOAT8.name),
            (8, 8192, 32, 4, 512, CompactKVCache, 6, bf16, FLOAT8.name),
        )
    ):
        for page_size in (None, 64):
            everyday = number in (0, 2, 4, 10, 11) and (page_size is None) == (number % 2 == 0)
            yield DecodeAttentionCase(
                form,
                *heads,
                tokens,
                (context - 1,) * batch,
                context,
                page_size=page_size,
                dtype=dtype,
                storage=storage,
                tags={"compile", "everyday"} if everyday else {"compile"},
            )


def _measured():
    for batch, context, nkv, group, d, window in (
        (1, 32768, 4, 8, 512, None),
        (8, 8192, 4, 8, 512, None),
        (32, 8192, 4, 8, 512, None),
        (8, 32768, 1, 16, 512, None),
        (1, 131072, 4, 8, 512, None),
        (32, 1024, 16, 2, 256, 1024),
        (1, 1024, 16, 2, 256, 1024),
        (8, 8192, 1, 8, 512, None),
    ):
        is_31b_or_12b = d == 512 and nkv * group >= 16  # layers with K = V
        forms = FORMS if is_31b_or_12b else (KVCache,)
        for form, tokens, page_size in itertools.product(forms, (1, 6), (None, 64)):
            yield DecodeAttentionCase(
                form,
                nkv * group,
                nkv,
                d,
                tokens,
                (context - 1,) * batch,
                context,
                sliding_window=window,
                page_size=page_size,
                tags={"bench"},
            )


def _exported():
    # One split, so one kernel, as the other ops have.
    for form, length, context in ((KVCache, 8192, 8192), (CompactKVCache, 100, 128)):
        sizes = 32, 4, 512, 1, (length - 1,) * 8, context
        yield DecodeAttentionCase(form, *sizes, page_size=64, num_splits=1, tags={"export"})


CASES = distinct(
    *_measured(),
    *published(DecodeAttentionCase, (1, 6)),
    *small(DecodeAttentionCase, _SMALL, _SMALL_EVERYDAY),
    *_real(),
    *_compiled(),
    *_exported(),
)
