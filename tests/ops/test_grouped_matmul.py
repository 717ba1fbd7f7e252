"""`grouped_matmul`, and `grouped_gated_matmul`, which is two of it and the gate."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g4attn_jax import ops
from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.grouped_gated_matmul import cases as gated
from g4attn_jax.ops.grouped_matmul import cases as plain
from g4attn_jax.ops.grouped_matmul import triton
from g4attn_jax.ops.grouped_matmul.triton import (
    GroupedMatmulLaunch,
    GroupedMatmulSizes,
    choose_launch,
)
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("grouped_matmul", "grouped_gated_matmul")
on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)


def case(group_sizes, num_rows=None, depth=40, columns=24, tokens=None, dtype=jnp.float32):
    """x, w, group_sizes, and w and rows of the gated form."""
    rng = np.random.default_rng(sum(group_sizes) + depth)
    groups, num_rows = len(group_sizes), sum(group_sizes) if num_rows is None else num_rows
    x = rng.normal(size=(num_rows if tokens is None else tokens, depth))
    w = rng.normal(size=(groups, depth, columns)) / np.sqrt(depth)
    w2 = rng.normal(size=(groups, depth, 2, columns)) / np.sqrt(depth)
    rows = None
    if tokens is not None:
        rows = jnp.asarray(rng.integers(0, tokens, size=num_rows), jnp.int32)
    sizes = jnp.asarray(group_sizes, jnp.int32)
    return *(jnp.asarray(a, dtype) for a in (x, w)), sizes, jnp.asarray(w2, dtype), rows


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(plain.CASES + gated.CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    with jax.default_matmul_precision("highest"):
        y = case.run(arguments, implementation)
    np.testing.assert_allclose(y, case.exact(arguments), atol=2e-5)
    np.testing.assert_array_equal(y[sum(case.group_sizes) :], 0)


@on_both
def test_rows_are_read_where_they_are(implementation):
    x, _, sizes, w2, rows = case([3, 0, 18, 5], tokens=7)
    y = ops.grouped_gated_matmul(x, w2, sizes, rows, implementation=implementation)
    np.testing.assert_allclose(y, oracle.grouped_gated_matmul(x, w2, sizes, rows), atol=2e-5)
    outside = rows.at[0].set(2**30).at[1].set(-5)
    clipped = ops.grouped_gated_matmul(x, w2, sizes, outside, implementation=implementation)
    inside = ops.grouped_gated_matmul(
        x, w2, sizes, rows.at[0].set(6).at[1].set(0), implementation=implementation
    )
    np.testing.assert_array_equal(clipped, inside)


@on_the_kernel
@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 40), min_size=6, max_size=6))
def test_any_sizes(implementation, sizes):
    """One compiled program takes all; sizes that do not fit the rows are cut off."""
    x, w, *_ = case([100], num_rows=100)
    w = jnp.concatenate([w * (i + 1) for i in range(6)])
    ends = np.minimum(np.cumsum(sizes), 100)
    exact = oracle.grouped_matmul(x, w, np.diff(ends, prepend=0))
    y = _jitted(x, w, jnp.asarray(sizes, jnp.int32), implementation=implementation)
    np.testing.assert_allclose(y, exact, atol=2e-5)


_jitted = jax.jit(ops.grouped_matmul, static_argnames="implementation")


@everyday("bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype, implementation):
    """One rounding of a float32 sum; gated, less than the error of rounding the products too."""
    x, w, sizes, w2, rows = case([9, 0, 40, 2], depth=704, columns=88, tokens=20, dtype=dtype)
    gated = ops.grouped_gated_matmul(x, w2, sizes, rows, implementation=implementation)
    exact = oracle.grouped_gated_matmul(x, w2, sizes, rows)
    usual = oracle.usual_grouped_gated_matmul(x, w2, sizes, rows)
    ours, theirs = (
        np.linalg.norm(np.asarray(y).astype(np.float64) - exact) for y in (gated, usual)
    )
    assert ours < 0.8 * theirs
    x = x[rows]
    y = np.asarray(ops.grouped_matmul(x, w, sizes, implementation=implementation))
    exact = oracle.grouped_matmul(x, w, sizes)
    half_ulp = jnp.finfo(dtype).eps / 2 * np.exp2(np.floor(np.log2(np.abs(exact))))
    assert (np.abs(y.astype(np.float64) - exact) <= half_ulp + 1e-5).all()


@on_the_kernel
def test_nan_does_not_leave_its_group(implementation):
    """Other rows, empty groups and rows that no group has are NaN."""
    x, w, sizes, w2, _ = case([5, 0, 20, 3], num_rows=40, tokens=40, dtype=jnp.bfloat16)
    x = x.at[30:].set(jnp.nan).at[2].set(jnp.nan)
    w, w2 = (a.at[1].set(jnp.nan).at[3].set(jnp.inf) for a in (w, w2))
    y = ops.grouped_matmul(x, w, sizes, implementation=implementation)
    in_order = jnp.arange(40, dtype=jnp.int32)
    gated = ops.grouped_gated_matmul(x, w2, sizes, in_order, implementation=implementation)
    for out in (y, gated):
        finite = np.isfinite(np.asarray(out, np.float32)).all(axis=1)
        np.testing.assert_array_equal(finite[:25], np.arange(25) != 2)
        np.testing.assert_array_equal(np.asarray(out[28:], np.float32), 0)


@on_the_kernel
@pytest.mark.parametrize(
    "launch",
    [
        GroupedMatmulLaunch(16, 16, 16, num_warps=4, num_stages=2),
        GroupedMatmulLaunch(32, 64, 32, num_warps=4, num_stages=4),
        GroupedMatmulLaunch(64, 32, 128, num_warps=8, num_stages=3),
        GroupedMatmulLaunch(128, 128, 64, num_warps=8, num_stages=2),
    ],
)
def test_any_launch(launch, implementation):
    x, w, sizes, *_ = case([0, 40, 3, 129, 0, 17], depth=96, columns=80, dtype=jnp.bfloat16)
    y = triton.grouped_matmul(
        x, w, sizes, launch=launch, interpret=implementation == "triton_interpret"
    )
    exact = oracle.grouped_matmul(x, w, sizes)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-5)


@on_the_kernel
def test_a_row_does_not_depend_on_the_others(implementation):
    """To the last bit, at one launch."""
    x, w, sizes, *_ = case([17, 3, 20])
    run = functools.partial(ops.grouped_matmul, implementation=implementation)
    moved = run(jnp.roll(x, 5, axis=0), w, jnp.array([22, 3, 15], jnp.int32))
    np.testing.assert_array_equal(moved[5:22], run(x, w, sizes)[:17])


@everyday("triton_interpret")
@on_both
def test_x64(implementation):
    """Indices stay int32 where JAX makes Python's integers int64."""
    x, w, sizes, w2, rows = case([9, 0, 12], tokens=7)
    with jax.enable_x64(True):
        gated = ops.grouped_gated_matmul(x, w2, sizes, rows, implementation=implementation)
        y = ops.grouped_matmul(x[rows], w, sizes, implementation=implementation)
    assert gated.dtype == y.dtype == jnp.float32
    np.testing.assert_allclose(gated, oracle.grouped_gated_matmul(x, w2, sizes, rows), atol=2e-5)
    np.testing.assert_allclose(y, oracle.grouped_matmul(x[rows], w, sizes), atol=2e-5)


