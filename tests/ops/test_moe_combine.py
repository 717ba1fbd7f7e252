"""The end of a layer with experts, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.ops.moe_combine.cases import CASES, MoeCombineCase
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("moe_combine")
on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)
SMALL = MoeCombineCase(4, 96, 3, partial_sums=2, dtype="float32")


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    outputs = case.run(arguments, implementation), case.exact(arguments)
    for ours, exact in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(ours, exact, atol=6e-6)


@on_both
def test_more_axes_are_more_tokens(implementation):
    """[2, 3, E] tokens are as [6, E]."""
    x, y, *others = MoeCombineCase(6, 96, 2, partial_sums=3, dtype="float32").arguments()
    flat = ops.moe_combine(x, y, *others, implementation=implementation)
    x, y = x.reshape(2, 3, 96), y.reshape(3, 2, 3, 96)
    folded = ops.moe_combine(x, y, *others, implementation=implementation)
    for a, b in zip(*map(jax.tree.leaves, (folded, flat)), strict=True):
        np.testing.assert_array_equal(a.reshape(b.shape), b)


@everyday("bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_one_rounding_of_each(dtype, implementation):
    """Neither branch is rounded before the sum."""
    arguments = MoeCombineCase(4, 2816, partial_sums=3).arguments(dtype)
    total, (norm,) = ops.moe_combine(*arguments, implementation=implementation)
    assert total.dtype == norm.dtype == dtype
    exact_total, _ = oracle.moe_combine(*arguments)
    for ours, exact in [
        (total, exact_total),
        (norm, oracle.rms_norm(total, arguments[6][0], eps=1e-6)),
    ]:
        error = oracle.max_error(ours, exact)
        assert oracle.no_worse_than(error, oracle.max_error(exact.astype(dtype), exact), dtype)


@on_both
def test_without_norms_or_factor(implementation):
    arguments = SMALL.arguments()[:6]
    total, norms = ops.moe_combine(*arguments, implementation=implementation)
    assert norms == ()
    np.testing.assert_allclose(total, oracle.moe_combine(*arguments)[0], atol=6e-6)


@on_the_kernel
def test_transformations(implementation):
    arguments = SMALL.arguments()
    place = arguments[4]

    def loss(x, y, rows, weights, *rest, implementation=implementation):
        arrays = x, y, rows, weights, place, *rest
        total, (norm,) = ops.moe_combine(*arrays, implementation=implementation)
        return jnp.sum(jnp.sin(total)) + jnp.sum(jnp.cos(norm))

    floats = [*arguments[:4], *arguments[5:]]
    every = tuple(range(len(floats)))
    ours = jax.grad(loss, every)(*floats)
    theirs = jax.grad(lambda *a: loss(*a, implementation="xla"), every)(*floats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    x, y, rows, weights, place, *rest = arguments
    batched = jax.vmap(
        lambda x, y, weights, place: ops.moe_combine(
            x, y, rows, weights, place, *rest, implementation=implementation
        )
    )(x[:, None], y.swapaxes(0, 1)[:, :, None], weights[:, None], place[:, None])
    alone = ops.moe_combine(*arguments, implementation="xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, atol=1e-5), batched, alone)


def test_no_tokens():
    x, y, rows, weights, place, *rest = SMALL.arguments()
    empty = x[:0], y[:, :0], rows, weights[:0], place[:0]
    total, (norm,) = ops.moe_combine(*empty, *rest, implementation="triton_interpret")
    assert total.shape == norm.shape == (0, 96)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, jnp.zeros(()), r"x has shape \(\)"),
        (1, jnp.zeros((4, 95)), r"y has shape \(4, 95\)"),
        (2, jnp.zeros((12, 95)), r"rows has shape \(12, 95\)"),
        (3, jnp.zeros((3, 3)), r"weights has shape \(3, 3\)"),
        (3, jnp.zeros((4, 3), jnp.bfloat16), "weights has dtype bfloat16"),
        (4, jnp.zeros((4, 2), jnp.int32), r"place has shape \(4, 2\)"),
        (4, jnp.zeros((4, 3)), "place has dtype float32"),
        (6, [jnp.zeros(96), jnp.zeros(95)], r"next_scales\[1\] has shape \(95,\)"),
        (7, jnp.zeros(1), r"factor has shape \(1,\)"),
    ],
)
def test_refusals(index, value, message):
    arguments = SMALL.arguments()
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.moe_combine(*arguments)


def test_a_norm_of_another_width_is_named():
    arguments = SMALL.arguments()
    arguments[5] = arguments[5]._replace(experts=jnp.zeros(95))
    with pytest.raises(ValueError, match=r"norms.experts has shape \(95,\)"):
        ops.moe_combine(*arguments)
