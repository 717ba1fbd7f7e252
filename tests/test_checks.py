"""The argument checks that the whole package shares."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import checks


@pytest.mark.parametrize("value", [1, 8, np.int32(3), np.uint8(8)])
def test_an_integer_is_returned_as_pythons(value):
    checked = checks.check_integer("n", value, most=8)
    assert checked == value and type(checked) is int


@pytest.mark.parametrize("value", [0, 9, -1, True, 1.0, "2", None, np.float32(1)])
def test_no_such_integer(value):
    with pytest.raises(ValueError, match=r"^n is .*"):
        checks.check_integer("n", value, 1, 8)


def test_limits_of_an_integer():
    assert checks.check_integer("n", None, none=True) is None
    assert checks.check_integer("n", 0, 0) == 0
    with pytest.raises(ValueError, match=r"^n is 0"):
        checks.check_integer("n", 0, none=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, None, jnp.ones(())])
def test_no_number(value):
    with pytest.raises(ValueError, match=r"^eps is .*"):
        checks.check_number("eps", value)


def test_least_number():
    checks.check_number("eps", 0.0, least=0)
    with pytest.raises(ValueError, match=r"^eps is -1; accepted: 0 or more$"):
        checks.check_number("eps", -1, least=0)


def test_choices_and_types():
    checks.check_choice("mode", None, (None, "xla"))
    with pytest.raises(ValueError, match=r"^mode is 'x'"):
        checks.check_choice("mode", "x", (None, "xla"))
    with pytest.raises(ValueError, match=r"^form is 3"):
        checks.check_choice("form", 3, (int, str))
    checks.check_type("x", None, int, none=True)
    with pytest.raises(ValueError, match=r"^x is a str"):
        checks.check_type("x", "1", int, float, none=True)


@pytest.mark.parametrize("dtype", [None, "int8", jnp.float64, "no such"])
def test_no_such_dtype(dtype):
    with pytest.raises(ValueError, match=r"^dtype has dtype .*"):
        checks.check_dtype("dtype", dtype)


ACCEPTED = [
    ((2, 3), "int32", np.zeros((2, 3), np.int32)),
    (("B", "T"), "integer", jnp.zeros((2, 3), jnp.uint8)),
    ((..., "E"), checks.FLOATS, jnp.zeros((0, 5), jnp.bfloat16)),
    ((..., "E"), checks.FLOATS, jax.ShapeDtypeStruct((5,), jnp.float16)),
    (("B", range(9)), "signed integer", np.zeros((2, 0), np.int64)),
    ((), "floating", jnp.zeros(())),
]


@pytest.mark.parametrize(("shape", "dtype", "array"), ACCEPTED)
def test_such_an_array(shape, dtype, array):
    checks.check_array("x", array, shape, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "array", "message"),
    [
        ((2,), "int32", np.zeros(2), r"has dtype float64; accepted: int32"),
        ((2,), "int32", np.zeros(3, np.int32), r"has shape \(3,\); accepted: \(2,\)"),
        (
            ("B", "T"),
            "integer",
            np.zeros((2, 0), int),
            r"\[B, T\]; none of B, T may be 0",
        ),
        ((..., "E"), checks.FLOATS, jnp.zeros(()), r"has shape \(\); accepted: \[\.\.\., E\]"),
        (("B", range(9)), "integer", np.zeros((2, 9), int), r"\[B, 0 to 8\]"),
        (("E",), "floating", [1.0], r"is a list; accepted: floating-point \[E\]"),
        (("E",), "floating", None, r"is None; accepted"),
        (("E",), "signed integer", np.zeros(2, np.uint8), "dtype uint8; accepted: signed integer"),
    ],
)
def test_no_such_array(shape, dtype, array, message):
    with pytest.raises(ValueError, match="^x .*" + message):
        checks.check_array("x", array, shape, dtype)


def test_what_else_may_be_accepted_of_an_array():
    checks.check_array("x", None, (2,), none=True)
    checks.check_array("x", jnp.zeros((0, 4)), ("M", 4), empty=True)
    assert checks.known_values(jnp.ones(2)).tolist() == [1, 1]
    assert checks.known_values(types.SimpleNamespace(is_fully_addressable=False)) is None
    assert jax.eval_shape(lambda x: checks.known_values(x) or x, jnp.ones(2)).shape == (2,)
