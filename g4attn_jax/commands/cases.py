"""Cases that `check` and the tests run: arguments, the op, and what NumPy says of it."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops
from g4attn_jax.cache import Cache, CompactKVCache, KVCache
from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS
from g4attn_jax.rope import rope_cos_sin
from g4attn_jax.testing import oracle

# The sweep of the original kernel's tests (SGLang PR 25461).
HEAD_DIMS = (128, 256, 512)
HEADS = ((32, 16), (16, 8))
TOKENS = (1, 7, 64, 1024)


@dataclasses.dataclass(frozen=True)
class NormCase:
    """A norm on one shape; `mode` None is `q_keqv_rms_norm`, the rest is `qkv_rms_norm`."""

    mode: ProjectionMode | None
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int

    @property
    def op(self) -> str:
        """Name and mode of the op."""
        return "q_keqv_rms_norm" if self.mode is None else f"qkv_rms_norm {self.mode.name}"

    def arguments(self, dtype=jnp.bfloat16, seed=0) -> list[jax.Array]:
        """Random buffers and scales, of magnitudes as trained ones have."""
        rng = np.random.default_rng(seed)
        m, nq, nkv, d = self.tokens, self.num_q_heads, self.num_kv_heads, self.head_dim
        if self.mode is None:
            shapes = [(m, nq, d), (m, nkv, d)]
        else:
            shapes = [(m, nkv, nq // nkv + self.mode.num_kv_projections, d)]
        buffers = [_normal(rng, shape, dtype, 3) for shape in shapes]
        # Up to 1.25, so that no result reaches 8, where half an ulp of bfloat16 is above 2e-2.
        scales = jnp.asarray(rng.uniform(0.5, 1.25, (2, d)), dtype)
        return [*buffers, *(scales[:1] if self.mode is ProjectionMode.Q_ONLY else scales)]

    def run(self, arguments, implementation):
        """The op's outputs."""
        if self.mode is None:
            return ops.q_keqv_rms_norm(*arguments, implementation=implementation)
        return ops.qkv_rms_norm(*arguments, mode=self.mode, implementation=implementation)

    def exact(self, arguments):
        """The op's outputs in float64."""
        return self._in_numpy(arguments, oracle.rms_norm)

    def usual(self, arguments):
        """The op's outputs with the usual path's roundings."""
        return self._in_numpy(arguments, oracle.usual_rms_norm)

    def _in_numpy(self, arguments, norm):
        if self.mode is None:
            return oracle.q_keqv_rms_norm(*arguments, norm=norm)
        return oracle.qkv_rms_norm(*arguments, mode=self.mode, norm=norm)

    error = staticmethod(oracle.max_error)

    @staticmethod
    def relative_error(actual, exact) -> float:
        """The largest of all elements."""
        return oracle.max_error(actual / exact, 1.0)


