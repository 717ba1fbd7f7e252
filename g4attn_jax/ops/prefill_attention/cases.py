"""Cases of `prefill_attention`."""

import dataclasses
import itertools

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache
from g4attn_jax.ops.decode_attention.cases import AttentionCase, published, small
from g4attn_jax.testing.case import distinct

BENCH_TOKENS = (2048, 8192, 32768)


@dataclasses.dataclass(frozen=True)
class PrefillAttentionCase(AttentionCase):
    """A prompt, or a chunk of one after what the cache holds."""

    op = "prefill_attention"

    def run(self, arguments, implementation=None):
        """The output."""
        return ops.prefill_attention(
            *arguments, sliding_window=self.sliding_window, implementation=implementation
        )


_TILE = 16  # keys of the kernel's, in float32
_PAGED = {"context": 80, "page_size": 16}
_SMALL = {
    "one token": {"last": (5, 0, 40), "context": 48, "tokens": 1},
    "a prompt": {"last": (16, 16), "context": 17, "tokens": 17},
    "chunks, an empty sequence": {"last": (70, -1, 40), "context": 96, "tokens": 33},
    "sequences shorter than the chunk": {"last": (69, 3, 20), "context": 101, "tokens": 70},
    "ends around a tile": {
        "last": (2 * _TILE - 1, 2 * _TILE, 2 * _TILE + 1, 2 * _TILE - 2),
        "context": 2 * _TILE + 5,
        "tokens": 17,
    },
    "16 heads a group": {"last": (40,), "context": 64, "tokens": 33, "group": 16},
    "paged": {"last": (70, -1, 3, 79), **_PAGED, "tokens": 33},
    "compact": {
        "last": (70, 3),
        "context": 96,
        "form": CompactKVCache,
        "tokens": 17,
        "group": 3,
    },
    "compact, paged": {"last": (70, 33), **_PAGED, "form": CompactKVCache, "tokens": 33},
    "odd sizes": {
        "last": (70, 33),
        **_PAGED,
        "tokens": 17,
        "head_dim": 24,
        "num_kv_heads": 3,
        "group": 5,
    },
    "window inside a tile": {
        "last": (70, 3, 19),
        "context": 96,
        "tokens": 33,
        "sliding_window": _TILE - 6,
    },
    "window of whole tiles": {
        "last": (90, 63, 64),
        "context": 96,
        "tokens": 17,
        "sliding_window": 2 * _TILE,
    },
    "window past a tile's edge": {
        "last": (90, 63),
        "context": 96,
        "tokens": 33,
        "sliding_window": _TILE + 1,
    },
    "window of one": {"last": (70, 0), "context": 96, "tokens": 17, "sliding_window": 1},
    "window past the start": {"last": (70, 9), **_PAGED, "sliding_window": 500, "tokens": 33},
    "ring, wrapped": {
        "last": (300, 63, 64, 127, 130),
        "context": 64,
        "tokens": 20,
        "sliding_window": 40,
    },
}
_SMALL_EVERYDAY = {
    "chunks, an empty sequence",
    "16 heads a group",
    "compact, paged",
    "odd sizes",
    "window past a tile's edge",
    "window past the start",
    "ring, wrapped",
}


def _real():
    """Chunks after 500 and 547 tokens."""
    for (nkv, group, d, window, form), page_size in itertools.product(
        (
            (4, 8, 512, None, KVCache),
            (4, 8, 512, None, CompactKVCache),
            (1, 16, 512, None, CompactKVCache),
            (16, 2, 256, 512, KVCache),
            (2, 4, 256, 500, KVCache),
            (3, 5, 96, None, KVCache),
            (3, 5, 320, 77, KVCache),
        ),
        (None, 16, 64),
    ):
        yield PrefillAttentionCase(
            form,
            nkv * group,
            nkv,
            d,
            700,
            (1199, 1246),
            1280,
            sliding_window=window,
            page_size=page_size,
            tags={"odd" if nkv == 3 else "real"},
        )


def _compiled():
    # Batch, tokens, context, Nq, Nkv, D, form, window, dtype of the query, of the cache.
    bf16, f16, f32, f8 = "bfloat16", "float16", "float32", FLOAT8.name
    for number, (batch, tokens, context, *heads, form, window, dtype, storage) in enumerate(
        (
            (1, 8192, 8192, 32, 4, 512, KVCache, None, bf16, None),
            (1, 2048, 8192, 32, 4, 512, CompactKVCache, None, bf16, None),
            (1, 8192, 8192, 32, 16, 256, KVCache, 1024, bf16, None),
            (8, 33, 1088, 16, 1, 128, KVCache, 512, bf16, None),
            (2, 512, 512, 32, 4, 512, KVCache, None, bf16, f8),
            (2, 512, 512, 32, 4, 512, CompactKVCache, None, bf16, f8),
            (2, 512, 512, 32, 16, 256, KVCache, 128, bf16, f8),
            (2, 100, 512, 8, 2, 512, KVCache, None, f32, None),
            (2, 100, 512, 8, 2, 512, CompactKVCache, None, f32, None),
            (3, 100, 512, 15, 3, 320, KVCache, None, f16, None),
            (3, 100, 512, 15, 3, 24, KVCache, 7, f16, None),
            (1, 2**18, 2**18, 32, 16, 512, KVCache, 1024, bf16, None),
        )
    ):
        for page_size in (None, 16):
            tags = {"compile", "large"} if tokens == 2**18 else {"compile"}
            if number in (1, 2, 4, 9) and (page_size is None) == (number % 2 == 0):
                tags |= {"everyday"}
            yield PrefillAttentionCase(
                form,
                *heads,
                tokens,
                (context - 1,) * batch,
                context,
                sliding_window=window,
                page_size=page_size,
                dtype=dtype,
                storage=storage,
                tags=tags,
            )


def _measured():
    for (nkv, group, d, window, form, page_size), tokens in itertools.product(
        (
            (4, 8, 512, None, KVCache, None),  # 31B full
            (4, 8, 512, None, KVCache, 64),
            (4, 8, 512, None, CompactKVCache, None),
            (4, 8, 512, None, CompactKVCache, 64),
            (16, 2, 256, 1024, KVCache, None),  # 31B sliding
            (16, 2, 256, 1024, KVCache, 64),
        ),
        BENCH_TOKENS,
    ):
        yield PrefillAttentionCase(
            form,
            nkv * group,
            nkv,
            d,
            tokens,
            (tokens - 1,),
            tokens,
            sliding_window=window,
            page_size=page_size,
            tags={"bench"},
        )


CASES = distinct(
    *_measured(),
    *published(PrefillAttentionCase, (40,)),
    *small(PrefillAttentionCase, _SMALL, _SMALL_EVERYDAY),
    *_real(),
    *_compiled(),
)
