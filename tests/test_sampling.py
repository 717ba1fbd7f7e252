"""Sampling against the distribution that transformers' warpers define, in float64 with sorting."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from g4attn_jax import Sampling, generation
from g4attn_jax.model.acceptance import Greedy, RejectionSampling
from g4attn_jax.model.sampling import scaled_logits
from tests.everyday import everyday

DRAWS = 40_000
LOGITS = np.asarray([2.0, -1.0, 0.5, 1.9, -4.0, 0.4, 1.0, -0.2, 0.3, -6.0], np.float32)


def distribution(logits, temperature, top_k=None, top_p=None):
    """Distribution of one sequence [V]: temperature, top-k, top-p, each over what the last left."""
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


def next_tokens(rule, logits, position):
    """[B], what a rule makes of logits [B, V] where there are no drafts."""
    drafts = jnp.zeros((len(logits), 0), jnp.int32)
    num_drafts = jnp.zeros(len(logits), jnp.int32)
    num_accepted, tokens = rule.accept(logits[:, None], drafts, None, num_drafts, position)
    chex.assert_trees_all_equal_shapes_and_dtypes(num_accepted, tokens, num_drafts)
    return tokens


jitted = jax.jit(next_tokens)


def rule_of(keys, temperature=1.0, top_k=None, top_p=None, suppress_tokens=()):
    """With numbers as `Generator` gives them."""
    suppressed = np.isin(np.arange(len(LOGITS)), suppress_tokens) if suppress_tokens else None
    return RejectionSampling(
        temperature=np.float32(temperature),
        top_k=None if top_k is None else np.int32(top_k),
        top_p=None if top_p is None else np.float32(top_p),
        keys=keys,
        suppressed=suppressed,
    )


def keys_of(batch, seed=0):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch))


def draw(logits, draws=DRAWS, seed=0, **parameters):
    rule = rule_of(keys_of(draws, seed), **parameters)
    return np.asarray(jitted(rule, np.tile(logits, (draws, 1)), np.full(draws, 7, np.int32)))


def assert_drawn_from(tokens, expected):
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    if possible.sum() > 1:
        test = scipy.stats.chisquare(counts[possible], len(tokens) * expected[possible])
        # Seeds are fixed: this passes always or never.
        assert test.pvalue > 1e-3, (counts, expected)


@everyday("None-4-1.0", "None-None-1.0")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 10, 99])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
def test_statistics(temperature, top_k, top_p):
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert_drawn_from(draw(LOGITS, **chosen), distribution(LOGITS, **chosen))


@pytest.mark.parametrize("same", ["position", "key"])
def test_draws_are_independent(same):
    """Draws of sequences at one position, and of the positions of one sequence."""
    keys, position = keys_of(DRAWS), np.full(DRAWS, 7, np.int32)
    if same == "key":
        keys, position = jnp.repeat(keys[::2], 2), position + np.arange(DRAWS, dtype=np.int32) % 2
    tokens = jitted(rule_of(keys), np.zeros((DRAWS, 2), np.float32), position)
    tokens = np.asarray(tokens).reshape(-1, 2)
    pairs = np.bincount(2 * tokens[:, 0] + tokens[:, 1], minlength=4)
    assert scipy.stats.chisquare(pairs).pvalue > 1e-3


def test_a_draw_depends_on_its_sequence_alone():
    batch = 32
    logits = np.random.default_rng(0).normal(size=(batch, 64)).astype(np.float32)
    position = np.arange(batch, dtype=np.int32) % 5
    rule = rule_of(keys_of(batch), temperature=0.9, top_k=50, top_p=0.9)
    together = jitted(rule, logits, position)
    assert len(np.unique(together)) > batch / 2
    for row in range(batch):
        one = slice(row, row + 1)
        alone = jitted(rule._replace(keys=rule.keys[one]), logits[one], position[one])
        assert alone == together[row]


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
    # One shape compiles once.
    logits = np.asarray(logits + [-np.inf] * (9 - len(logits)), np.float32)
    if not np.isfinite(logits).any():
        logits[0] = 0
    # One logit of the reference is dropped early where a sum is at the limit up to rounding.
    expected = distribution(logits, 1.0, top_k, min(top_p + 1e-5, 1.0))
    # Equal logits are kept together here; sorting may split them.
    possible = set(logits[expected > 0])
    tokens = draw(logits, 64, seed, top_k=top_k, top_p=top_p)
    assert {logits[token] for token in tokens} <= possible


@pytest.mark.parametrize("top_k", [None, 3, 99])
@pytest.mark.parametrize("top_p", [None, 0.6])
def test_suppressed_tokens_are_left_out_before_the_filters(top_k, top_p):
    """The two likeliest: top-k and top-p count the others alone."""
    others = LOGITS.copy()
    others[[0, 3]] = -np.inf
    tokens = draw(LOGITS, top_k=top_k, top_p=top_p, suppress_tokens=(3, 0))
    assert_drawn_from(tokens, distribution(others, 1.0, top_k, top_p))


def test_a_greedy_rule_suppresses_in_drafts_and_choices():
    """A draft that is suppressed goes, though it is the target's likeliest token."""
    rule = generation._rule(Sampling(suppress_tokens=[0, 3]), None, 1, len(LOGITS))
    position = np.zeros(1, np.int32)
    assert rule.draft(LOGITS[None], position)[0].tolist() == [6]
    logits = np.tile(LOGITS, (1, 3, 1))
    for draft, accepted in ((0, 0), (6, 2)):
        drafts = np.full((1, 2), draft, np.int32)
        of_step = logits, drafts, None, np.full(1, 2, np.int32), position
        num_accepted, token = rule.accept(*of_step)
        assert (num_accepted.tolist(), token.tolist()) == ([accepted], [6])


