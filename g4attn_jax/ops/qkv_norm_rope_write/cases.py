"""Cases of `qkv_norm_rope_write`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, Cache, CompactKVCache, KVCache, float8_scale
from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.qkv_norm_rope.cases import added, drawn_heads, heads
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import (
    PUBLISHED_HEAD_DIMS,
    PUBLISHED_TOKENS,
    Case,
    Draw,
    cache_struct,
    distinct,
    modes_and_forms,
    nbytes,
    norm_error,
    real_layers,
    struct,
)

FORMS = (KVCache, CompactKVCache)
BENCH_TOKENS = (1, 8, 32, 128, 2048, 8192)


@dataclasses.dataclass(frozen=True)
class QkvNormRopeWriteCase(Case):
    """The prologue of a layer, which writes into a cache full of sevens.

    Attributes:
        form: of the cache.
        num_pages: of the cache; None are a few more than the tokens fill.
        unplaced_every: one token in so many has no slot; None: all have one.
        storage: name of the dtype of the cache; None is that of activations.
        partial_sums: of the packed heads, in float32; None are heads in the case's dtype.
    """

    op = "qkv_norm_rope_write"

    mode: ProjectionMode
    form: type[Cache]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    tokens: int
    page_size: int = dataclasses.field(default=16, kw_only=True)
    num_pages: int | None = dataclasses.field(default=None, kw_only=True)
    unplaced_every: int | None = dataclasses.field(default=8, kw_only=True)
    storage: str | None = dataclasses.field(default=None, kw_only=True)
    partial_sums: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        """The op, its mode, and the form that it writes."""
        return f"{self.op} {self.mode.name} {self.form.__name__}"

    @property
    def group(self) -> int:
        """G: query heads of a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def structs(self, dtype=None) -> list:
        """(qkv, q_norm, k_norm, cos, sin, slots, cache)."""
        dtype = dtype or self.dtype
        cache = cache_struct(
            self.form,
            num_pages=self.num_pages or 2 + 2 * self.tokens // self.page_size,
            page_size=self.page_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary_dim=self.rotary_dim,
            dtype=self.storage or dtype,
        )
        return [*heads(self, dtype), struct(self.tokens, dtype="int32"), cache]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`, at positions to 262143 and in random slots."""
        dtype, draw = dtype or self.dtype, Draw(seed)
        qkv, q_norm, k_norm, cos, sin = drawn_heads(self, draw, dtype)
        *_, cache = self.structs(dtype)
        slots = draw.rng.permutation(cache.v.shape[0] * self.page_size)[: self.tokens]
        if self.unplaced_every is not None:
            number = np.arange(self.tokens) % self.unplaced_every
            slots = np.where(number == self.unplaced_every - 1, -1, slots)
        cache = jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), cache)
        if cache.v.dtype == FLOAT8:
            cache = cache._replace(scale=float8_scale(k_norm))
        return [qkv, q_norm, k_norm, cos, sin, jnp.asarray(slots, jnp.int32), cache]

    def run(self, arguments, implementation=None):
        """(q, cache)."""
        return ops.qkv_norm_rope_write(
            *arguments,
            mode=self.mode,
            dtype=None if self.partial_sums is None else arguments[1].dtype,
            implementation=implementation,
        )

    def exact(self, arguments):
        """(q, cache) in float64."""
        return oracle.qkv_norm_rope_write(*added(self, arguments, np.float64), mode=self.mode)

    def usual(self, arguments):
        """(q, cache) with the usual path's roundings, of the rotation too: it stores its result."""
        return oracle.qkv_norm_rope_write(
            *added(self, arguments, arguments[1].dtype),
            mode=self.mode,
            norm=oracle.usual_rms_norm,
            turn=oracle.usual_rotate,
        )

    def bytes(self) -> int:
        """The packed buffer, cos, sin and slots in; q, and what is stored of k and v, out."""
        qkv, _, _, cos, sin, slots, cache = self.structs()
        width = self.form.query_width(self.head_dim, self.rotary_dim)
        q = struct(self.tokens, self.num_q_heads, width, dtype=self.dtype)
        moved = nbytes([qkv, cos, sin, slots, q])
        if self.mode is ProjectionMode.Q_ONLY:
            return moved
        num_slots = cache.v.shape[0] * self.page_size
        return moved + self.tokens * nbytes(cache._replace(scale=None)) // num_slots

    relative_error = staticmethod(norm_error)


def _published():
    """Every mode and form; a quarter of the dims rotates, but for QKV_FULL."""
    for (mode, form), d, tokens in itertools.product(
        modes_and_forms(FORMS), PUBLISHED_HEAD_DIMS, PUBLISHED_TOKENS
    ):
        rotary_dim = d if mode is ProjectionMode.QKV_FULL else d // 4
        tags = {"published", "everyday"} if tokens == 7 and d < 512 else {"published"}
        yield QkvNormRopeWriteCase(mode, form, 16, 8, d, rotary_dim, tokens, tags=tags)


def _real():
    for spec, form, tokens in itertools.product(real_layers(), FORMS, (1, 33, 1030)):
        if spec.mode in form.modes:
            sizes = spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim
            yield QkvNormRopeWriteCase(spec.mode, form, *sizes, tokens, tags={"real"})
            partial_sums = {1: 8, 33: 3, 1030: 1}[tokens]
            yield QkvNormRopeWriteCase(
                spec.mode, form, *sizes, tokens, partial_sums=partial_sums, tags={"real"}
            )


def _odd():
    for (mode, form), (d, rotary_dim) in itertools.product(
        modes_and_forms(FORMS), ((2, 2), (34, 12), (96, 96), (320, 64))
    ):
        yield QkvNormRopeWriteCase(mode, form, 15, 3, d, rotary_dim, 1300, tags={"odd"})
        yield QkvNormRopeWriteCase(
            mode, form, 15, 3, d, rotary_dim, 9, partial_sums=3, tags={"odd"}
        )


def _compiled():
    # One of each launch configuration.
    for mode, form, *sizes in (
        (ProjectionMode.QK_ONLY, KVCache, 32, 4, 512, 128, 1),
        (ProjectionMode.QK_ONLY, CompactKVCache, 32, 4, 512, 128, 8192),
        (ProjectionMode.QKV_FULL, KVCache, 32, 16, 256, 256, 2048),
        (ProjectionMode.QKV_FULL, KVCache, 15, 3, 96, 24, 33),
        (ProjectionMode.Q_ONLY, KVCache, 8, 1, 512, 128, 128),
        (ProjectionMode.Q_ONLY, CompactKVCache, 8, 1, 512, 128, 5),
    ):
        pages = {"num_pages": 1024, "page_size": 64}
        for storage in (None, FLOAT8.name):
            tags = {"compile", "everyday"} if storage is None or "QK" in mode.name else {"compile"}
            yield QkvNormRopeWriteCase(mode, form, *sizes, **pages, storage=storage, tags=tags)
    for mode, form, *sizes in (
        (ProjectionMode.QKV_FULL, KVCache, 8, 2, 256, 256, 1),
        (ProjectionMode.QK_ONLY, CompactKVCache, 16, 1, 512, 128, 8),
        (ProjectionMode.Q_ONLY, KVCache, 8, 2, 512, 128, 32),
    ):
        for partial_sums in (1, 8):
            yield QkvNormRopeWriteCase(
                mode, form, *sizes, **pages, partial_sums=partial_sums, tags={"compile"}
            )


def _measured():
    for (mode, form, *sizes), tokens in itertools.product(
        (
            (ProjectionMode.QK_ONLY, KVCache, 32, 4, 512, 128),  # 31B full
            (ProjectionMode.QK_ONLY, CompactKVCache, 32, 4, 512, 128),
            (ProjectionMode.QK_ONLY, CompactKVCache, 16, 1, 512, 128),  # 12B full
            (ProjectionMode.QKV_FULL, KVCache, 32, 16, 256, 256),  # 31B sliding
            (ProjectionMode.Q_ONLY, KVCache, 8, 1, 512, 128),  # E2B full, KV-shared
        ),
        BENCH_TOKENS,
    ):
        pages = {"num_pages": 1024, "page_size": 64, "unplaced_every": None}
        yield QkvNormRopeWriteCase(mode, form, *sizes, tokens, **pages, tags={"bench"})


def _exported():
    for mode, form, tags in (
        (ProjectionMode.QK_ONLY, CompactKVCache, {"export"}),
        (ProjectionMode.QKV_FULL, KVCache, {"export", "everyday"}),
    ):
        yield QkvNormRopeWriteCase(mode, form, 32, 4, 512, 128, 8, tags=tags)


CASES = distinct(*_measured(), *_published(), *_real(), *_odd(), *_compiled(), *_exported())
