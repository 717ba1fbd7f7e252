"""Launch that combines the splits of decode attention: programs of (query row, columns)."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.triton_tiles import first_program_id, iota, load, may_start_next

_COMBINED_AT_ONCE = 8192  # numbers of a program: 64 a thread
_NUM_WARPS = 4


def combine_splits(o, log_sum, dtype, *, interpret):
    """Kernel of `g4attn_jax.ops.decode_attention.splits.combine_splits`."""
    splits, *shape, head_dim = o.shape
    rows, padded = math.prod(shape), pl.next_power_of_2(splits)
    block = min(pl.next_power_of_2(head_dim), max(16, _COMBINED_AT_ONCE // padded))

    def body(o_ref, log_sum_ref, out_ref):
        split, out_row = iota(padded), first_program_id(may_start_next(interpret))
        exists = split < splits
        row = split * rows + out_row
        x = load(log_sum_ref.at[row], exists, split.shape, other=-jnp.inf)
        largest = jnp.max(x)
        weight = jnp.exp2(x - jnp.where(largest == -jnp.inf, 0.0, largest))
        total = jnp.sum(weight)
        column = pl.program_id(1) * block + iota(block)
        column_exists = column < head_dim
        parts = load(
            o_ref.at[row[:, None], column[None, :]],
            exists[:, None] & column_exists[None, :],
            (padded, block),
        )
        combined = jnp.sum(parts * weight[:, None], axis=0) / jnp.where(total > 0, total, 1.0)
        plgpu.store(out_ref.at[out_row, column], combined.astype(dtype), mask=column_exists)

    return pl.pallas_call(
        body,
        name="combine_splits",
        out_shape=jax.ShapeDtypeStruct((rows, head_dim), dtype),
        grid=(rows, pl.cdiv(head_dim, block)),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(o.reshape(-1, head_dim), log_sum.reshape(-1)).reshape(*shape, head_dim)
