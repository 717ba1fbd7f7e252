import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax.rope import apply_rope, rope_cos_sin
from g4attn_jax.testing import oracle

KINDS = [(1e4, 256, 256), (1e6, 512, 128), (1e4, 8, 8), (1e6, 64, 16), (1e6, 8, 0)]


@pytest.mark.parametrize(("theta", "head_dim", "rotary_dim"), KINDS)
def test_against_float64(theta, head_dim, rotary_dim):
    x = jax.random.normal(jax.random.key(0), (3, 7, 2, head_dim))
    positions = jnp.arange(21).reshape(3, 7) * 13
    cos, sin = rope_cos_sin(positions, theta=theta, head_dim=head_dim, rotary_dim=rotary_dim)
    assert cos.shape == sin.shape == (3, 7, rotary_dim // 2)
    expected = oracle.rope(x, positions, theta=theta, rotary_dim=rotary_dim)
    # An angle of up to 260 has a float32 ulp of 3e-5.
    np.testing.assert_allclose(apply_rope(x, cos, sin), expected, atol=2e-4)


def test_angles_are_as_good_as_float32_gets():
    """No angle is further off than half an ulp of it, and the frequency's own rounding."""
    positions = np.array([0, 1, 511, 65_537, 262_143])
    pairs = np.arange(64)
    exact = positions[:, None] * 1e6 ** (-2.0 * pairs / 512)
    cos, sin = rope_cos_sin(jnp.asarray(positions), theta=1e6, head_dim=512, rotary_dim=128)
    bound = exact * 2.0**-23 + 2.0**-23
    assert np.all(np.abs(cos - np.cos(exact)) <= bound)
    assert np.all(np.abs(sin - np.sin(exact)) <= bound)


def test_unrotated_dims_are_untouched():
    x = jax.random.normal(jax.random.key(0), (5, 2, 512), jnp.bfloat16)
    cos, sin = rope_cos_sin(jnp.arange(5), theta=1e6, head_dim=512, rotary_dim=128)
    y = apply_rope(x, cos, sin)
    rotates = np.zeros(512, bool)
    rotates[:64] = rotates[256:320] = True
    np.testing.assert_array_equal(y[..., ~rotates], x[..., ~rotates])
    assert np.all(np.any(np.asarray(y != x)[1:, :, rotates], axis=(0, 1)))
    np.testing.assert_array_equal(y[0], x[0])  # position 0 rotates by nothing


def test_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 64))

    def score(q_position, k_position):
        turn = {"theta": 1e4, "head_dim": 64, "rotary_dim": 64}
        rotated = [
            apply_rope(x, *rope_cos_sin(jnp.array([p]), **turn))
            for x, p in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(17, 5) == pytest.approx(score(112, 100), abs=1e-4)
    assert score(17, 5) != pytest.approx(score(17, 6), abs=1e-2)