@everyday()
def test_a_drawn_rule_never_accepts_a_suppressed_draft():
    """Made by something that does not know of it, and surely."""
    batch = 256
    rule = rule_of(keys_of(batch), suppress_tokens=(0,))
    position = np.zeros(batch, np.int32)
    assert 0 not in np.asarray(rule.draft(np.tile(LOGITS, (batch, 1)), position)[0])
    drafts, certain = np.zeros((batch, 1), np.int32), np.eye(len(LOGITS), dtype=np.float32)[0]
    draft_probs = np.tile(certain, (batch, 1, 1))
    logits = np.tile(LOGITS, (batch, 2, 1))
    of_step = logits, drafts, draft_probs, np.ones(batch, np.int32), position
    num_accepted, tokens = rule.accept(*of_step)
    assert not num_accepted.any()
    assert 0 not in np.asarray(tokens)


def test_an_assistant_that_knows_suppressed_tokens_alone_drafts_nothing():
    """With ordered embeddings other tokens have no logits: what is left is the target's choice."""
    batch, few = 256, np.full(len(LOGITS), -np.inf, np.float32)
    few[[0, 3]] = 1
    rule = rule_of(keys_of(batch), suppress_tokens=(0, 3))
    position = np.zeros(batch, np.int32)
    token, q = rule.draft(np.tile(few, (batch, 1)), position)
    assert not np.asarray(q).any()
    of_step = token[:, None], q[:, None], np.ones(batch, np.int32), position
    num_accepted, tokens = rule.accept(np.tile(LOGITS, (batch, 2, 1)), *of_step)
    assert not num_accepted.any()
    others = LOGITS.copy()
    others[[0, 3]] = -np.inf
    assert_drawn_from(tokens, distribution(others, 1.0, None, None))


def test_suppressed_tokens_are_held_as_a_tuple_of_integers():
    held = Sampling(suppress_tokens=np.array([5, 2])).suppress_tokens
    assert held == (5, 2)
    assert {type(token) for token in held} == {int}
    assert hash(Sampling(suppress_tokens=[5, 2])) == hash(Sampling(suppress_tokens=(5, 2)))


def test_equal_logits_are_kept_together():
    """As zeros of both signs are."""
    for logits in ([1, 3, 3, 3, 0], [-2, 0.0, -0.0, 0.0, -3]):
        logits = np.asarray(logits, np.float32)
        assert set(draw(logits, top_k=2)) == {1, 2, 3}
        assert set(draw(logits, top_p=0.1)) == {1, 2, 3}


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.int64(0)])
def test_temperature_0_is_greedy(zero):
    """The first of equal logits, whatever the filters are."""
    logits = jnp.asarray([[0.0, 5.0, 5.0], [1e30, -1e30, 0.0], [-jnp.inf, -jnp.inf, -9.0]])
    rule = generation._rule(Sampling(zero, top_k=2, top_p=0.5), None, *logits.shape)
    assert isinstance(rule, Greedy)
    position = jnp.zeros(3, jnp.int32)
    np.testing.assert_array_equal(next_tokens(rule, logits, position), [1, 0, 2])
    drafts, _ = rule.draft(logits, position)
    np.testing.assert_array_equal(drafts, [1, 0, 2])


