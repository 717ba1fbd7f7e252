import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from g4attn_jax import ProjectionMode, ops
from g4attn_jax.testing import oracle
from tests.everyday import everyday

RUNS_HERE = ("xla", "triton_interpret")


def random_arguments(mode, shape, *, dtype=jnp.float32, scale_dtype=jnp.float32, v_norm=False):
    keys = jax.random.split(jax.random.key(len(shape)), 4)
    qkv = jax.random.normal(keys[0], shape).astype(dtype)
    scales = [jax.random.normal(k, shape[-1:]).astype(scale_dtype) for k in keys[1:]]
    if mode is ProjectionMode.Q_ONLY:
        return qkv, scales[0], None, None
    return qkv, scales[0], scales[1], scales[2] if v_norm else None


def assert_no_worse_than_usual(ours, arguments, **kwargs):
    exact = oracle.qkv_rms_norm(*arguments, **kwargs)
    usual = oracle.qkv_rms_norm(*arguments, norm=oracle.usual_rms_norm, **kwargs)
    for name, x, y, z in zip("qkv", ours, exact, usual, strict=True):
        if y is None:
            assert x is None
            continue
        assert x.shape == y.shape
        assert x.dtype == arguments[0].dtype
        error, usual_error = oracle.max_error(x, y), oracle.max_error(z, y)
        largest = oracle.largest(y)
        assert oracle.no_worse_than(error, usual_error, x.dtype, largest), (
            name,
            error,
            usual_error,
        )


@everyday()
@pytest.mark.parametrize("implementation", RUNS_HERE)
@hypothesis.given(
    mode=st.sampled_from(ProjectionMode),
    batch=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 320, 512])),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    scale_dtype=st.sampled_from(["bfloat16", "float32"]),
    v_norm=st.booleans(),
    scale_offset=st.sampled_from([0.0, 1.0]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(
    implementation,
    mode,
    batch,
    num_kv_heads,
    group,
    head_dim,
    dtype,
    scale_dtype,
    v_norm,
    scale_offset,
    eps,
):
    shape = (*batch, num_kv_heads, group + mode.num_kv_projections, head_dim)
    arguments = random_arguments(mode, shape, dtype=dtype, scale_dtype=scale_dtype, v_norm=v_norm)
    constants = {"mode": mode, "eps": eps, "scale_offset": scale_offset}
    ours = ops.qkv_rms_norm(*arguments, **constants, implementation=implementation)
    assert_no_worse_than_usual(ours, arguments, **constants)


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("mode", ProjectionMode)
def test_no_tokens(mode, implementation):
    arguments = random_arguments(mode, (0, 2, 3 + mode.num_kv_projections, 64))
    q, k, v = ops.qkv_rms_norm(*arguments, mode=mode, implementation=implementation)
    assert q.shape == (0, 6, 64)
    if mode is not ProjectionMode.Q_ONLY:
        assert k.shape == v.shape == (0, 2, 64)


@pytest.mark.parametrize("implementation", RUNS_HERE)
def test_k_and_v_of_one_row_share_their_norm(implementation):
    """In QK_ONLY k is v * k_norm, the same rrms: in float32 to the last bit or two."""
    qkv, q_norm, k_norm, _ = random_arguments(ProjectionMode.QK_ONLY, (9, 2, 5, 512))
    _, k, v = ops.qkv_rms_norm(
        qkv, q_norm, k_norm, mode=ProjectionMode.QK_ONLY, implementation=implementation
    )
    np.testing.assert_allclose(k, v * k_norm, rtol=3e-7)


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("mode", ProjectionMode)
class TestDifferentiation:
    def loss(self, mode, implementation):
        def loss(*arguments):
            outputs = ops.qkv_rms_norm(
                *arguments, mode=mode, implementation=implementation, scale_offset=0.5
            )
            # A different weight for every output, or errors of k and v could cancel.
            leaves = jax.tree.leaves(outputs)
            return sum(jnp.sum(jnp.sin((i + 1) * x)) for i, x in enumerate(leaves))

        return loss

    @everyday("ProjectionMode.QK_ONLY-triton_interpret")
    def test_forward_and_reverse_against_finite_differences(self, mode, implementation):
        arguments = random_arguments(mode, (2, 1, 2 + mode.num_kv_projections, 8), v_norm=True)
        jax.test_util.check_grads(
            self.loss(mode, implementation),
            arguments,
            order=1,
            modes=("fwd", "rev"),
            atol=2e-2,
            rtol=2e-2,
            eps=1e-2,
        )

    @everyday("ProjectionMode.QKV_FULL-triton_interpret")
    def test_gradient_against_the_formula(self, mode, implementation):
        """dx = r (g - n mean(n g)) with n = x r, and dscale = sum of n dy, in float64."""
        arguments = random_arguments(mode, (7, 2, 3 + mode.num_kv_projections, 48), v_norm=True)
        outputs, pullback = jax.vjp(
            lambda *a: ops.qkv_rms_norm(*a, mode=mode, implementation=implementation), *arguments
        )
        keys = iter(jax.random.split(jax.random.key(7), 3))
        cotangents = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), outputs)
        actual = pullback(cotangents)

        x, *scales = [None if a is None else np.asarray(a, np.float64) for a in arguments]
        dq, dk, dv = [None if a is None else np.asarray(a, np.float64) for a in cotangents]
        group = x.shape[-2] - mode.num_kv_projections
        r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        n = x * r
        g = np.zeros_like(x)
        dq = dq.reshape(*x.shape[:-2], group, x.shape[-1])
        g[..., :group, :] += dq * scales[0]
        dscales = [np.sum(dq * n[..., :group, :], axis=(0, 1, 2)), None, None]
        if mode is not ProjectionMode.Q_ONLY:
            g[..., group, :] += dk * scales[1]
            g[..., -1, :] += dv * scales[2]
            dscales[1] = np.sum(dk * n[..., group, :], axis=(0, 1))
            dscales[2] = np.sum(dv * n[..., -1, :], axis=(0, 1))
        expected = [r * (g - n * np.mean(n * g, axis=-1, keepdims=True)), *dscales]
        for a, e in zip(actual, expected, strict=True):
            if e is None:
                assert a is None
            else:
                np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)

    @everyday("ProjectionMode.QK_ONLY-triton_interpret")
    def test_nothing_but_the_arguments_is_kept(self, mode, implementation):
        arguments = random_arguments(
            mode, (16, 2, 3 + mode.num_kv_projections, 64), dtype=jnp.bfloat16
        )
        _, pullback = jax.vjp(
            lambda *a: ops.qkv_rms_norm(*a, mode=mode, implementation=implementation), *arguments
        )
        kept = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(pullback))
        given = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(arguments))
        assert kept == given

    @everyday("ProjectionMode.QK_ONLY-xla")
    def test_second_derivative(self, mode, implementation):
        arguments = random_arguments(mode, (1, 1, 1 + mode.num_kv_projections, 4))

        def formula(qkv):
            n = qkv / jnp.sqrt(jnp.mean(qkv * qkv, axis=-1, keepdims=True) + 1e-6)
            outputs = [n[..., 0, :] * (0.5 + arguments[1])]
            if mode is not ProjectionMode.Q_ONLY:
                outputs += [n[..., 1, :] * (0.5 + arguments[2]), n[..., -1, :]]
            return sum(jnp.sum(jnp.sin((i + 1) * x)) for i, x in enumerate(outputs))

        hessian = jax.hessian(self.loss(mode, implementation))(*arguments)
        expected = jax.hessian(formula)(arguments[0])
        np.testing.assert_allclose(hessian, expected, atol=1e-4, rtol=1e-4)
        assert float(jnp.abs(expected).max()) > 0.1


