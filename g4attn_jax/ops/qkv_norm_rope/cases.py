"""Cases of `qkv_norm_rope`."""

import dataclasses
import itertools

import numpy as np

from g4attn_jax import ops
from g4attn_jax.config import ProjectionMode
from g4attn_jax.rope import rope_cos_sin
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case, Draw, distinct, nbytes, norm_error, real_layers, struct


@dataclasses.dataclass(frozen=True)
class QkvNormRopeCase(Case):
    """Norm and rotation of the packed heads of a layer.

    Attributes:
        partial_sums: of the packed heads, in float32; None are heads in the case's dtype.
    """

    op = "qkv_norm_rope"

    mode: ProjectionMode
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    tokens: int
    partial_sums: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        """The op and its mode."""
        return f"{self.op} {self.mode.name}"

    @property
    def group(self) -> int:
        """G: query heads of a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def structs(self, dtype=None) -> list:
        """(qkv, q_norm, k_norm, cos, sin), k_norm being None for Q_ONLY."""
        qkv, q_norm, k_norm, cos, sin = heads(self, dtype or self.dtype)
        return [qkv, q_norm, None if self.mode is ProjectionMode.Q_ONLY else k_norm, cos, sin]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`, at positions to 262143."""
        qkv, q_norm, k_norm, cos, sin = drawn_heads(self, Draw(seed), dtype or self.dtype)
        return [qkv, q_norm, None if self.mode is ProjectionMode.Q_ONLY else k_norm, cos, sin]

    def run(self, arguments, implementation=None):
        """(q, k, v)."""
        return ops.qkv_norm_rope(
            *arguments,
            mode=self.mode,
            dtype=None if self.partial_sums is None else arguments[1].dtype,
            implementation=implementation,
        )

    def exact(self, arguments):
        """(q, k, v) in float64."""
        return oracle.qkv_norm_rope(*added(self, arguments, np.float64), mode=self.mode)

    def usual(self, arguments):
        """(q, k, v) with the usual path's roundings."""
        return oracle.qkv_norm_rope(
            *added(self, arguments, arguments[1].dtype),
            mode=self.mode,
            norm=oracle.usual_rms_norm,
            turn=oracle.usual_rotate,
        )

    def bytes(self) -> int:
        """The packed buffer, cos and sin in, q, k and v out."""
        qkv, *_, cos, sin = self.structs()
        rows = self.group + (0 if self.mode is ProjectionMode.Q_ONLY else 2)
        out = struct(self.tokens, self.num_kv_heads, rows, self.head_dim, dtype=self.dtype)
        return nbytes([qkv, cos, sin, out])

    relative_error = staticmethod(norm_error)


def heads(case, dtype) -> list:
    """Shapes and dtypes of (qkv, q_norm, k_norm, cos, sin)."""
    rows = case.group + case.mode.num_kv_projections
    qkv = struct(case.tokens, case.num_kv_heads, rows, case.head_dim, dtype=dtype)
    if case.partial_sums is not None:
        qkv = struct(case.partial_sums, *qkv.shape, dtype="float32")
    return [
        qkv,
        *[struct(case.head_dim, dtype=dtype)] * 2,
        *[struct(case.tokens, case.rotary_dim // 2, dtype="float32")] * 2,
    ]


def drawn_heads(case, draw: Draw, dtype) -> list:
    """Random (qkv, q_norm, k_norm, cos, sin)."""
    qkv, *scales, _, _ = heads(case, dtype)
    qkv = draw.normal(qkv, 3)
    # Below 1, so that no rotated pair reaches 8, where half an ulp of bfloat16 is above 2e-2.
    q_norm, k_norm = (draw.uniform(scale, 0.25, 0.75) for scale in scales)
    positions = draw.integers(struct(case.tokens, dtype="int32"), 262144)
    cos, sin = rope_cos_sin(
        positions, theta=1e6, head_dim=case.head_dim, rotary_dim=case.rotary_dim
    )
    return [qkv, q_norm, k_norm, cos, sin]


def added(case, arguments, dtype) -> list:
    """Arguments with the packed heads in place of their partial sums, rounded to a dtype."""
    qkv, *others = arguments
    if case.partial_sums is not None:
        qkv = np.asarray(qkv, np.float64).sum(axis=0).astype(dtype)
    return [qkv, *others]


def _real():
    for spec in real_layers():
        sizes = spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim
        for partial_sums in (None, 4):
            yield QkvNormRopeCase(spec.mode, *sizes, 33, partial_sums=partial_sums, tags={"real"})


def _odd():
    for mode, (d, rotary_dim) in itertools.product(
        ProjectionMode, ((2, 2), (34, 12), (96, 96), (320, 64), (24, 0))
    ):
        tags = {"odd", "everyday"} if d == 34 else {"odd"}
        for partial_sums in (None, 1, 3):
            yield QkvNormRopeCase(
                mode, 15, 3, d, rotary_dim, 13, partial_sums=partial_sums, tags=tags
            )


CASES = distinct(
    *_real(),
    *_odd(),
    *(
        QkvNormRopeCase(mode, 32, 4, 512, 128, 300, tags={"compile", "everyday"})
        for mode in ProjectionMode
    ),
    *(
        QkvNormRopeCase(mode, 8, 2, 256, 256, 8, partial_sums=8, tags={"compile"})
        for mode in ProjectionMode
    ),
    QkvNormRopeCase(ProjectionMode.QK_ONLY, 32, 4, 512, 128, 8, tags={"export"}),
)
