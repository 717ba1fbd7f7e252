"""Mixture of gated MLPs for few tokens, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.moe_mlp import triton
from g4attn_jax.ops.moe_mlp.cases import CASES, MoeMlpCase
from g4attn_jax.ops.moe_mlp.launch import (
    ProductLaunch,
    choose_down_launch,
    choose_gated_launch,
)
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("moe_mlp")
on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)
SMALL = MoeMlpCase(2, 48, 24, 5, 3, dtype="float32")


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    with jax.default_matmul_precision("highest"):
        y = case.run(arguments, implementation)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(case.result(y), case.exact(arguments), atol=2e-5)


@everyday("bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype, implementation):
    """Less than the error of rounding products and answers too."""
    case = MoeMlpCase(2, 704, 88, 6, 4)
    arguments = case.arguments(dtype)
    exact, usual = case.exact(arguments), case.usual(arguments)
    y = case.result(case.run(arguments, implementation))
    assert case.error(y, exact) < 0.8 * case.error(usual, exact)


@on_the_kernel
@pytest.mark.parametrize(
    ("gated", "down"),
    [
        ((16, 16, 1, 4, 2), (16, 16, 7, 4, 2)),
        ((32, 32, 2, 4, 3), (64, 16, 1, 4, 3)),
        ((16, 64, 1, 2, 4), (32, 32, 3, 8, 2)),
    ],
)
def test_any_launch(gated, down, implementation):
    arguments = SMALL.arguments()
    down = ProductLaunch(*down)
    y = triton.moe_mlp(
        *arguments,
        num_partial_sums=down.parts,
        interpret=implementation == "triton_interpret",
        gated_launch=ProductLaunch(*gated),
        down_launch=down,
    )
    assert y.shape == (down.parts, 2, 48)
    np.testing.assert_allclose(y.sum(axis=0), SMALL.exact(arguments), atol=2e-5)


@on_both
def test_experts_of_weight_0_and_twice_the_same(implementation):
    h, gate_up, down, _, _ = SMALL.arguments()
    experts = jnp.array([[4, 4, 0], [1, 2, 3]], jnp.int32)
    weights = jnp.array([[0.5, 0.25, 0], [0, 0, 0]], jnp.float32)
    arguments = h, gate_up, down, experts, weights
    with jax.default_matmul_precision("highest"):
        y = ops.moe_mlp(*arguments, implementation=implementation).sum(axis=0)
    np.testing.assert_allclose(y, oracle.moe_mlp(*arguments), atol=2e-5)
    np.testing.assert_array_equal(y[1], 0)


@on_the_kernel
def test_other_experts_are_not_read(implementation):
    h, gate_up, down, _, weights = SMALL.arguments()
    gate_up, down = (a.at[jnp.array([1, 3])].set(jnp.nan) for a in (gate_up, down))
    experts = jnp.array([[0, 2, 4], [4, 0, 2]], jnp.int32)
    y = ops.moe_mlp(h, gate_up, down, experts, weights, implementation=implementation)
    assert np.isfinite(y).all()
    again = ops.moe_mlp(h, gate_up, down, experts, weights, implementation=implementation)
    np.testing.assert_array_equal(y, again)


@on_the_kernel
def test_transformations(implementation):
    arguments = SMALL.arguments()
    experts = arguments[3]

    def loss(h, gate_up, down, weights, implementation=implementation):
        arrays = h, gate_up, down, experts, weights
        return jnp.sum(jnp.sin(ops.moe_mlp(*arrays, implementation=implementation).sum(axis=0)))

    floats = [*arguments[:3], arguments[4]]
    with jax.default_matmul_precision("highest"):
        ours = jax.grad(loss, (0, 1, 2, 3))(*floats)
        theirs = jax.grad(functools.partial(loss, implementation="xla"), (0, 1, 2, 3))(*floats)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    h, gate_up, down, experts, weights = arguments
    together = jax.vmap(
        lambda *a: ops.moe_mlp(a[0], gate_up, down, *a[1:], implementation=implementation).sum(0)
    )(h[:, None], experts[:, None], weights[:, None])
    np.testing.assert_allclose(together[:, 0], SMALL.exact(arguments), atol=2e-5)


def test_the_memory_bus_has_equal_work_for_all_programs():
    """A token of 26B-A4B on an H200: two programs a multiprocessor share the second product."""
    gpu = Gpu(9.0, 132, 232_448)
    sizes = {"depth": 704, "columns": 2816, "itemsize": 2}
    launch = choose_down_launch(gpu, tokens=1, top_k=8, **sizes)
    assert (2816 // launch.block_columns) * launch.parts == 2 * gpu.num_sms


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_memory", [232_448, 166_912, 101_376])
def test_launches_fit(shared_memory, itemsize):
    gpu = Gpu(9.0, 132, shared_memory)
    sizes = {"depth": 704, "columns": 2816, "itemsize": itemsize}
    for matrices, launch in (
        (2, choose_gated_launch(gpu, **sizes)),
        (1, choose_down_launch(gpu, tokens=1, top_k=8, **sizes)),
    ):
        stage = (16 + matrices * launch.block_columns) * launch.block_depth * itemsize
        assert launch.num_stages >= 2 and launch.num_stages * stage <= shared_memory


def test_no_tokens():
    h, gate_up, down, experts, weights = SMALL.arguments()
    arrays = h[:0], gate_up, down, experts[:0], weights[:0]
    assert ops.moe_mlp(*arrays, implementation="triton_interpret").shape[1:] == (0, 48)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, jnp.zeros((2, 3, 48)), r"h has shape \(2, 3, 48\)"),
        (1, jnp.zeros((5, 47, 2, 24)), r"gate_up has shape \(5, 47, 2, 24\)"),
        (1, jnp.zeros((5, 48, 2, 24), jnp.bfloat16), "gate_up has dtype bfloat16"),
        (2, jnp.zeros((5, 24, 47)), r"down has shape \(5, 24, 47\)"),
        (3, jnp.zeros((3, 3), jnp.int32), r"experts has shape \(3, 3\)"),
        (3, jnp.zeros((2, 3)), "experts has dtype float32"),
        (4, jnp.zeros((2, 2)), r"weights has shape \(2, 2\)"),
    ],
)
def test_refusals(index, value, message):
    arguments = SMALL.arguments()
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.moe_mlp(*arguments)
