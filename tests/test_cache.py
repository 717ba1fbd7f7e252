import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax.cache import KVCache

B, S, N, D = 2, 6, 2, 4


def rows(tokens, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (2, B, tokens, N, D)).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rows_go_to_their_positions_and_nowhere_else(dtype):
    poison = jnp.full((B, S, N, D), 7, dtype)
    k, v = rows(3, dtype=dtype)
    positions = jnp.array([[0, 2, 5], [4, -1, 1]])
    cache = KVCache(poison, poison).write(positions, k, v)
    for actual, new in zip(cache, (k, v), strict=True):
        expected = np.array(poison)
        for b in range(B):
            for t in range(3):
                if positions[b, t] >= 0:
                    expected[b, positions[b, t]] = new[b, t]
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("position", [-1, -3, S, S + 1, 2**31 - 1, -(2**31)])
def test_positions_outside_write_nothing(position):
    poison = jnp.full((B, S, N, D), jnp.inf)
    cache = KVCache(poison, poison)
    written = jax.jit(KVCache.write)(cache, jnp.full((B, 1), position), *rows(1))
    np.testing.assert_array_equal(written.k, poison)
    np.testing.assert_array_equal(written.v, poison)


def test_capacity():
    assert KVCache.zeros((B, S, N, D), jnp.bfloat16).capacity == S


def test_derivative_of_a_write():
    """What is written has the gradient of its slot, what is overwritten none."""
    cache = KVCache(*rows(S, seed=1))
    k, v = rows(2)
    positions = jnp.array([[1, 3], [0, -1]])
    weights = jax.random.normal(jax.random.key(9), (B, S, N, D))

    def loss(cache, k):
        return jnp.sum(cache.write(positions, k, v).k * weights)

    d_cache, d_k = jax.grad(loss, argnums=(0, 1))(cache, k)
    kept = np.ones((B, S), bool)
    kept[0, [1, 3]] = kept[1, 0] = False
    np.testing.assert_array_equal(d_cache.k, np.where(kept[..., None, None], weights, 0))
    np.testing.assert_array_equal(d_k[0], weights[0, jnp.array([1, 3])])
    np.testing.assert_array_equal(d_k[1], np.stack([weights[1, 0], np.zeros((N, D))]))
    tangent = jax.jvp(lambda k: loss(cache, k), (k,), (k,))[1]
    assert float(tangent) == pytest.approx(float(jnp.sum(d_k * k)), rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_donated_write_is_in_place(dtype):
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and jax.__version__ < "0.11":
        pytest.skip("XLA's CPU backend of JAX 0.10 converts bfloat16 to float32 and back to update")
    cache = KVCache.zeros((B, 1024, N, D), dtype)
    k, v = rows(1, dtype=dtype)
    step = jax.jit(KVCache.write, donate_argnums=0)
    compiled = step.lower(cache, jnp.zeros((B, 1), jnp.int32), k, v).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes / 16
    pointers = [a.unsafe_buffer_pointer() for a in cache]
    cache = step(cache, jnp.zeros((B, 1), jnp.int32), k, v)
    assert [a.unsafe_buffer_pointer() for a in cache] == pointers