@pytest.mark.parametrize("implementation", [None, *RUNS_HERE])
@pytest.mark.parametrize("mode", ProjectionMode)
class TestTransformations:
    def run(self, mode, implementation):
        return lambda *a: ops.qkv_rms_norm(*a, mode=mode, implementation=implementation)

    @everyday("ProjectionMode.QK_ONLY-triton_interpret", "ProjectionMode.QKV_FULL-xla")
    def test_64_bit_mode(self, mode, implementation):
        with jax.enable_x64(True):
            arguments = random_arguments(mode, (3, 2, 3 + mode.num_kv_projections, 32))
            ours = self.run(mode, implementation)(*arguments)
            assert_no_worse_than_usual(ours, arguments, mode=mode)

    @everyday("1-ProjectionMode.QK_ONLY-triton_interpret", "0-ProjectionMode.QKV_FULL-None")
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_vmap_over_tokens(self, mode, implementation, axis):
        qkv, *scales = random_arguments(mode, (3, 5, 2, 3 + mode.num_kv_projections, 32))
        run = self.run(mode, implementation)
        expected = run(qkv, *scales)
        batched = jax.vmap(run, in_axes=(axis, None, None, None), out_axes=axis)
        chex.assert_trees_all_close(
            batched(jnp.moveaxis(qkv, 0, axis), *scales),
            jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), expected),
            rtol=1e-6,
        )

    @everyday("ProjectionMode.QK_ONLY-triton_interpret")
    def test_vmap_over_scales(self, mode, implementation):
        qkv, *scales = random_arguments(mode, (5, 2, 3 + mode.num_kv_projections, 32))
        run = self.run(mode, implementation)
        many = jax.tree.map(lambda s: jnp.stack([s, 2 * s, -s]), scales)
        batched = jax.vmap(run, in_axes=(None, 0, 0, 0))(qkv, *many)
        for i in range(3):
            expected = run(qkv, *jax.tree.map(lambda s, i=i: s[i], many))
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, i=i: x[i], batched), expected, rtol=1e-6
            )

    @everyday("ProjectionMode.Q_ONLY-triton_interpret")
    def test_gradient_under_vmap_and_jit(self, mode, implementation):
        qkv, *scales = random_arguments(mode, (4, 2, 3 + mode.num_kv_projections, 32))

        def loss(qkv):
            outputs = self.run(mode, implementation)(qkv, *scales)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

        expected = jax.grad(loss)(qkv)
        chex.assert_trees_all_close(
            jax.jit(jax.vmap(jax.grad(loss)))(qkv), expected, rtol=1e-5, atol=1e-6
        )

    def test_jit_traces_once_a_shape(self, mode, implementation):
        arguments = random_arguments(mode, (4, 2, 3 + mode.num_kv_projections, 32))
        chex.clear_trace_counter()
        run = jax.jit(chex.assert_max_traces(self.run(mode, implementation), n=1))
        first, second = run(*arguments), run(*arguments)
        chex.assert_trees_all_equal(first, second)


