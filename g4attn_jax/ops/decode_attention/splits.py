"""Split-K of decode attention: how many programs share a sequence and KV head, and their sum."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from g4attn_jax.ops.op import Kernel

MAX_SPLITS = 256

_KERNEL = Kernel("triton", "g4attn_jax.ops.decode_attention.triton_splits:combine_splits")


def choose_splits(gpu, programs, tiles):
    """Number of splits with the shortest time, in tiles of the busiest multiprocessor.

    Starting a program takes about as long as 3 tiles, the second launch as 1.
    """

    def time(splits):
        turns = pl.cdiv(programs * splits, gpu.num_sms)
        return turns * (pl.cdiv(tiles, splits) + 3) + (splits > 1)

    return min(range(1, min(tiles, MAX_SPLITS) + 1), key=time)


def combine_splits(o, log_sum, dtype, *, interpret):
    """Weighted mean of splits: sum_i 2^log_sum_i o_i / sum_i 2^log_sum_i.

    A launch of its own, where JAX has Triton; else XLA's.

    Args:
        o: float32 [splits, ..., D].
        log_sum: float32 [splits, ...].
        dtype: of the result.
        interpret: runs the kernel body in Pallas' interpreter.
    """
    if _KERNEL.import_refusal() is None:
        return _KERNEL.run(o, log_sum, dtype, interpret=interpret)
    largest = jnp.max(log_sum, axis=0)
    weight = jnp.exp2(log_sum - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = jnp.sum(weight, axis=0)[..., None]
    combined = jnp.sum(o * weight[..., None], axis=0) / jnp.where(total > 0, total, 1.0)
    return combined.astype(dtype)
