"""Sampling against the distribution that transformers' warpers define, in float64 with sorting."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from g4attn_jax.model.sampling import sample

DRAWS = 40_000
LOGITS = np.asarray([2.0, -1.0, 0.5, 1.9, -4.0, 0.4, 1.0, -0.2, 0.3, -6.0], np.float32)


def distribution(logits, temperature, top_k=None, top_p=None):
    """Of one sequence [V]: temperature, then top-k, then top-p, each over what the last left."""
    scores = logits.astype(np.float64) / temperature
    if top_k is not None:
        scores[scores < np.sort(scores)[::-1][:top_k][-1]] = -np.inf
    if top_p is not None and top_p < 1:
        order = np.argsort(scores)
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        removed = order[np.cumsum(probabilities[order]) <= 1 - top_p]
        scores[np.setdiff1d(removed, order[-1:])] = -np.inf
    probabilities = np.exp(scores - scores.max())
    return probabilities / probabilities.sum()


def draw(logits, seed=0, **parameters):
    batch = jnp.tile(logits, (DRAWS, 1))
    return np.asarray(jax.jit(sample)(batch, jax.random.key(seed), **parameters))


def assert_drawn_from(tokens, expected):
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    if possible.sum() > 1:
        test = scipy.stats.chisquare(counts[possible], len(tokens) * expected[possible])
        # Seeds are fixed: this passes always or never.
        assert test.pvalue > 1e-3, (counts, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 10, 99])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
def test_statistics(temperature, top_k, top_p):
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = draw(LOGITS, **{name: value for name, value in chosen.items() if value is not None})
    assert tokens.dtype == np.int32
    assert_drawn_from(tokens, distribution(LOGITS, **chosen))


def test_each_sequence_has_its_own_parameters():
    rows = [(1.0, 10, 1.0), (0.7, 3, 1.0), (1.5, 10, 0.7), (0.8, 5, 0.8), (0.0, 5, 0.5)]
    temperature, top_k, top_p = (np.repeat(column, DRAWS) for column in zip(*rows, strict=True))
    logits = jnp.tile(LOGITS, (len(rows) * DRAWS, 1))
    tokens = jax.jit(sample)(
        logits,
        jax.random.key(1),
        temperature=temperature.astype(np.float32),
        top_k=top_k,
        top_p=top_p.astype(np.float32),
    )
    *sampled, greedy = np.asarray(tokens).reshape(len(rows), DRAWS)
    for row, drawn in zip(rows, sampled, strict=False):
        assert_drawn_from(drawn, distribution(LOGITS, *row))
    assert set(greedy) == {0}


def test_sequences_are_independent():
    tokens = draw(np.zeros(2, np.float32)).reshape(-1, 2)
    pairs = np.bincount(2 * tokens[:, 0] + tokens[:, 1], minlength=4)
    assert scipy.stats.chisquare(pairs).pvalue > 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, 80.0, -np.inf]), min_size=2, max_size=9
    ),
    st.integers(1, 9),
    st.floats(0.01, 1.0),
    st.integers(0, 2**31 - 1),
)
def test_draws_only_what_the_filters_keep(logits, top_k, top_p, seed):
    logits = np.asarray(logits, np.float32)
    if not np.isfinite(logits).any():
        logits[0] = 0
    # One logit of the reference is dropped early where a sum is at the limit up to rounding.
    expected = distribution(logits, 1.0, top_k, min(top_p + 1e-5, 1.0))
    # Equal logits are kept together here; sorting may split them.
    possible = set(logits[expected > 0])
    tokens = sample(
        jnp.tile(logits, (64, 1)),
        jax.random.key(seed),
        top_k=jnp.asarray(top_k),
        top_p=jnp.asarray(top_p, jnp.float32),
    )
    assert {logits[token] for token in np.asarray(tokens)} <= possible


def test_equal_logits_are_kept_together():
    logits = np.asarray([1, 3, 3, 3, 0], np.float32)
    assert set(draw(logits, top_k=2)) == {1, 2, 3}
    assert set(draw(logits, top_p=0.1)) == {1, 2, 3}


@pytest.mark.parametrize("zero", [0, 0.0, np.zeros(3, np.float32), jnp.zeros(3)])
def test_temperature_0_is_greedy(zero):
    logits = jnp.asarray([[0.0, 5.0, 5.0], [1e30, -1e30, 0.0], [-jnp.inf, -jnp.inf, -9.0]])
    tokens = sample(logits, jax.random.key(0), temperature=zero, top_k=2, top_p=0.5)
    np.testing.assert_array_equal(tokens, [1, 0, 2])
    assert tokens.dtype == jnp.int32


def test_a_low_temperature_approaches_greedy():
    for temperature in (1e-4, 1e-37):
        assert set(draw(LOGITS, temperature=temperature, top_p=0.9)) == {0}


def test_one_candidate_is_certain():
    logits = np.full(7, -np.inf, np.float32)
    logits[4] = -50.0
    assert set(draw(logits, temperature=3.0, top_k=5, top_p=0.9)) == {4}


def test_a_large_vocabulary():
    """Gemma's: top-k keeps exactly k of 262144, and top-p what a sum in float64 keeps."""
    logits = np.random.default_rng(0).normal(size=262144).astype(np.float32)
    tokens = sample(jnp.tile(logits, (256, 1)), jax.random.key(0), top_k=64, top_p=0.95)
    kept = np.flatnonzero(distribution(logits, 1.0, 64, 0.95))
    assert 50 < len(kept) < 64
    assert set(np.asarray(tokens)) <= set(kept)
    assert len(set(np.asarray(tokens))) > len(kept) / 2


def test_arrays_out_of_range_keep_the_best_token():
    assert set(draw(LOGITS, top_k=jnp.asarray(0))) == {0}
    assert set(draw(LOGITS, top_p=jnp.asarray(0.0))) == {0}


def test_other_values_compile_nothing():
    @jax.jit
    @chex.assert_max_traces(1)
    def step(key, temperature, top_k):
        return sample(jnp.tile(LOGITS, (2, 1)), key, temperature=temperature, top_k=top_k)

    for i in range(3):
        step(jax.random.key(i), jnp.full(2, i / 2), jnp.full(2, i + 1))


def test_vmap_and_scan():
    keys = jax.random.split(jax.random.key(0), 4)
    logits = jnp.tile(LOGITS, (2, 1))
    draw_one = functools.partial(sample, logits, temperature=0.9, top_k=5, top_p=0.9)
    one_by_one = jnp.stack([draw_one(key) for key in keys])
    np.testing.assert_array_equal(jax.vmap(draw_one)(keys), one_by_one)
    _, scanned = jax.lax.scan(lambda _, key: (None, draw_one(key)), None, keys)
    np.testing.assert_array_equal(scanned, one_by_one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": jnp.zeros(3)}, "logits has shape"),
        ({"logits": jnp.zeros((2, 0))}, "logits has shape"),
        ({"logits": jnp.zeros((2, 3), jnp.bfloat16)}, "logits has dtype bfloat16"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": jnp.ones(3)}, "temperature has shape"),
        ({"temperature": jnp.ones(2, jnp.int32)}, "temperature has dtype int32"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": 2.0}, "top_k has dtype float64"),
        ({"top_k": np.asarray([1, 0])}, "top_k is"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.0, "temperature": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": np.ones((2, 1))}, "top_p has shape"),
    ],
)
def test_refusals_name_the_argument(changes, message):
    arguments = {"logits": jnp.zeros((2, 3)), "key": jax.random.key(0)} | changes
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
