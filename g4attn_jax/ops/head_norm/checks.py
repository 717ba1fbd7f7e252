"""Argument checks that the norm ops share."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_DTYPES = ("bfloat16", "float16", "float32")


def check_buffer(name: str, buffer: jax.Array, *, dims: str) -> None:
    """Refuses a buffer of heads that is not [..., `dims`] in a dtype the kernel takes.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    needed = len(dims.split(", "))
    if jnp.ndim(buffer) < needed:
        raise ValueError(f"{name} has shape {jnp.shape(buffer)}; accepted: [..., {dims}]")
    _check_dtype(name, buffer)
    if buffer.shape[-1] == 0:
        raise ValueError(f"{name} has shape {buffer.shape}; its last axis, D, must not be empty")


def check_scales(scales: Mapping[str, jax.Array | None], *, head_dim: int) -> None:
    """Refuses a scale that is given and is not [D] in a dtype the kernel takes.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    for name, scale in scales.items():
        if scale is None:
            continue
        if jnp.shape(scale) != (head_dim,):
            raise ValueError(f"{name} has shape {jnp.shape(scale)}; accepted: ({head_dim},)")
        _check_dtype(name, scale)


def check_eps(eps: float, scale_offset: float) -> None:
    """Refuses constants of the norm that are not plain numbers, or an eps below zero.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    for name, value in (("eps", eps), ("scale_offset", scale_offset)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; accepted: a Python number")
    if not eps >= 0:
        raise ValueError(f"eps is {eps!r}; accepted: 0 or more")


def _check_dtype(name: str, array: jax.Array) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None or jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}; accepted: {', '.join(_DTYPES)}")
