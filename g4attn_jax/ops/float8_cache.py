"""Caches of float8: on which GPUs Triton reads and writes them, and how under `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax

from g4attn_jax.cache import Cache, float8_refusal
from g4attn_jax.ops.gpu import MIN_COMPUTE_CAPABILITY_FLOAT8, gpu_refusal


def refusal(cache: Cache, *, interpret: bool) -> str | None:
    """Reason for which a Triton kernel cannot read or write a cache of float8, or None.

    Args:
        cache: of any dtype.
        interpret: whether the kernel is interpreted.
    """
    reason = float8_refusal(cache)
    if reason is not None or cache.scale is None or interpret:
        return reason
    reason = gpu_refusal(MIN_COMPUTE_CAPABILITY_FLOAT8, none_is_refused=False)
    return reason and (
        "float8 needs an NVIDIA GPU of compute capability "
        f"{MIN_COMPUTE_CAPABILITY_FLOAT8} or higher; {reason}"
    )


def apart_if_float8(f: Callable[..., Any], cache: Cache) -> Callable[..., Any]:
    """`f`, which under `vmap` runs one by one if the cache is float8.

    Each array is one that kernels can address; a batch of them, as one array, may not be.
    """
    return f if cache.scale is None else jax.custom_batching.sequential_vmap(f)
