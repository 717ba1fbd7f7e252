"""Masked loads, stores and products of tiles, which all Triton kernels share."""

import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.gpu import gpu

# JAX 0.11 deprecated the backend these kernels are lowered through; pyproject.toml bounds JAX for
# it. The warning comes when JAX lowers a program, long after we return, so it is filtered here.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)

# One 16-byte load for each of the 32 lanes of a warp. A row is loaded in pieces of this size, so
# that its sum of squares never leaves the warp: no shared memory, no barrier.
WARP_LOAD_BYTES = 512


def may_start_next(interpret: bool) -> bool:
    """Whether a launch may start the next one before it ends, see `first_program_id`."""
    return not interpret and gpu().compute_capability >= 9.0


def first_program_id(starts_next: bool) -> jax.Array:
    """`pl.program_id(0)`, which with `starts_next` also lets the next launch of the stream start.

    When every program of this launch has called it, programs of the next one come to where there is
    room, and wait there until this launch is over (programmatic dependent launch). The waiting is
    XLA's: it begins every kernel that it launches so with it. A step of E2B, of 473 launches, took
    2.27 ms in place of 2.41 on an H200.

    Source: NVIDIA, "CUDA C++ programming guide", programmatic dependent launch.
    """
    program = pl.program_id(0)
    if not starts_next:
        return program
    # Assembly whose result is not used would be removed.
    (programs,) = plgpu.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[jnp.full((1,), program)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(programs, dtype=jnp.int32)  # which under x64 would be int64


def iota(size: int) -> jax.Array:
    """int32 0 .. size - 1."""
    return jnp.arange(size, dtype=jnp.int32)


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """a & b of two masks, either of which may be None, which is all true."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def load(
    ref,
    mask: jax.Array | None,
    shape: tuple[int, ...],
    other: int = 0,
    eviction_policy: str | None = None,
) -> jax.Array:
    """Loads `ref`, of `shape`, `other` where the mask is false; None loads all.

    `eviction_policy` tells the L2 what to keep: "evict_last", or "evict_first".
    """
    if mask is None:
        return plgpu.load(ref, eviction_policy=eviction_policy)
    mask = jnp.broadcast_to(mask, shape)
    return plgpu.load(ref, mask=mask, other=other, eviction_policy=eviction_policy)


def load_tile(ref, row, column, row_mask, column_mask):
    """Elements of rows [m] and columns [n], 0 where a mask is false; a mask of None is all true."""
    shape = row.size, column.size
    return load(ref.at[row[:, None], column[None, :]], _mask(row_mask, column_mask, shape), shape)


def store_tile(ref, row, column, row_mask, column_mask, tile):
    """Stores [m, n] at rows [m] and columns [n] in the dtype of `ref`, where no mask is false."""
    mask = _mask(row_mask, column_mask, tile.shape)
    plgpu.store(ref.at[row[:, None], column[None, :]], tile.astype(ref.dtype), mask=mask)


def dot(a, b, trans_b=False):
    """a b, or a b^T, in float32; of float32 operands without TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision).astype(jnp.float32)


def _mask(row_mask, column_mask, shape):
    row_mask = None if row_mask is None else row_mask[:, None]
    column_mask = None if column_mask is None else column_mask[None, :]
    mask = both(row_mask, column_mask)
    return None if mask is None else jnp.broadcast_to(mask, shape)