def qkv_of(mode=ProjectionMode.QK_ONLY, rows=9, **kwargs):
    return random_arguments(mode, (4, 4, rows, 64), **kwargs)


@pytest.mark.parametrize("mode", ProjectionMode)
def test_export_with_a_symbolic_number_of_tokens(mode):
    _, *scales = random_arguments(mode, (1, 2, 3 + mode.num_kv_projections, 32))
    (tokens,) = jax.export.symbolic_shape("tokens")
    shape = (tokens, 2, 3 + mode.num_kv_projections, 32)
    qkv = jax.ShapeDtypeStruct(shape, jnp.float32)

    def export(implementation):
        run = jax.jit(
            lambda x: ops.qkv_rms_norm(x, *scales, mode=mode, implementation=implementation)
        )
        return jax.export.export(run, platforms=["cpu"])(qkv)

    exported = export(None)
    for n in (1, 5):
        x = jax.random.normal(jax.random.key(n), (n, *shape[1:]))
        if jax.default_backend() == "cpu":
            chex.assert_trees_all_close(
                exported.call(x), ops.qkv_rms_norm(x, *scales, mode=mode), rtol=1e-6
            )
    with pytest.raises(NotImplementedError, match="needs shapes known at trace time"):
        export("triton_interpret")


class TestBadInput:
    mode = ProjectionMode.QK_ONLY

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"qkv": jnp.zeros((9, 64))}, r"qkv has shape \(9, 64\)"),
            (
                {"qkv": jnp.zeros((4, 1, 64))},
                "qkv has 1 rows per KV head; QK_ONLY needs at least 2",
            ),
            ({"qkv": jnp.zeros((4, 9, 64), jnp.int32)}, "qkv has dtype int32"),
            ({"qkv": jnp.zeros((4, 9, 0))}, "qkv has shape"),
            ({"q_norm": jnp.zeros(63)}, r"q_norm has shape \(63,\)"),
            ({"q_norm": None}, "q_norm is None"),
            ({"k_norm": jnp.zeros((1, 64))}, r"k_norm has shape \(1, 64\)"),
            ({"k_norm": jnp.zeros(64, jnp.int8)}, "k_norm has dtype int8"),
            ({"k_norm": None}, "k_norm is missing; QK_ONLY needs it"),
            ({"v_norm": jnp.zeros(32)}, r"v_norm has shape \(32,\)"),
            ({"mode": "QK_ONLY"}, "mode is 'QK_ONLY'"),
            ({"mode": ProjectionMode.Q_ONLY}, "k_norm was given; Q_ONLY normalises no K"),
            ({"eps": -1.0}, "eps is -1.0"),
            ({"eps": "small"}, "eps is 'small'"),
            ({"eps": float("inf")}, "eps is inf"),
            ({"scale_offset": None}, "scale_offset is None"),
            (
                {"implementation": "cuda"},
                "implementation is 'cuda'",
            ),
        ],
    )
    def test_refused(self, change, message):
        qkv, q_norm, k_norm, _ = qkv_of()
        arguments = {"qkv": qkv, "q_norm": q_norm, "k_norm": k_norm, "mode": self.mode}
        with pytest.raises(ValueError, match=message):
            ops.qkv_rms_norm(**(arguments | change))

    def test_v_scale_is_surplus_for_q_only(self):
        with pytest.raises(ValueError, match="v_norm was given"):
            ops.qkv_rms_norm(
                jnp.zeros((2, 3, 8)), jnp.ones(8), v_norm=jnp.ones(8), mode=ProjectionMode.Q_ONLY
            )

    def test_triton_without_a_gpu(self):
        if jax.default_backend() == "gpu":
            pytest.skip("there is a GPU here")
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU of compute capability"):
            ops.qkv_rms_norm(*qkv_of(), mode=self.mode, implementation="triton")
