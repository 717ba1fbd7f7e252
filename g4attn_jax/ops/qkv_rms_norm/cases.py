"""Cases of `qkv_rms_norm`."""

import dataclasses
import itertools

from g4attn_jax import ops
from g4attn_jax.config import ProjectionMode
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import (
    PUBLISHED_HEAD_DIMS,
    PUBLISHED_HEADS,
    PUBLISHED_TOKENS,
    Case,
    Draw,
    distinct,
    real_layers,
    struct,
)

BENCH_TOKENS = (1, 8, 32, 128, 1024, 8192)


@dataclasses.dataclass(frozen=True)
class QkvRmsNormCase(Case):
    """A norm of the packed heads of a layer.

    Attributes:
        scale_dtype: name of the dtype of the learned scales; None is that of the buffer.
    """

    op = "qkv_rms_norm"

    mode: ProjectionMode
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    scale_dtype: str | None = dataclasses.field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        """The op and its mode."""
        return f"{self.op} {self.mode.name}"

    @property
    def group(self) -> int:
        """G: query heads of a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def structs(self, dtype=None) -> list:
        """(qkv, q_norm, k_norm), without k_norm for Q_ONLY."""
        dtype = dtype or self.dtype
        rows = self.group + self.mode.num_kv_projections
        qkv = struct(self.tokens, self.num_kv_heads, rows, self.head_dim, dtype=dtype)
        scale = struct(self.head_dim, dtype=self.scale_dtype or dtype)
        return [qkv, *[scale] * (1 if self.mode is ProjectionMode.Q_ONLY else 2)]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`."""
        draw = Draw(seed)
        qkv, *scales = self.structs(dtype)
        # Up to 1.25, so that no result reaches 8, where half an ulp of bfloat16 is above 2e-2.
        return [draw.normal(qkv, 3), *(draw.uniform(scale, 0.5, 1.25) for scale in scales)]

    def run(self, arguments, implementation=None):
        """(q, k, v)."""
        return ops.qkv_rms_norm(*arguments, mode=self.mode, implementation=implementation)

    def exact(self, arguments):
        """(q, k, v) in float64."""
        return oracle.qkv_rms_norm(*arguments, mode=self.mode)

    def usual(self, arguments):
        """(q, k, v) with the usual path's roundings."""
        return oracle.qkv_rms_norm(*arguments, mode=self.mode, norm=oracle.usual_rms_norm)

    def bytes(self) -> int:
        """The packed buffer in, q, k and v out; of scales, which the L2 keeps, none."""
        projections = self.mode.num_kv_projections
        rows = 2 * self.group + projections + (2 if projections else 0)
        itemsize = self.structs()[0].dtype.itemsize
        return self.tokens * self.num_kv_heads * rows * self.head_dim * itemsize


def _published():
    for number, (mode, d, (nq, nkv), tokens) in enumerate(
        itertools.product(ProjectionMode, PUBLISHED_HEAD_DIMS, PUBLISHED_HEADS, PUBLISHED_TOKENS)
    ):
        # One of each mode and head dim, heads in turn.
        everyday = tokens == 7 and (number // 8 + number // 4) % 2 == 0
        tags = {"published", "everyday"} if everyday else {"published"}
        yield QkvRmsNormCase(mode, nq, nkv, d, tokens, tags=tags)


def _real():
    for spec, tokens in itertools.product(real_layers(), (1, 33, 1030)):
        heads = spec.num_q_heads, spec.num_kv_heads, spec.head_dim
        yield QkvRmsNormCase(spec.mode, *heads, tokens, tags={"real"})


def _odd():
    for mode, d in itertools.product(ProjectionMode, (1, 2, 17, 96, 320, 512)):
        tags = {"odd", "everyday"} if d == 17 else {"odd"}
        yield QkvRmsNormCase(mode, 15, 3, d, 13, tags=tags)


def _compiled():
    # Tokens, Nq, Nkv, D, dtypes of activations and scales.
    for mode, (tokens, nq, nkv, d, dtype, scale_dtype) in itertools.product(
        ProjectionMode,
        (
            (1, 32, 4, 512, "bfloat16", "bfloat16"),
            (32, 32, 4, 512, "bfloat16", "float32"),
            (8192, 32, 16, 256, "bfloat16", "bfloat16"),
            (33, 15, 3, 96, "float16", "bfloat16"),
            (257, 7, 1, 320, "float32", "float32"),
            (2**17, 32, 4, 512, "bfloat16", "bfloat16"),
        ),
    ):
        tags = {"compile", "large"} if tokens == 2**17 else {"compile"}
        tags |= {"everyday"} if tokens == 32 else set()
        dtypes = {"dtype": dtype, "scale_dtype": scale_dtype}
        yield QkvRmsNormCase(mode, nq, nkv, d, tokens, **dtypes, tags=tags)


def _measured():
    for (mode, nq, nkv, d), tokens in itertools.product(
        (
            (ProjectionMode.QK_ONLY, 32, 4, 512),  # 31B full
            (ProjectionMode.QK_ONLY, 16, 2, 512),  # 26B-A4B full
            (ProjectionMode.QK_ONLY, 16, 1, 512),  # 12B full
            (ProjectionMode.QKV_FULL, 32, 16, 256),  # 31B sliding
            (ProjectionMode.QKV_FULL, 8, 1, 256),  # E2B sliding
            (ProjectionMode.Q_ONLY, 8, 1, 512),  # E2B full, KV-shared
        ),
        BENCH_TOKENS,
    ):
        yield QkvRmsNormCase(mode, nq, nkv, d, tokens, tags={"bench"})


CASES = distinct(
    *_measured(),
    *_published(),
    *_real(),
    *_odd(),
    *_compiled(),
    *(QkvRmsNormCase(mode, 32, 4, 512, 8, tags={"export"}) for mode in ProjectionMode),
)
