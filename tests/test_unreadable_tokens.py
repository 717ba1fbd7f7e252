"""Tokens of the vocabulary that have no per-layer embedding: refused by name, never NaN."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, Gemma4Config, Gemma4Decoder, Generator, Sampling
from tests.everyday import everyday

CONFIG = Path(__file__).parent / "golden_model" / "gemma-4-e2b" / "config.json"
VOCAB, READABLE = 131, 100
UNREADABLE = Sampling(suppress_tokens=range(READABLE, VOCAB))


@functools.cache
def decoder():
    """A full and a sliding layer with per-layer inputs, fewer of them than there are tokens."""
    config = dataclasses.replace(
        Gemma4Config.from_hf(CONFIG).truncated(2),
        vocab_size=VOCAB,
        vocab_size_per_layer_input=READABLE,
    )
    return Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)


@functools.cache
def generator():
    return Generator(decoder(), capacity=64)


def step(tokens, positions, model=None):
    model = decoder() if model is None else model
    layouts = dict.fromkeys(model.config.layer_types, Contiguous(1, 64))
    cache = model.init_cache(layouts)
    return model(tokens, model.plan(positions, cache), cache)[0]


@pytest.mark.parametrize("call", [lambda p: generator()(p, 4, sampling=UNREADABLE), "score"])
def test_a_prompt_with_one_is_refused(call):
    call = generator().score if call == "score" else call
    message = r"prompts\[1\] has 120"
    with pytest.raises(ValueError, match=message):
        call([[5, 7], [5, 120, 7]])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(suppress_tokens=range(101, VOCAB))])
def test_a_sampling_that_could_choose_one_is_refused(sampling):
    message = (
        r"sampling could choose 100, which has no per-layer embedding \(vocab_size is 131, "
        r"vocab_size_per_layer_input 100\); accepted: suppress_tokens with all of 100 to 130"
    )
    with pytest.raises(ValueError, match=message):
        generator()([[5, 7]], 4, sampling=sampling)


@everyday()
@pytest.mark.parametrize("temperature", [0.0, 100.0])
def test_none_is_made_where_they_are_suppressed(temperature):
    """At a high temperature tokens are all but equally likely."""
    sampling = dataclasses.replace(UNREADABLE, temperature=temperature)
    key = jax.random.key(0)
    answers, scores = generator()([[5, 7, 99]] * 4, 48, sampling=sampling, key=key, log_probs=True)
    assert max(map(max, answers)) < READABLE
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("token", [READABLE, VOCAB - 1, VOCAB, -1])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_step_that_reads_one_is_refused_where_it_is_known(token, array):
    tokens, positions = array([[5, token, 7]]), array([[0, 1, 2]])
    message = f"tokens has {token}"
    with pytest.raises(ValueError, match=message):
        step(tokens, positions)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda positions: step(tokens, positions))(positions)


def test_padding_may_be_any_token():
    logits = [step(np.array([[5, 7, token]]), np.array([[0, 1, -1]])) for token in (120, 3)]
    np.testing.assert_array_equal(logits[0][:, :2], logits[1][:, :2])
    assert np.isfinite(logits[0][:, :2]).all()


def test_traced_tokens_are_loud():
    logits = jax.jit(step)(jnp.array([[5, 120, 7]]), jnp.array([[0, 1, 2]]))
    assert np.isnan(logits[0, 1:]).all()


@everyday()
def test_a_model_without_per_layer_inputs_reads_its_whole_vocabulary():
    """Its config may say anything of a table that it has not got."""
    config = dataclasses.replace(
        decoder().config, hidden_size_per_layer_input=0, vocab_size_per_layer_input=READABLE
    )
    model = Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    assert np.isfinite(step(np.array([[5, 130]]), np.array([[0, 1]]), model)).all()
    with pytest.raises(ValueError, match=r"tokens has 131"):
        step(np.array([[5, 131]]), np.array([[0, 1]]), model)
    assert len(Generator(model, capacity=8)([[5, 130]], 2)[0]) == 2
