"""Argument checks that the ops and the module share."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from g4attn_jax.cache import FLOAT8, Cache, CompactKVCache
from g4attn_jax.config import ProjectionMode

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


def check_packed(qkv: jax.Array, mode: ProjectionMode) -> None:
    """Refuses what is not a packed projection [..., Nkv, G + P, D] of this mode.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if not isinstance(mode, ProjectionMode):
        raise ValueError(f"mode is {mode!r}; accepted: {', '.join(map(str, ProjectionMode))}")
    check_buffer("qkv", qkv, dims="Nkv, G + P, D")
    rows, kv_rows = qkv.shape[-2], mode.num_kv_projections
    if rows <= kv_rows:
        raise ValueError(
            f"qkv has {rows} rows per KV head; {mode.name} needs at least {1 + kv_rows}: "
            f"1 or more query heads and {kv_rows} of K and V"
        )


def check_k_scale(k_scale: jax.Array | None, *, mode: ProjectionMode) -> None:
    """Refuses a missing or a surplus scale of K.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if mode is ProjectionMode.Q_ONLY:
        if k_scale is not None:
            raise ValueError("k_scale was given; Q_ONLY normalises no K and accepts None")
    elif k_scale is None:
        raise ValueError(f"k_scale is missing; {mode.name} needs it, of shape (D,)")


def check_cache(
    cache: Cache,
    *,
    mode: ProjectionMode,
    dtype: jax.typing.DTypeLike,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
) -> None:
    """Refuses a cache that such a layer cannot write or read.

    Raises:
        ValueError: naming the array, what was given and what is accepted.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; accepted: KVCache or CompactKVCache")
    widths = {"k": head_dim, "v": head_dim}
    if isinstance(cache, CompactKVCache):
        if mode is ProjectionMode.QKV_FULL:
            raise ValueError("cache is a CompactKVCache; QKV_FULL accepts KVCache")
        widths = {"v": head_dim, "k_rot": rotary_dim}
    for name, width in widths.items():
        shape = getattr(getattr(cache, name), "shape", ())
        if len(shape) == 4 and shape[2:] != (num_kv_heads, width):
            raise ValueError(
                f"cache.{name} has shape {shape}; accepted: [num_pages, page_size, {num_kv_heads}, "
                f"{width}]"
            )
    check_cache_arrays(cache, dtype=dtype)


def check_cache_arrays(cache: Cache, *, dtype: jax.typing.DTypeLike) -> None:
    """Refuses a cache whose arrays do not go together, or not with activations of a dtype.

    Raises:
        ValueError: naming the array, what was given and what is accepted.
    """
    accepted = jnp.dtype(dtype) if cache.scale is None else FLOAT8
    names = cache._fields[:2]
    for name in names:
        array = getattr(cache, name)
        if getattr(array, "dtype", None) != accepted:
            raise ValueError(
                f"cache.{name} is a {type(array).__name__} of dtype "
                f"{getattr(array, 'dtype', None)}; accepted: an array of the layer's dtype, "
                f"{dtype}, or of float8_e4m3fn together with cache.scale"
            )
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(
                f"cache.{name} has shape {array.shape}; accepted: [num_pages, page_size, Nkv, "
                "width], none of them 0"
            )
    heads = {name: getattr(cache, name).shape[:3] for name in names}
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"the arrays of cache have [num_pages, page_size, Nkv] {heads}; accepted: one"
        )
    scale = cache.scale
    if scale is not None and (jnp.shape(scale) != (2,) or jnp.result_type(scale) != "float32"):
        raise ValueError(
            f"cache.scale has shape {jnp.shape(scale)} and dtype {jnp.result_type(scale)}; "
            "accepted: float32 [2], of K and of V"
        )


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
    check_number("eps", eps)
    check_number("scale_offset", scale_offset)
    if eps < 0:
        raise ValueError(f"eps is {eps!r}; accepted: 0 or more")


def check_number(name: str, value: float) -> None:
    """Refuses what is not a finite Python number.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; accepted: a finite Python number")


def check_dtype(name: str, dtype: jax.typing.DTypeLike | None) -> None:
    """Refuses a dtype the kernel does not take.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if dtype is None or jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}; accepted: {', '.join(_DTYPES)}")
