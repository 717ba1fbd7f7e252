"""A gate and the projection of what it lets through, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.ops.gelu_and_mul_linear.cases import CASES, GeluAndMulLinearCase
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("gelu_and_mul_linear")

on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    np.testing.assert_allclose(
        case.run(arguments, implementation), case.exact(arguments), atol=4e-6
    )


@everyday_cases
@on_the_kernel
@pytest.mark.parametrize("case", tagged(CASES, "real"), ids=str)
def test_real_layers_are_no_worse_than_the_usual_path(case, implementation):
    arguments = case.arguments()
    ours, exact = case.run(arguments, implementation), case.exact(arguments)
    assert ours.dtype == case.dtype
    error, usual = (case.error(y, exact) for y in (ours, case.usual(arguments)))
    assert oracle.no_worse_than(error, usual, case.dtype)


@on_both
def test_more_axes_are_more_tokens(implementation):
    gate, up, w = GeluAndMulLinearCase(6, 32, 48, partial_sums=2, dtype="float32").arguments()
    flat = ops.gelu_and_mul_linear(gate, up, w, implementation=implementation)
    gate, up = gate.reshape(2, 2, 3, 32), up.reshape(2, 3, 32)
    folded = ops.gelu_and_mul_linear(gate, up, w, implementation=implementation)
    np.testing.assert_array_equal(folded.reshape(flat.shape), flat)


@on_both
def test_no_tokens(implementation):
    gate, up, w = jnp.zeros((2, 0, 32)), jnp.zeros((0, 32)), jnp.zeros((32, 48))
    assert ops.gelu_and_mul_linear(gate, up, w, implementation=implementation).shape == (0, 48)


@on_the_kernel
def test_differentiates_as_the_reference(implementation):
    arguments = GeluAndMulLinearCase(3, 32, 48, partial_sums=2, dtype="float32").arguments()

    def loss(implementation, *arguments):
        return jnp.sum(ops.gelu_and_mul_linear(*arguments, implementation=implementation) ** 2)

    for ours, exact in zip(
        *(jax.grad(loss, argnums=(1, 2, 3))(name, *arguments) for name in (implementation, "xla")),
        strict=True,
    ):
        np.testing.assert_allclose(ours, exact, atol=2e-5)


@pytest.mark.parametrize(
    ("argument", "gate", "up", "w"),
    [
        ("gate", (2, 3, 31), (3, 32), (32, 8)),
        ("gate", (1, 2, 3, 32), (3, 32), (32, 8)),
        ("w", (3, 32), (3, 32), (31, 8)),
        ("w", (3, 32), (3, 32), (32, 8, 1)),
    ],
)
def test_refuses_shapes_that_do_not_fit(argument, gate, up, w):
    with pytest.raises(ValueError, match=argument):
        ops.gelu_and_mul_linear(*map(jnp.zeros, (gate, up, w)))


@on_the_kernel
def test_a_wide_gate_is_refused(implementation):
    with pytest.raises(NotImplementedError, match="1024"):
        ops.gelu_and_mul_linear(
            *map(jnp.zeros, ((2, 1024), (2, 1024), (1024, 8))), implementation=implementation
        )
