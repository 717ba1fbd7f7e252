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

        The positions of one sequence must differ, those outside excepted.
        Inside `jax.jit`, with the cache donated, the update is in place.
        """
        sequence = jnp.arange(self.k.shape[0])[:, None]
        # A negative index would count from the end; the slot past the end is dropped.
        inside = (positions >= 0) & (positions < self.capacity)
        slots = jnp.where(inside, positions, self.capacity).astype(jnp.int32)
        at = {"mode": "drop", "unique_indices": True}
        return type(self)(
            self.k.at[sequence, slots].set(k.astype(self.k.dtype), **at),
            self.v.at[sequence, slots].set(v.astype(self.v.dtype), **at),
        )
