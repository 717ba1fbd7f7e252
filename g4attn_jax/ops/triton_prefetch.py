"""Programs that read the next launch's weight into the L2 while those before them work.

A launch of one program for each of few tokens leaves the memory bus idle. Programs past the
working ones read the first bytes of a weight that a later launch needs. What they read is of no use
to them: its maximum goes to an output that nothing reads, so that the loads are not left out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from g4attn_jax.ops.triton_tiles import WARP_LOAD_BYTES, iota, load

# Of each thread of a program, all on their way at once.
_LOADS = 8


class Prefetch(NamedTuple):
    """Reading of a part of a weight by programs of a launch.

    Attributes:
        first: of the programs; those before it work.
        programs: number of them; 0 reads nothing.
        start: first element that they read.
        width: elements of a load of a program.
    """

    first: int
    programs: int
    start: int
    width: int

    @classmethod
    def of(
        cls, weight: jax.Array | None, first: int, *, num_warps: int, megabytes: range
    ) -> "Prefetch":
        """Reading by programs of so many warps.

        Args:
            weight: what is read; None: nothing.
            first: number of working programs.
            num_warps: of every program of the launch.
            megabytes: MiB of the weight, the first and the one after the last.
        """
        if weight is None:
            return cls(first, 0, 0, 1)
        itemsize = weight.dtype.itemsize
        ends = megabytes.start, megabytes.stop
        start, stop = (min(end * 2**20 // itemsize, weight.size) for end in ends)
        width = num_warps * WARP_LOAD_BYTES // itemsize
        return cls(first, pl.cdiv(stop - start, width * _LOADS), start, width)

    @property
    def grid(self) -> tuple[int]:
        """Grid of the launch."""
        return (self.first + self.programs,)

    @property
    def out_shape(self) -> jax.ShapeDtypeStruct:
        """Output that nothing reads."""
        return jax.ShapeDtypeStruct((max(1, self.programs),), jnp.float32)

    def run(self, weight_ref, out_ref, work) -> None:
        """Runs a program: `work(program)` of those that work, else its share of the weight.

        Args:
            weight_ref: the weight, flat, or None.
            out_ref: of `out_shape`.
            work: function of the number of the program.
        """
        program = pl.program_id(0)  # in the interpreter no branch knows it
        if not self.programs:
            work(program)
            return
        pl.when(program < self.first)(lambda: work(program))
        pl.when(program >= self.first)(
            lambda: self._read(weight_ref, out_ref, program - self.first)
        )

    def _read(self, weight_ref, out_ref, index):
        largest = jnp.full((self.width,), -jnp.inf, jnp.float32)
        for i in range(_LOADS):
            at = self.start + (index * _LOADS + i) * self.width + iota(self.width)
            values = load(weight_ref.at[at], at < weight_ref.size, at.shape)
            largest = jnp.maximum(largest, values.astype(jnp.float32))
        out_ref[index] = jnp.max(largest)


def flat(weight: jax.Array | None) -> jax.Array | None:
    """The weight as kernels read it."""
    return None if weight is None else weight.reshape(-1)