@dataclasses.dataclass(frozen=True)
class PrologueCase:
    """`qkv_norm_rope_write` on one shape, into a cache full of sevens."""

    mode: ProjectionMode
    form: type[Cache]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    tokens: int
    page_size: int = 16

    @property
    def op(self) -> str:
        """Name and mode of the op, and what it writes."""
        return f"qkv_norm_rope_write {self.mode.name} {self.form.__name__}"

    def arguments(self, dtype=jnp.bfloat16, seed=0) -> list:
        """Random heads, scales, positions to 262143 and slots, one token in eight without one."""
        rng = np.random.default_rng(seed)
        m, nkv, d = self.tokens, self.num_kv_heads, self.head_dim
        group = self.num_q_heads // nkv
        shape = (m, nkv, group + self.mode.num_kv_projections, d)
        qkv = _normal(rng, shape, dtype, 3)
        # Below 1, so that no rotated pair reaches 8, as above.
        q_norm, k_norm = jnp.asarray(rng.uniform(0.25, 0.75, (2, d)), dtype)
        positions = jnp.asarray(rng.integers(0, 262144, m), jnp.int32)
        cos, sin = rope_cos_sin(positions, theta=1e6, head_dim=d, rotary_dim=self.rotary_dim)
        num_pages = 2 + 2 * m // self.page_size
        slots = rng.permutation(num_pages * self.page_size)[:m]
        slots = jnp.asarray(np.where(np.arange(m) % 8 == 7, -1, slots), jnp.int32)
        widths = {"k": d, "v": d}
        if self.form is CompactKVCache:
            widths = {"v": d, "k_rot": self.rotary_dim}
        cache = self.form(
            **{
                n: jnp.full((num_pages, self.page_size, nkv, w), 7, dtype)
                for n, w in widths.items()
            }
        )
        return [qkv, q_norm, k_norm, cos, sin, slots, cache]

    def run(self, arguments, implementation):
        """The query and the arrays of the cache."""
        return ops.qkv_norm_rope_write(*arguments, mode=self.mode, implementation=implementation)

    def exact(self, arguments):
        """The same in float64."""
        return self._in_numpy(arguments, oracle.rms_norm, oracle.rotate)

    def usual(self, arguments):
        """The same with the usual path's roundings."""
        return self._in_numpy(arguments, oracle.usual_rms_norm, oracle.usual_rotate)

    def _in_numpy(self, arguments, norm, turn):
        qkv, q_norm, k_norm, cos, sin, slots, cache = arguments
        q, k, v = oracle.qkv_norm_rope(
            qkv, q_norm, k_norm, cos, sin, mode=self.mode, norm=norm, turn=turn
        )
        # The next op reads what this one stored, so the usual path's rotation is rounded too.
        rows = {"k": k, "v": v}
        if self.form is CompactKVCache:
            q = oracle.absorbed_query(q, k_norm, self.rotary_dim)
            rows["k_rot"] = None if k is None else oracle.band(k, self.rotary_dim)
        if self.mode is ProjectionMode.Q_ONLY:
            return q, cache
        written = {n: oracle.write(getattr(cache, n), slots, rows[n]) for n in cache._fields[:2]}
        return q, self.form(**written)

    error = staticmethod(oracle.max_error)

    @staticmethod
    def relative_error(actual, exact) -> float:
        """Norm-wise: a rotation may cancel to nearly nothing in one element."""
        difference = np.asarray(actual).astype(np.float64) - exact
        return float(np.linalg.norm(difference) / max(np.linalg.norm(exact), 1e-300))


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """`decode_attention`, or for more tokens `prefill_attention`, of sequences of three lengths.

    The longest fills its pages, the shortest is empty; slots that none holds are NaN.
    """

    form: type[Cache]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    sliding_window: int | None
    tokens: int
    context: int
    page_size: int = 16

    @property
    def op(self) -> str:
        """Name of the op and what it reads."""
        name = "decode" if self.tokens <= MAX_DECODE_TOKENS else "prefill"
        window = "" if self.sliding_window is None else f" window {self.sliding_window}"
        return f"{name}_attention {self.form.__name__}{window}"

    def arguments(self, dtype=jnp.bfloat16, seed=0) -> list:
        """Queries that give scores of deviation 1, and pages in random order."""
        rng = np.random.default_rng(seed)
        last = np.array([self.context - 1, max(self.tokens, self.context // 3), -1])
        positions = last[:, None] + np.arange(1 - self.tokens, 1)
        positions = jnp.asarray(np.maximum(positions, -1), jnp.int32)
        columns = -(-self.context // self.page_size)
        table = rng.permutation(3 * columns).reshape(3, columns)
        held = np.zeros((3 * columns, self.page_size), bool)
        is_held = np.arange(columns * self.page_size) <= last[:, None]
        held[table] = is_held.reshape(3, columns, self.page_size)
        widths = [self.head_dim, self.head_dim]
        if self.form is CompactKVCache:
            widths[1] = self.rotary_dim
        arrays = [
            _normal(rng, (*held.shape, self.num_kv_heads, width), dtype, where=held)
            for width in widths
        ]
        width = sum(part.array.shape[-1] for part in self.form(*arrays).key_parts)
        q = _normal(rng, (*positions.shape, self.num_q_heads, width), dtype, width**-0.5)
        return [q, self.form(*arrays), jnp.asarray(table, jnp.int32), positions]

    def run(self, arguments, implementation):
        """The op's output."""
        few = self.tokens <= MAX_DECODE_TOKENS
        attend = ops.decode_attention if few else ops.prefill_attention
        return attend(*arguments, sliding_window=self.sliding_window, implementation=implementation)

    def exact(self, arguments):
        """The same in float64."""
        return oracle.cached_attention(*arguments, sliding_window=self.sliding_window)

    def usual(self, arguments):
        """The same with the usual path's roundings."""
        return oracle.usual_cached_attention(*arguments, sliding_window=self.sliding_window)

    # Norm-wise: the largest of few elements is a matter of chance.
    error = relative_error = staticmethod(PrologueCase.relative_error)


Case = NormCase | PrologueCase | AttentionCase


def _normal(rng, shape, dtype, factor=1.0, where=None):
    """Normal numbers times a factor, NaN outside `where`, which has the first dimensions.

    NumPy's, as JAX would compile a program for every shape; without 0, which has no relative error.
    """
    x = rng.standard_normal(shape, np.float32)
    x = factor * np.where(x == 0, np.float32(1), x)
    if where is not None:
        x[~where] = np.nan
    return jnp.asarray(x.astype(dtype))


def norm_sweep(tokens: Sequence[int] = TOKENS) -> Iterator[NormCase]:
    """Every norm and mode over the published shapes."""
    modes = (None, *ProjectionMode)
    for mode, d, (nq, nkv), m in itertools.product(modes, HEAD_DIMS, HEADS, tokens):
        yield NormCase(mode, nq, nkv, d, m)


def prologue_sweep(tokens: Sequence[int] = TOKENS) -> Iterator[PrologueCase]:
    """Every mode and form over the same head dims; a quarter of them rotates but for QKV_FULL."""
    for mode, form in itertools.product(ProjectionMode, (KVCache, CompactKVCache)):
        if mode is ProjectionMode.QKV_FULL and form is CompactKVCache:
            continue
        for d, m in itertools.product(HEAD_DIMS, tokens):
            rotary_dim = d if mode is ProjectionMode.QKV_FULL else d // 4
            yield PrologueCase(mode, form, 16, 8, d, rotary_dim, m)


def attention_sweep(tokens: Sequence[int] = (1, 6, 40)) -> Iterator[AttentionCase]:
    """Both ops over the same head dims and heads: sliding, full, and full with K = V."""
    for d, (nq, nkv), m in itertools.product(HEAD_DIMS, HEADS, tokens):
        for form, window in ((KVCache, 50), (KVCache, None), (CompactKVCache, None)):
            yield AttentionCase(form, nq, nkv, d, d // 4, window, m, context=150)
