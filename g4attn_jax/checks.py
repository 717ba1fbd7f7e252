"""Argument checks that the whole package shares.

Every message names the argument, what was given and what is accepted. JAX and NumPy are imported
when an array or a dtype is checked: configs are read without them.
"""

import enum
import math
import numbers
from collections.abc import Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import numpy as np

# Dtypes of activations and weights.
FLOATS = ("bfloat16", "float16", "float32")
MAX_INT32 = 2**31 - 1

# A size that is known; a letter for one that is not, 1 or more; the sizes of a range; `...`, first,
# for any number of sizes.
Size = int | str | range | EllipsisType


def check_integer(
    name: str, value: Any, least: int = 1, most: int | None = None, *, none: bool = False
) -> int | None:
    """Refuses what is no integer from `least` to `most`.

    Args:
        name: of the argument.
        value: of Python or NumPy; a bool is none.
        least: accepted.
        most: accepted; None: no limit.
        none: whether None is accepted too.

    Returns:
        The value as Python's int, or None. NumPy's would wrap what they do not hold.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if value is None and none:
        return None
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        accepted = f"{'None or ' if none else ''}an integer {limits}"
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
    return int(value)


def check_number(name: str, value: Any, least: float | None = None) -> None:
    """Refuses what is no finite Python number, or is below `least`.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; accepted: a finite Python number")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value!r}; accepted: {least} or more")


def check_choice(name: str, value: Any, accepted: Iterable[Any]) -> None:
    """Refuses what is none of the accepted values.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    accepted = list(accepted)
    if not any(value is choice or value == choice for choice in accepted):
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(_choice_text, accepted))}")


def check_type(name: str, value: Any, *types: type, none: bool = False) -> None:
    """Refuses what is no instance of one of the types.

    Args:
        name: of the argument.
        value: given.
        types: accepted.
        none: whether None is accepted too.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if not isinstance(value, types) and not (none and value is None):
        accepted = " or ".join(t.__name__ for t in types) + (", or None" if none else "")
        raise ValueError(f"{name} is a {type(value).__name__}; accepted: {accepted}")


def check_dtype(
    name: str, dtype: "jax.typing.DTypeLike | None", accepted: Sequence[Any] = FLOATS
) -> None:
    """Refuses a dtype that is none of the accepted ones.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    import jax.numpy as jnp

    accepted = [jnp.dtype(x).name for x in accepted]
    try:
        known = dtype is not None and jnp.dtype(dtype).name in accepted
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{name} has dtype {dtype}; accepted: {', '.join(accepted)}")


def check_array(
    name: str,
    array: Any,
    shape: Sequence[Size],
    dtype: Any = FLOATS,
    *,
    none: bool = False,
    empty: bool = False,
) -> None:
    """Refuses what is no array of a shape and dtype.

    Args:
        name: of the argument.
        array: JAX or NumPy array, or anything with a shape and a dtype.
        shape: sizes accepted, see `Size`, as in `(..., "Nkv", 512)`. Sizes before those that follow
            `...` may be anything.
        dtype: "integer", "signed integer" or "floating" for any such, else a dtype or several.
        none: whether None is accepted too.
        empty: whether a size that a letter stands for may be 0.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if array is None and none:
        return
    given_shape, given_dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if not isinstance(given_shape, tuple) or given_dtype is None:
        given = "is None" if array is None else f"is a {type(array).__name__}"
        accepted = f"{_dtype_text(dtype, ' or ')} {_shape_text(shape, empty)}"
        raise ValueError(f"{name} {given}; accepted: {accepted}{', or None' if none else ''}")
    if not _has_dtype(given_dtype, dtype):
        raise ValueError(f"{name} has dtype {given_dtype}; accepted: {_dtype_text(dtype)}")
    if not _has_shape(given_shape, shape, empty):
        raise ValueError(f"{name} has shape {given_shape}; accepted: {_shape_text(shape, empty)}")


def known_values(array: Any) -> "np.ndarray | None":
    """Values of an array; None while it is traced, and where some of it is on other hosts."""
    import jax
    import numpy as np

    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def _has_shape(given, shape, empty):
    if shape and shape[0] is ...:
        shape = shape[1:]
        given = given[max(0, len(given) - len(shape)) :]
    return len(given) == len(shape) and all(
        _is_size(size, wanted, empty) for size, wanted in zip(given, shape, strict=True)
    )


def _is_size(size, wanted, empty):
    if isinstance(wanted, str):
        return empty or size != 0
    return size in wanted if isinstance(wanted, range) else size == wanted


# Kinds of dtype: their names in NumPy, and in messages.
_KINDS = {
    "integer": ("integer", "integer"),
    "signed integer": ("signedinteger", "signed integer"),
    "floating": ("floating", "floating-point"),
}


def _has_dtype(given, dtype):
    import jax.numpy as jnp

    if isinstance(dtype, str) and dtype in _KINDS:
        return jnp.issubdtype(given, getattr(jnp, _KINDS[dtype][0]))
    return any(given == jnp.dtype(x) for x in _several(dtype))


def _several(dtype):
    return dtype if isinstance(dtype, (tuple, list)) else (dtype,)


def _choice_text(value):
    if isinstance(value, type):
        return value.__name__
    return str(value) if isinstance(value, enum.Enum) else repr(value)


def _dtype_text(dtype, separator=", "):
    import jax.numpy as jnp

    if isinstance(dtype, str) and dtype in _KINDS:
        return _KINDS[dtype][1]
    return separator.join(jnp.dtype(x).name for x in _several(dtype))


def _shape_text(shape, empty):
    def text(size):
        if isinstance(size, range):
            return f"{size[0]} to {size[-1]}"
        return "..." if size is ... else str(size)

    is_known = all(isinstance(size, int) for size in shape)
    if is_known:
        return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    letters, limit = [size for size in shape if isinstance(size, str)], ""
    if letters and not empty:
        limit = f"; none of {', '.join(letters)} may be 0"
        if len(letters) == 1:
            limit = f"; {letters[0]} may not be 0"
    return f"[{', '.join(map(text, shape))}]{limit}"
