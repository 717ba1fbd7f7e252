"""The KV cache: a plain pytree, passed in and returned."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KVCache(NamedTuple):
    """Keys and values of one layer; token at position p of a sequence lies in slot p.

    Attributes:
        k: [B, S, Nkv, D], normalised and rotated keys.
        v: [B, S, Nkv, D], normalised values.
    """

    k: Float[Array, "B S Nkv D"]
    v: Float[Array, "B S Nkv D"]

    @classmethod
    def zeros(cls, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike) -> Self:
        """An empty cache of shape [B, S, Nkv, D]."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        """S: positions 0 to S - 1 fit."""
        return self.k.shape[1]

    def write(
        self,
        positions: Int[Array, "B T"],
        k: Float[Array, "B T Nkv D"],
        v: Float[Array, "B T Nkv D"],
    ) -> Self:
        """The cache with k and v at `positions`; a position outside 0 .. S - 1 writes nothing.

        Inside `jax.jit`, with the cache donated, the update is in place.
        """
        sequence = jnp.arange(self.k.shape[0])[:, None]
        # A negative index counts from the end; a slot past the end is dropped.
        slots = jnp.where(positions < 0, self.capacity, positions)
        return type(self)(
            _set_rows(self.k, sequence, slots, k.astype(self.k.dtype)),
            _set_rows(self.v, sequence, slots, v.astype(self.v.dtype)),
        )


@jax.custom_jvp
def _set_rows(array, sequence, slots, rows):
    """array.at[sequence, slots].set(rows), as bits: XLA's CPU backend of JAX 0.10 converts an array
    of bfloat16 to float32 and back for a scatter, which copies the whole cache."""
    bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    array_bits, row_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (array, rows))
    array_bits = array_bits.at[sequence, slots].set(row_bits, mode="drop")
    return jax.lax.bitcast_convert_type(array_bits, array.dtype)


@_set_rows.defjvp
def _set_rows_jvp(primals, tangents):
    _, sequence, slots, _ = primals
    array_tangent, _, _, rows_tangent = tangents
    return _set_rows(*primals), array_tangent.at[sequence, slots].set(rows_tangent, mode="drop")
