"""Argument checks that the ops and the module share."""

import math
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
    check_dtype(name, getattr(buffer, "dtype", None))
    if 0 in buffer.shape[-needed:]:
        raise ValueError(f"{name} has shape {buffer.shape}; none of {dims} may be 0")


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
        check_dtype(name, getattr(scale, "dtype", None))


def check_eps(eps: float, scale_offset: float) -> None:
    """Refuses constants of the norm that are not plain numbers, or an eps below zero.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    for name, value in (("eps", eps), ("scale_offset", scale_offset)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; accepted: a finite Python number")
    if eps < 0:
        raise ValueError(f"eps is {eps!r}; accepted: 0 or more")


def check_dtype(name: str, dtype: jax.typing.DTypeLike | None) -> None:
    """Refuses a dtype the kernel does not take.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if dtype is None or jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}; accepted: {', '.join(_DTYPES)}")
