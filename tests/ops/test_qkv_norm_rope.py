import dataclasses
import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from g4attn_jax import ProjectionMode, ops
from g4attn_jax.commands.check import judge
from g4attn_jax.ops.qkv_norm_rope.cases import CASES, QkvNormRopeCase
from g4attn_jax.rope import rope_cos_sin
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday

RUNS_HERE = ("xla", "triton_interpret")


def random_arguments(mode, batch, num_kv_heads, group, head_dim, rotary_dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(head_dim), 3)
    shape = (*batch, num_kv_heads, group + mode.num_kv_projections, head_dim)
    qkv = jax.random.normal(keys[0], shape).astype(dtype)
    q_norm, k_norm = jax.random.normal(keys[1], (2, head_dim)).astype(dtype)
    positions = jax.random.randint(keys[2], batch, 0, 262144)
    cos, sin = rope_cos_sin(positions, theta=1e4, head_dim=head_dim, rotary_dim=rotary_dim)
    return [qkv, q_norm, None if mode is ProjectionMode.Q_ONLY else k_norm, cos, sin]


@everyday()
@pytest.mark.parametrize("implementation", RUNS_HERE)
@hypothesis.given(
    mode=st.sampled_from(ProjectionMode),
    batch=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    pairs=st.one_of(st.integers(1, 35), st.sampled_from([48, 64, 160, 256])),
    rotating=st.sampled_from([0, 0.25, 0.6, 1]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(implementation, mode, batch, num_kv_heads, group, pairs, rotating, dtype):
    rotary_dim = 2 * int(rotating * pairs)
    arguments = random_arguments(mode, batch, num_kv_heads, group, 2 * pairs, rotary_dim, dtype)
    outputs = (
        ops.qkv_norm_rope(*arguments, mode=mode, implementation=implementation),
        oracle.qkv_norm_rope(*arguments, mode=mode),
        oracle.qkv_norm_rope(
            *arguments, mode=mode, norm=oracle.usual_rms_norm, turn=oracle.usual_rotate
        ),
    )
    for ours, exact, usual in zip(*outputs, strict=True):
        if exact is None:
            assert ours is None
            continue
        assert ours.shape == exact.shape
        assert ours.dtype == dtype
        error, usual_error = oracle.max_error(ours, exact), oracle.max_error(usual, exact)
        largest = oracle.largest(exact)
        assert oracle.no_worse_than(error, usual_error, dtype, largest), (error, usual_error)


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("mode", ProjectionMode)
class TestDifferentiation:
    def run(self, mode, implementation):
        return lambda *a: ops.qkv_norm_rope(*a, mode=mode, implementation=implementation)

    @everyday("ProjectionMode.QK_ONLY-triton_interpret")
    def test_forward_and_reverse_against_float64(self, mode, implementation):
        """Along a random direction of each argument: the oracle's central difference."""
        arguments = random_arguments(mode, (5,), 2, 3, 24, 12)
        outputs = jax.eval_shape(self.run(mode, implementation), *arguments)
        keys = jax.random.split(jax.random.key(1), 3)
        weights = [
            None if x is None else jax.random.normal(k, x.shape)
            for k, x in zip(keys, outputs, strict=True)
        ]

        def weighted(outputs):
            pairs = zip(weights, outputs, strict=True)
            return sum(np.sum(np.asarray(w) * x) for w, x in pairs if x is not None)

        def loss(*arguments):
            outputs = self.run(mode, implementation)(*arguments)
            pairs = zip(weights, outputs, strict=True)
            return sum(jnp.sum(w * x) for w, x in pairs if x is not None)

        exact = [None if a is None else np.asarray(a, np.float64) for a in arguments]
        indices = [i for i, a in enumerate(arguments) if a is not None]
        gradients = dict(zip(indices, jax.grad(loss, argnums=indices)(*arguments), strict=True))
        step = 1e-6
        for i in indices:
            direction = np.random.default_rng(i).normal(size=exact[i].shape)
            ahead, behind = (
                weighted(
                    oracle.qkv_norm_rope(
                        *exact[:i], exact[i] + sign * step * direction, *exact[i + 1 :], mode=mode
                    )
                )
                for sign in (1, -1)
            )
            slope = (ahead - behind) / (2 * step)
            assert np.sum(np.asarray(gradients[i]) * direction) == pytest.approx(slope, rel=1e-4)
            _, tangent = jax.jvp(
                lambda x, i=i: loss(*arguments[:i], x, *arguments[i + 1 :]),
                (arguments[i],),
                (jnp.asarray(direction, jnp.float32),),
            )
            assert float(tangent) == pytest.approx(slope, rel=1e-4)

    @everyday("ProjectionMode.QK_ONLY-xla")
    def test_nothing_but_the_arguments_is_kept(self, mode, implementation):
        arguments = random_arguments(mode, (16,), 2, 3, 64, 32, jnp.bfloat16)
        _, pullback = jax.vjp(self.run(mode, implementation), *arguments)
        kept = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(pullback))
        given = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(arguments))
        assert kept == given

    @everyday()
    def test_vmap_jit_and_gradient_together(self, mode, implementation):
        qkv, q_norm, k_norm, cos, sin = random_arguments(mode, (4,), 2, 3, 32, 16)

        def loss(qkv, cos, sin):
            outputs = self.run(mode, implementation)(qkv, q_norm, k_norm, cos, sin)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

        expected = jax.grad(loss)(qkv, cos, sin)
        batched = jax.jit(jax.vmap(jax.grad(loss)))(qkv, cos, sin)
        chex.assert_trees_all_close(batched, expected, rtol=1e-5, atol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"qkv": jnp.zeros((5, 2, 4, 31))}, r"qkv has shape .* its last size, D, must be even"),
            ({"qkv": jnp.zeros((5, 2, 1, 32))}, "qkv has 1 rows per KV head; QK_ONLY needs"),
            ({"q_norm": None}, "q_norm is None"),
            ({"q_norm": jnp.zeros(16)}, r"q_norm has shape \(16,\)"),
            ({"k_norm": None}, "k_norm is missing; QK_ONLY needs it"),
            ({"mode": ProjectionMode.Q_ONLY}, "k_norm was given; Q_ONLY normalises no K"),
            ({"cos": jnp.zeros((5, 4), jnp.bfloat16)}, "cos has dtype bfloat16"),
            ({"cos": np.zeros((5, 4), np.float64)}, "cos has dtype float64"),
            ({"cos": None}, "cos is None"),
            ({"sin": jnp.zeros((4, 4))}, r"sin has shape \(4, 4\)"),
            ({"cos": jnp.zeros((5, 17))}, r"cos has shape \(5, 17\).*\[5, 0 to 16\]"),
            ({"sin": jnp.zeros((5, 3))}, r"sin has shape \(5, 3\).* \(5, 8\)"),
            ({"eps": -1.0}, "eps is -1.0"),
            ({"mode": 1}, "mode is 1"),
            ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ],
    )
    def test_refused(self, change, message):
        mode = ProjectionMode.QK_ONLY
        names = "qkv", "q_norm", "k_norm", "cos", "sin"
        values = random_arguments(mode, (5,), 2, 3, 32, 16)
        arguments = dict(zip(names, values, strict=True)) | {"mode": mode}
        with pytest.raises(ValueError, match=message):
            ops.qkv_norm_rope(**(arguments | change))


