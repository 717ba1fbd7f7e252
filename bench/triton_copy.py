"""A block copy through Pallas' Triton backend: one of the yardsticks of `measure.copy_gbps`."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def block_copy(x: jax.Array, block: int, num_warps: int) -> jax.Array:
    """A copy of x [n], `block` elements a program."""

    def body(x_ref, o_ref):
        index = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        plgpu.store(o_ref.at[index], plgpu.load(x_ref.at[index]))

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.size // block,),
        in_specs=[pl.no_block_spec],
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
    )(x)
