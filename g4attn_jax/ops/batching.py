"""How launches run under `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax

from g4attn_jax.cache import Cache


def apart_if_float8(f: Callable[..., Any], cache: Cache) -> Callable[..., Any]:
    """`f`, which under `vmap` runs one by one if the cache is float8.

    Each array is one that kernels can address; a batch of them, as one array, may not be.
    """
    return f if cache.scale is None else jax.custom_batching.sequential_vmap(f)