ODD_PARTIAL_SUMS = [case for case in tagged(CASES, "odd") if case.partial_sums is not None]


@everyday("34-12-13-partial_sums=3")
@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", ODD_PARTIAL_SUMS, ids=str)
def test_partial_sums(case, implementation):
    """Added before they are rounded: nothing is lost to where the projection was split."""
    result = judge(case, case.arguments(), implementation)
    assert result.passed, result


@everyday()
@pytest.mark.parametrize("implementation", RUNS_HERE)
def test_one_partial_sum_is_the_projection(implementation):
    case = QkvNormRopeCase(ProjectionMode.QKV_FULL, 4, 2, 32, 8, 5)
    qkv, *others = case.arguments()
    one = dataclasses.replace(case, partial_sums=1)
    for dtype in (jnp.bfloat16, jnp.float32):
        results = one.run([qkv.astype(dtype)[None], *others], implementation)
        for a, b in zip(results, case.run([qkv, *others], implementation), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", RUNS_HERE)
def test_derivative_of_partial_sums(implementation):
    """Each has the derivative of their sum."""
    case = QkvNormRopeCase(ProjectionMode.QK_ONLY, 4, 2, 32, 8, 3, partial_sums=3)
    qkv, *others = case.arguments(jnp.float32)

    def loss(case, qkv):
        return sum(jnp.sum(x**2 * 0.5) for x in case.run([qkv, *others], implementation)[:2])

    of_sum = jax.grad(functools.partial(loss, dataclasses.replace(case, partial_sums=None)))
    gradient = jax.grad(functools.partial(loss, case))(qkv)
    expected = of_sum(qkv.sum(axis=0))
    np.testing.assert_allclose(gradient, jnp.stack([expected] * 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float64}, "dtype has dtype .*float64.*; accepted: bfloat16, float16"),
        ({"dtype": None}, r"cos has shape \(5, 4\)"),
        ({"qkv": jnp.zeros((0, 5, 2, 4, 32))}, "one or more partial sums"),
        ({"qkv": jnp.zeros((2, 4, 32))}, "one or more partial sums"),
    ],
)
def test_refused_partial_sums(change, message):
    case = QkvNormRopeCase(ProjectionMode.QKV_FULL, 4, 2, 32, 8, 5, partial_sums=2)
    names = "qkv", "q_norm", "k_norm", "cos", "sin"
    arguments = dict(zip(names, case.arguments(), strict=True))
    arguments |= {"mode": case.mode, "dtype": jnp.bfloat16}
    with pytest.raises(ValueError, match=message):
        ops.qkv_norm_rope(**(arguments | change))