@everyday()
@on_the_kernel
def test_vmap(implementation):
    """Over rows and sizes, with the same matrices: as if each were alone."""
    x, w, _, w2, rows = case([30], tokens=12)
    w, w2 = (jnp.concatenate([a, -a, 2 * a]) for a in (w, w2))
    sizes = jnp.array([[30, 0, 0], [3, 17, 10]], jnp.int32)
    xs = jnp.stack([x, x + 1])

    def run(x, sizes):
        gated = ops.grouped_gated_matmul(x, w2, sizes, rows, implementation=implementation)
        return gated, ops.grouped_matmul(x[rows], w, sizes, implementation=implementation)

    alone = zip(*map(run, xs, sizes), strict=True)
    for together, each in zip(jax.vmap(run)(xs, sizes), alone, strict=True):
        np.testing.assert_allclose(together, jnp.stack(each), atol=2e-5)


def test_vmap_of_the_reference():
    """XLA's needs all arguments batched."""
    x, w, sizes, *_ = case([3, 0, 9])
    run = functools.partial(ops.grouped_matmul, implementation="xla")
    together = jax.vmap(run)(*(jnp.stack([a, a]) for a in (x, w, sizes)))
    np.testing.assert_allclose(together[1], run(x, w, sizes), atol=2e-5)


