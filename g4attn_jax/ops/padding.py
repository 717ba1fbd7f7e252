"""Sizes that tiles of kernels are padded to."""

from jax.experimental import pallas as pl


def pad(width: int) -> int:
    """Columns that are loaded for some: a power of two, and what tensor cores take at least."""
    return max(16, pl.next_power_of_2(width))
