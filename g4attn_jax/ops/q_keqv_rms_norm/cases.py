"""Cases of `q_keqv_rms_norm`."""

import dataclasses
import itertools

from g4attn_jax import ops
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import (
    PUBLISHED_HEAD_DIMS,
    PUBLISHED_HEADS,
    PUBLISHED_TOKENS,
    Case,
    Draw,
    distinct,
    nbytes,
    struct,
)


@dataclasses.dataclass(frozen=True)
class QKeqvRmsNormCase(Case):
    """A norm of queries and of the projection that is both K and V.

    Attributes:
        scale_dtype: name of the dtype of the learned scales; None is that of the buffers.
    """

    op = "q_keqv_rms_norm"

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    scale_dtype: str | None = dataclasses.field(default=None, kw_only=True)

    def structs(self, dtype=None) -> list:
        """(q, kv, q_norm, k_norm)."""
        dtype = dtype or self.dtype
        heads = self.num_q_heads, self.num_kv_heads
        buffers = [struct(self.tokens, n, self.head_dim, dtype=dtype) for n in heads]
        return [*buffers, *[struct(self.head_dim, dtype=self.scale_dtype or dtype)] * 2]

    def arguments(self, dtype=None, seed=0) -> list:
        """Random arrays of `structs`."""
        draw = Draw(seed)
        q, kv, *scales = self.structs(dtype)
        # Up to 1.25, so that no result reaches 8, where half an ulp of bfloat16 is above 2e-2.
        scales = [draw.uniform(scale, 0.5, 1.25) for scale in scales]
        return [draw.normal(q, 3), draw.normal(kv, 3), *scales]

    def run(self, arguments, implementation=None):
        """(q, k, v)."""
        return ops.q_keqv_rms_norm(*arguments, implementation=implementation)

    def exact(self, arguments):
        """(q, k, v) in float64."""
        return oracle.q_keqv_rms_norm(*arguments)

    def usual(self, arguments):
        """(q, k, v) with the usual path's roundings."""
        return oracle.q_keqv_rms_norm(*arguments, norm=oracle.usual_rms_norm)

    def bytes(self) -> int:
        """Both buffers in, q, k and v out; of scales, which the L2 keeps, none."""
        q, kv, *_ = self.structs()
        return nbytes([q, q, kv, kv, kv])


def _published():
    for number, (d, (nq, nkv), tokens) in enumerate(
        itertools.product(PUBLISHED_HEAD_DIMS, PUBLISHED_HEADS, PUBLISHED_TOKENS)
    ):
        everyday = tokens == 7 and (number // 8 + number // 4) % 2 == 0
        tags = {"published", "everyday"} if everyday else {"published"}
        yield QKeqvRmsNormCase(nq, nkv, d, tokens, tags=tags)


CASES = distinct(
    *_published(),
    QKeqvRmsNormCase(7, 3, 17, 13, tags={"odd", "everyday"}),
    # One of each launch configuration.
    QKeqvRmsNormCase(32, 4, 512, 1, tags={"compile", "real"}),
    QKeqvRmsNormCase(32, 4, 512, 32, scale_dtype="float32", tags={"compile", "everyday"}),
    QKeqvRmsNormCase(32, 16, 256, 8192, tags={"compile"}),
    QKeqvRmsNormCase(15, 3, 96, 33, dtype="float16", scale_dtype="bfloat16", tags={"compile"}),
    QKeqvRmsNormCase(7, 1, 320, 257, dtype="float32", tags={"compile"}),
    QKeqvRmsNormCase(32, 4, 512, 2**17, tags={"compile", "large"}),
    QKeqvRmsNormCase(32, 4, 512, 8, tags={"export"}),
)