@on_both
def test_gradients_are_the_formulas(implementation):
    x, w, sizes, w2, rows = case([3, 0, 9], depth=8, columns=4, tokens=5)
    arrays = [np.asarray(a, np.float64) for a in (x, w2, w[:, :4])]
    weights = np.random.default_rng(0).normal(size=(12, 4))

    def loss(x, w2, w):
        gated = ops.grouped_gated_matmul(x, w2, sizes, rows, implementation=implementation)
        y = ops.grouped_matmul(gated, w, sizes, implementation=implementation)
        return jnp.sum(y * weights)

    def formula(x, w2, w):
        gated = oracle.grouped_gated_matmul(x, w2, sizes, rows)
        return np.sum(oracle.grouped_matmul(gated, w, sizes) * weights)

    with jax.default_matmul_precision("highest"):
        gradients = jax.grad(loss, argnums=(0, 1, 2))(x, w2, w[:, :4])
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(i).normal(size=gradient.shape)
        ahead, behind = (
            formula(*(a + sign * 1e-6 * direction if j == i else a for j, a in enumerate(arrays)))
            for sign in (1, -1)
        )
        slope = (ahead - behind) / 2e-6
        assert np.sum(np.asarray(gradient) * direction) == pytest.approx(slope, rel=1e-4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    rest=st.integers(0, 50),
    block_rows=st.sampled_from([1, 16, 64]),
)
def test_there_are_programs_for_all_tiles(sizes, rest, block_rows):
    needed = sum(-(-size // block_rows) for size in [*sizes, rest])
    shape = GroupedMatmulSizes(sum(sizes) + rest, len(sizes), 1, 1, 1, 2)
    assert needed <= shape.tiles(block_rows) <= shape.rows


GPUS = (
    Gpu(9.0, 132, 232_448),
    Gpu(8.0, 108, 166_912),
    Gpu(10.0, 148, 232_448),
    Gpu(8.6, 84, 101_376),
)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_launches_are_ones_that_fit(gpu):
    for rows, groups, depth, matrices, columns, itemsize in itertools.product(
        (1, 8, 256, 4096, 65536), (1, 8, 128), (1, 704, 2816), (1, 2), (1, 704, 2816), (2, 4)
    ):
        sizes = GroupedMatmulSizes(rows, groups, depth, matrices, columns, itemsize)
        launch = choose_launch(gpu, sizes)
        assert sizes.fits(gpu, launch)
        assert all(n >= 16 and n & (n - 1) == 0 for n in launch[:3])


def test_enough_is_on_its_way():
    """Loads for a token's 8 experts of 26B-A4B: 40 KiB a multiprocessor, in whole lines.

    Many rows are tiles for the tensor cores.
    """
    gpu = GPUS[0]
    for sizes in (
        GroupedMatmulSizes(8, 128, 2816, 2, 704, 2),
        GroupedMatmulSizes(8, 128, 704, 1, 2816, 2),
    ):
        launch = choose_launch(gpu, sizes)
        assert launch.block_rows == 16
        assert launch.block_columns >= 64
        tile = sizes.matrices * launch.block_columns * launch.block_depth * sizes.itemsize
        programs = 8 * -(-sizes.columns // launch.block_columns)
        assert programs * (launch.num_stages - 1) * tile >= 40 * 1024 * gpu.num_sms
    for tokens, rows in ((128, 16), (512, 64), (8192, 128)):
        assert (
            choose_launch(gpu, GroupedMatmulSizes(8 * tokens, 128, 704, 1, 2816, 2)).block_rows
            == rows
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": jnp.zeros((2, 8, 40))}, r"x has shape \(2, 8, 40\)"),
            ({"x": jnp.zeros((8, 40), jnp.int32)}, "x has dtype int32"),
            ({"w": jnp.zeros((3, 40))}, r"w has shape \(3, 40\)"),
            ({"w": jnp.zeros((3, 39, 2, 24))}, r"w has shape \(3, 39, 2, 24\)"),
            ({"w": jnp.zeros((3, 40, 3, 24))}, r"w has shape \(3, 40, 3, 24\)"),
            ({"w": jnp.zeros((3, 40, 2, 24), jnp.bfloat16)}, "w has dtype bfloat16"),
            ({"group_sizes": jnp.zeros(4, jnp.int32)}, r"group_sizes has shape \(4,\)"),
            (
                {"group_sizes": np.zeros(3, np.int64)},
                "group_sizes has dtype int64",
            ),
            ({"group_sizes": jnp.array([9, 0, 0])}, "sums to 9; accepted: 0 or more, 8 in all"),
            ({"group_sizes": jnp.array([9, -1, 0])}, "group_sizes has -1 as its least"),
            ({"rows": jnp.zeros((8, 1), jnp.int32)}, r"rows has shape \(8, 1\)"),
            ({"rows": jnp.zeros(8)}, "rows has dtype float32"),
            ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ],
    )
    def test_is_named(self, change, message):
        good = {
            "x": jnp.zeros((8, 40)),
            "w": jnp.zeros((3, 40, 2, 24)),
            "group_sizes": jnp.array([3, 0, 5]),
        }
        ops.grouped_gated_matmul(**good)
        with pytest.raises(ValueError, match=message):
            ops.grouped_gated_matmul(**(good | change))

    def test_matrices_of_one_part(self):
        with pytest.raises(ValueError, match=r"w has shape .* accepted: \[X, 4, N\]"):
            ops.grouped_matmul(jnp.zeros((8, 4)), jnp.zeros((3, 4, 2, 8)), jnp.array([8, 0, 0]))