def test_a_low_temperature_approaches_greedy():
    """Where logits over temperature are more than float32 holds, too."""
    for temperature in (1e-4, 1e-37):
        assert set(draw(100 * LOGITS[::-1], temperature=temperature, top_p=0.9)) == {9}


def test_filters_that_are_off_drop_nothing():
    """Not even what is 0 to a sum of float32."""
    logits = np.asarray([0.0, -40.0, -60.0], np.float32)
    off = scaled_logits(logits, np.float32(1), np.int32(3), np.float32(1))
    np.testing.assert_array_equal(off, logits)


def test_one_candidate_is_certain():
    logits = np.full(7, -np.inf, np.float32)
    logits[4] = -50.0
    assert set(draw(logits, temperature=3.0, top_k=5, top_p=0.9)) == {4}


@everyday()
def test_a_large_vocabulary():
    """Gemma's: top-k keeps exactly k of 262144, and top-p what a sum in float64 keeps."""
    logits = np.random.default_rng(0).normal(size=262144).astype(np.float32)
    tokens = draw(logits, 128, top_k=64, top_p=0.95)
    kept = np.flatnonzero(distribution(logits, 1.0, 64, 0.95))
    assert 50 < len(kept) < 64
    assert set(tokens) <= set(kept)
    assert len(set(tokens)) > len(kept) / 2


def test_arrays_out_of_range_keep_the_best_token():
    """A top_p may be accepted and yet be 0 in float32."""
    assert set(draw(LOGITS[::-1], top_k=0)) == {9}
    assert set(draw(LOGITS[::-1], top_p=Sampling(top_p=1e-50).top_p)) == {9}


def test_other_values_compile_nothing():
    step = jax.jit(chex.assert_max_traces(next_tokens, 1))
    for i in range(1, 4):
        rule = rule_of(keys_of(2, seed=i), temperature=i / 2, top_k=i, top_p=i / 3)
        step(rule, np.tile(LOGITS, (2, 1)), np.full(2, i, np.int32))


@pytest.mark.parametrize(
    ("accepted", "numbers"),
    [
        ({"temperature": np.finfo(np.float32).max}, (np.finfo(np.float32).max, None, None)),
        ({"temperature": np.float16(0.5)}, (0.5, None, None)),
        ({"temperature": np.int64(2), "top_k": np.uint8(1), "top_p": np.float32(0.5)}, (2, 1, 0.5)),
        ({"top_k": 10**20}, (1, 10, None)),
        ({"top_p": 1}, (1, None, 1)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_numbers_that_are_accepted(accepted, numbers):
    """And what is drawn with of a vocabulary of 10."""
    key = jax.random.key(0, impl="threefry2x32")
    rule = generation._rule(Sampling(**{"temperature": 1} | accepted), key, 1, 10)
    assert rule[:3] == numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": np.float16("inf")}, r"temperature is np.float16\(inf\)"),
        ({"temperature": 1e39}, r"temperature is 1e\+39"),
        ({"temperature": 10**400}, "temperature is 10"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": False}, "temperature is False"),
        ({"temperature": np.zeros(3)}, "temperature is array"),
        ({"temperature": jnp.float32(1)}, "temperature is Array"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": np.True_}, "top_k is np.True_"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": float("nan")}, "top_k is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": np.nan}, "top_p is nan"),
        ({"top_p": np.ones(2)}, "top_p is array"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5"),
        ({"suppress_tokens": None}, "suppress_tokens is None"),
        ({"suppress_tokens": [1, -1]}, r"suppress_tokens is \[1, -1\]"),
        ({"suppress_tokens": [True]}, r"suppress_tokens is \[True\]"),
        ({"suppress_tokens": "ab"}, "suppress_tokens is 'ab'"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_refusals_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**changes)
