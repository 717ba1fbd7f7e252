"""Log-probabilities against a float64 log-softmax of the decoder's logits."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, Gemma4Config, Gemma4Decoder, Generator, Sampling
from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.checkpoint import load_assistant_into, load_hf_into
from g4attn_jax.generation import programs
from g4attn_jax.model import Gemma4Assistant
from tests.everyday import everyday

GOLDEN = Path(__file__).parent / "golden_model"
ASSISTANTS = Path(__file__).parent / "golden_assistant"
NAME = "gemma-4-e4b"
LENGTH = 88
SAMPLINGS = (Sampling(), Sampling(1.5, top_k=20, top_p=0.9, suppress_tokens=range(40)))
FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


@functools.cache
def decoder():
    config = Gemma4Config.from_hf(GOLDEN / NAME / "config.json")
    abstract = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), **FLOAT32))
    return load_hf_into(GOLDEN / NAME, abstract, progress=None)[0]


@functools.cache
def assistant():
    config = AssistantConfig.from_hf(ASSISTANTS / NAME / "config.json")
    abstract = nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0), **FLOAT32))
    return load_assistant_into(ASSISTANTS / NAME, abstract, progress=None)[0]


@functools.cache
def generator(**options):
    return Generator(decoder(), **{"capacity": LENGTH, "chunk_tokens": 16} | options)


def prompts_of(*lengths):
    tokens = np.load(GOLDEN / NAME / "golden.npz")["tokens"]
    return [tokens[row % 2, :length].tolist() for row, length in enumerate(lengths)]


@functools.cache
def log_softmax():
    """A program: float64 [B, LENGTH, V] of tokens [B, LENGTH], none of them in chunks."""
    graph, params = nnx.split(decoder())

    @jax.jit
    def logits(params, tokens):
        model = nnx.merge(graph, params)
        layouts = dict.fromkeys(
            ("sliding_attention", "full_attention"), Contiguous(tokens.shape[0], LENGTH)
        )
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        cache = model.init_cache(layouts)
        return model(tokens, model.plan(positions, cache), cache)[0]

    def of(sequences):
        tokens = np.zeros((len(sequences), LENGTH), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        exact = np.asarray(logits(params, tokens), np.float64)
        exact -= exact.max(-1, keepdims=True)
        return exact - np.log(np.exp(exact).sum(-1, keepdims=True))

    return of


def expected(sequences):
    """Log-probabilities of each token but the first of each sequence."""
    return [
        row[np.arange(len(tokens) - 1), tokens[1:]]
        for row, tokens in zip(log_softmax()(sequences), sequences, strict=True)
    ]


def assert_close(scores, exact):
    for row, exact_row in zip(scores, exact, strict=True):
        assert all(type(score) is float for score in row)
        np.testing.assert_allclose(row, exact_row, rtol=0, atol=2e-4)


@everyday("7")
# The last rows of logits are padded with three; with seven each chunk has several.
@pytest.mark.parametrize("rows", [3, 7, 128])
def test_scores_of_unequal_prompts(rows, monkeypatch):
    monkeypatch.setattr(programs, "_ROWS_OF_LOGITS", rows)
    prompts = prompts_of(60, 1, 17, LENGTH)
    scores = Generator(decoder(), capacity=LENGTH, chunk_tokens=16).score(prompts)
    assert [len(row) for row in scores] == [59, 0, 16, LENGTH - 1]
    assert_close(scores, expected(prompts))


def test_prompts_of_one_token_have_no_scores():
    assert generator().score([[5], [7]]) == [[], []]


def test_scores_never_hold_the_logits_of_a_chunk():
    """Logits of 1024 tokens are made 128 at a time, in float32: other temporaries are small."""
    config = Gemma4Config.from_hf(GOLDEN / "gemma-4-12b" / "config.json").truncated(2)
    vocab = 1 << 14
    model = nnx.eval_shape(
        lambda: Gemma4Decoder(
            Gemma4Config(**vars(config) | {"vocab_size": vocab}), rngs=nnx.Rngs(0), **FLOAT32
        )
    )
    scorer = Generator(model, capacity=1024, chunk_tokens=1024)
    cache = jax.eval_shape(functools.partial(scorer._empty_cache, batch=1), scorer._weights)
    chunk = jax.ShapeDtypeStruct((1, 1024), np.int32)
    compiled = scorer._score.lower(scorer._weights, chunk, chunk, chunk, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * vocab * 4 / 2


@everyday()
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafts", [None, 4])
def test_log_probs_of_new_tokens(sampling, drafts):
    """Log-probabilities are the model's own, whatever tokens were drawn from; with drafts too."""
    options = {} if drafts is None else {"assistant": assistant(), "draft_tokens": drafts}
    prompts, key = prompts_of(24, 3, 17), jax.random.key(1)
    made = generator(**options)(prompts, 40, sampling=sampling, key=key, log_probs=True)
    answers, scores = made
    assert [len(row) for row in scores] == [40, 40, 40]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    assert_close(scores, [row[-40:] for row in expected(whole)])
    of_whole = generator().score(whole)
    assert_close(scores, [row[-40:] for row in of_whole])
    assert generator(**options)(prompts, 40, sampling=sampling, key=key) == answers


def test_no_log_probs_after_a_stop_token():
    prompts = prompts_of(24, 3)
    plain, all_scores = generator()(prompts, 20, log_probs=True)
    stop = plain[0][5]
    answers, scores = generator()(prompts, 20, stop_tokens=[stop], log_probs=True)
    assert len(answers[0]) <= 6
    for answer, row, full in zip(answers, scores, all_scores, strict=True):
        assert row == full[: len(answer)]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        ([[1] * 89], r"prompts\[0\] has 89 tokens"),
        ([[1, 128]], r"prompts\[0\] has 128"),
    ],
)
def test_prompts_that_cannot_be_scored(prompts, message):
    with pytest.raises(ValueError, match=message):
        generator().score(prompts)
