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


def random_arguments(batch, num_q_heads, num_kv_heads, head_dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(head_dim), 4)
    return (
        jax.random.normal(keys[0], (*batch, num_q_heads, head_dim)).astype(dtype),
        jax.random.normal(keys[1], (*batch, num_kv_heads, head_dim)).astype(dtype),
        jax.random.normal(keys[2], (head_dim,)),
        jax.random.normal(keys[3], (head_dim,)),
    )


@everyday()
@pytest.mark.parametrize("implementation", RUNS_HERE)
@hypothesis.given(
    batch=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    num_q_heads=st.integers(1, 7),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 320, 512])),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    v_norm=st.booleans(),
    scale_offset=st.sampled_from([0.0, 1.0]),
)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_any_shape(
    implementation, batch, num_q_heads, num_kv_heads, head_dim, dtype, v_norm, scale_offset
):
    arguments = random_arguments(batch, num_q_heads, num_kv_heads, head_dim, dtype)
    if v_norm:
        arguments = (*arguments, 1 + arguments[-1])
    run = {"scale_offset": scale_offset}
    ours = ops.q_keqv_rms_norm(*arguments, **run, implementation=implementation)
    exact = oracle.q_keqv_rms_norm(*arguments, **run)
    usual = oracle.q_keqv_rms_norm(*arguments, **run, norm=oracle.usual_rms_norm)
    for x, y, z in zip(ours, exact, usual, strict=True):
        assert x.shape == y.shape
        assert x.dtype == jnp.dtype(dtype)
        error, usual_error = oracle.max_error(x, y), oracle.max_error(z, y)
        assert oracle.no_worse_than(error, usual_error, dtype, oracle.largest(y))


@everyday("triton_interpret")
@pytest.mark.parametrize("implementation", RUNS_HERE)
def test_is_the_packed_op_on_unpacked_buffers(implementation):
    q, kv, q_norm, k_norm = random_arguments((5,), 8, 2, 64)
    packed = jnp.concatenate([q.reshape(5, 2, 4, 64), kv[:, :, None]], axis=2)
    chex.assert_trees_all_equal(
        ops.q_keqv_rms_norm(q, kv, q_norm, k_norm, implementation=implementation),
        ops.qkv_rms_norm(
            packed, q_norm, k_norm, mode=ProjectionMode.QK_ONLY, implementation=implementation
        ),
    )


@everyday()
@pytest.mark.parametrize("implementation", RUNS_HERE)
def test_transformations_agree_with_the_formula(implementation):
    arguments = random_arguments((3,), 4, 2, 32)

    def loss(norm, q, kv, q_norm, k_norm):
        q, k, v = norm(q, kv, q_norm, k_norm)
        return jnp.sum(jnp.sin(q)) + jnp.sum(jnp.cos(k)) + jnp.sum(jnp.sin(2 * v))

    def formula(q, kv, q_norm, k_norm):
        def rms(x):
            return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

        return rms(q) * q_norm, rms(kv) * k_norm, rms(kv)

    def ours(*a):
        return ops.q_keqv_rms_norm(*a, implementation=implementation)

    for transform in (
        lambda f: jax.grad(f, argnums=(0, 1, 2, 3)),
        lambda f: lambda *a: jax.jvp(f, a, a),
        lambda f: jax.vmap(f, in_axes=(0, 0, None, None)),
        jax.jit,
    ):
        actual = transform(lambda *a: loss(ours, *a))(*arguments)
        expected = transform(lambda *a: loss(formula, *a))(*arguments)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", RUNS_HERE)
def test_no_tokens(implementation):
    q, k, v = ops.q_keqv_rms_norm(*random_arguments((0,), 4, 2, 32), implementation=implementation)
    assert (q.shape, k.shape, v.shape) == ((0, 4, 32), (0, 2, 32), (0, 2, 32))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, np.zeros(8, np.float32), r"q has shape \(8,\)"),
        (0, np.zeros((5, 0, 32), np.float32), "q has shape"),
        (1, np.zeros((5, 0, 32), np.float32), "kv has shape"),
        (0, np.zeros((5, 4, 32), np.int32), "q has dtype int32"),
        (1, np.zeros((5, 2, 16), np.float32), r"kv has shape .*\[5, Nkv, 32\]"),
        (1, np.zeros((6, 2, 32), np.float32), r"kv has shape .*\[5, Nkv, 32\]"),
        (1, np.zeros((2, 32), np.float32), r"kv has shape .*\[5, Nkv, 32\]"),
        (1, np.zeros((5, 2, 32), np.float16), "kv has dtype float16"),
        (2, np.zeros(31, np.float32), r"q_norm has shape \(31,\)"),
        (3, None, "k_norm is None"),
    ],
)
def test_bad_input_is_refused(position, value, message):
    arguments = list(random_arguments((5,), 4, 2, 32))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.q_keqv_rms_norm(*arguments)
