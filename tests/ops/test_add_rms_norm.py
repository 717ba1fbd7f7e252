"""The residual sum and its norms, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.ops.add_rms_norm.cases import CASES
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("add_rms_norm")

on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)


def case(*shape, dtype=jnp.float32, y_dtype=None, partial_sums=None, scales=1):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], shape, dtype)
    y = 3 * jax.random.normal(keys[1], shape if partial_sums is None else (partial_sums, *shape))
    scale, *next_scales = 1 + 0.2 * jax.random.normal(keys[2], (1 + scales, shape[-1]))
    return [
        x,
        y.astype(y_dtype or dtype),
        scale.astype(dtype),
        [s.astype(dtype) for s in next_scales],
        jnp.asarray(0.7, dtype),
    ]


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    outputs = case.run(arguments, implementation), case.exact(arguments)
    for ours, exact in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(ours, exact, atol=4e-6)


@on_both
def test_more_axes_are_more_tokens(implementation):
    """[2, 3, E] tokens are as [6, E]."""
    x, y, *others = case(6, 512, partial_sums=3)
    flat = ops.add_rms_norm(x, y, *others, implementation=implementation)
    x, y = x.reshape(2, 3, 512), y.reshape(3, 2, 3, 512)
    folded = ops.add_rms_norm(x, y, *others, implementation=implementation)
    for a, b in zip(*map(jax.tree.leaves, (folded, flat)), strict=True):
        np.testing.assert_array_equal(a.reshape(b.shape), b)


@everyday("None-bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("y_dtype", [None, jnp.float32])
def test_one_rounding_of_each(dtype, y_dtype, implementation):
    arguments = case(4, 2816, dtype=dtype, y_dtype=y_dtype)
    total, (norm,) = ops.add_rms_norm(*arguments, implementation=implementation)
    assert total.dtype == norm.dtype == dtype
    exact_total, _ = oracle.add_rms_norm(*arguments)
    for ours, exact in [
        (total, exact_total),
        (norm, oracle.rms_norm(total, arguments[3][0], eps=1e-6)),
    ]:
        error = oracle.max_error(ours, exact)
        # A rounding of float32 may fall on the other side of a tie.
        assert oracle.no_worse_than(error, oracle.max_error(exact.astype(dtype), exact), dtype)


@on_both
def test_without_norms_or_factor(implementation):
    x, y, scale, _, _ = case(3, 200)
    total, norms = ops.add_rms_norm(x, y, scale, implementation=implementation)
    assert norms == ()
    np.testing.assert_allclose(total, oracle.add_rms_norm(x, y, scale)[0], atol=4e-6)


@on_the_kernel
def test_transformations(implementation):
    arguments = case(4, 96)

    def loss(*arguments, implementation=implementation):
        total, (norm,) = ops.add_rms_norm(*arguments, implementation=implementation)
        return jnp.sum(jnp.sin(total)) + jnp.sum(jnp.cos(norm))

    ours = jax.grad(loss, (0, 1, 2, 3, 4))(*arguments)
    theirs = jax.grad(lambda *a: loss(*a, implementation="xla"), (0, 1, 2, 3, 4))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    x, y, *rest = arguments
    batched = jax.vmap(lambda x, y: ops.add_rms_norm(x, y, *rest, implementation=implementation))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        batched(x[:, None], y[:, None]),
        jax.tree.map(lambda a: a[:, None], ops.add_rms_norm(*arguments, implementation="xla")),
    )


def test_no_tokens():
    x, y, scale, next_scales, factor = case(1, 96)
    total, (norm,) = ops.add_rms_norm(
        x[:0], y[:0], scale, next_scales, factor, implementation="triton_interpret"
    )
    assert total.shape == norm.shape == (0, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: jnp.zeros(())}, r"x has shape \(\)"),
        ({0: jnp.zeros((4, 96), int)}, "x has dtype int32"),
        (
            {1: jnp.zeros((4, 95))},
            r"y has shape \(4, 95\)",
        ),
        ({1: jnp.zeros((2, 2, 4, 96))}, r"y has shape \(2, 2, 4, 96\)"),
        ({2: jnp.zeros(95)}, r"scale has shape \(95,\)"),
        ({2: None}, r"scale is None"),
        ({3: [jnp.zeros(96), jnp.zeros(95)]}, r"next_scales\[1\] has shape \(95,\)"),
        ({4: jnp.zeros(1)}, r"factor has shape \(1,\)"),
    ],
)
def test_refusals(change, message):
    arguments = dict(enumerate(case(4, 96))) | change
    with pytest.raises(ValueError, match=message):
        ops.add_rms_norm(*arguments.values())
