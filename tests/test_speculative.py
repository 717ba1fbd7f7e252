"""Speculative decoding against plain decoding; drawn tokens against the target's distribution."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from g4attn_jax import (
    Contiguous,
    Gemma4Config,
    Gemma4Decoder,
    Generator,
    KVCache,
    ModelCache,
    Paged,
    Ring,
    Sampling,
    generation,
    split_weights,
)
from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.cache import FLOAT8, CompactKVCache
from g4attn_jax.checkpoint import load_assistant_into, load_hf_into
from g4attn_jax.model import Gemma4Assistant
from g4attn_jax.model.acceptance import Greedy, RejectionSampling
from g4attn_jax.speculative import Drafts, LastTokens, draft, verify
from tests.everyday import everyday
from tests.test_model import page_tables_of

TARGETS = Path(__file__).parent / "golden_model"
ASSISTANTS = Path(__file__).parent / "golden_assistant"
MODELS = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
LENGTHS, NEW, K = (1, 24, 17), 256, 4
CAPACITY = max(LENGTHS) + NEW
WRONG, RIGHT, OWN = range(3)


@functools.cache
def target_of(name):
    config = Gemma4Config.from_hf(TARGETS / name / "config.json")
    abstract = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), **FLOAT32))
    return load_hf_into(TARGETS / name, abstract, progress=None)[0]


@functools.cache
def assistant_of(name):
    """The fixture's, or for a target without one a random one of the other's text config."""
    folder = ASSISTANTS / name
    if folder.exists():
        config = AssistantConfig.from_hf(folder / "config.json")
        abstract = nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0), **FLOAT32))
        return load_assistant_into(folder, abstract, progress=None)[0]
    config = json.loads((ASSISTANTS / "gemma-4-e4b" / "config.json").read_text())
    target = json.loads((TARGETS / name / "config.json").read_text())
    config["backbone_hidden_size"] = target["hidden_size"]
    for key in (
        "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads",
        "attention_k_eq_v",
    ):  # fmt: skip
        config["text_config"][key] = target[key]
    return Gemma4Assistant(AssistantConfig.from_hf(config), rngs=nnx.Rngs(1), **FLOAT32)


# A prompt by itself, after which the model does not say the same token over and over.
TALKATIVE = dict(zip(MODELS, (23, 115, 99, 80, 59), strict=True))


def prompts_of(name):
    tokens = np.load(TARGETS / name / "golden.npz")["tokens"]
    long = [tokens[row % 2, :length].tolist() for row, length in enumerate(LENGTHS)][1:]
    return [[TALKATIVE[name]], *long]


@functools.cache
def plain_of(name):
    answers = Generator(target_of(name), capacity=CAPACITY, chunk_tokens=16)(prompts_of(name), NEW)
    # Else a wrong cache could go unnoticed.
    assert all(np.count_nonzero(np.diff(answer)) > 5 for answer in answers)
    return answers


@functools.cache
def generator_of(name, draft_tokens=K, **changes):
    options = {"capacity": CAPACITY, "chunk_tokens": 16} | changes
    return Generator(
        target_of(name), assistant=assistant_of(name), draft_tokens=draft_tokens, **options
    )


class Guided(NamedTuple):
    """Greedy, with drafts that are wrong, right or the assistant's own, as is said by position."""

    follows: jax.Array  # [B, CAPACITY], what the target says after each position
    kinds: jax.Array  # [B, CAPACITY]

    def draft(self, logits, position):
        at = position[:, None]
        right, kind = (
            jnp.take_along_axis(x, at, axis=1, mode="clip")[:, 0]
            for x in (self.follows, self.kinds)
        )
        own, _ = Greedy().draft(logits, position)
        wrong = (right + 1) % logits.shape[-1]
        return jnp.select([kind == WRONG, kind == RIGHT], [wrong, right], own), None

    def accept(self, *of_step):
        return Greedy().accept(*of_step)


def guided(prompts, answers, kinds):
    follows = np.zeros((len(prompts), CAPACITY), np.int32)
    for row, prompt, answer in zip(follows, prompts, answers, strict=True):
        row[len(prompt) - 1 :][: len(answer)] = answer
    return Guided(follows, np.broadcast_to(kinds, follows.shape).astype(np.int32))


def use(rule, monkeypatch):
    """Lets generators choose tokens by a rule of the test's."""
    monkeypatch.setattr(generation, "_rule", lambda *_: rule)


def runs_of(kinds, begin, new_tokens, k=K):
    """(drafts read, drafts accepted) of each step of a sequence that is told WRONG and RIGHT."""
    runs, position, end = [], begin, begin + new_tokens
    while position < end:
        drafted = min(k, end - position - 1) if runs else 0
        accepted = next((i for i in range(drafted) if kinds[position + i] == WRONG), drafted)
        runs.append((drafted, accepted))
        position += accepted + 1
    return runs


def assert_all_is_told(generator, name, monkeypatch):
    """Asserts tokens of plain decoding, whatever the drafts are, and that each run is counted."""
    prompts, answers = prompts_of(name), plain_of(name)
    rng = np.random.default_rng(0)
    seen = []
    told = rng.choice([WRONG, RIGHT], p=[0.3, 0.7], size=(len(prompts), CAPACITY))
    for kinds in (told, OWN):
        use(guided(prompts, answers, kinds), monkeypatch)
        assert generator(prompts, NEW, on_drafts=seen.append) == answers
    runs = [
        runs_of(kinds, len(prompt) - 1, NEW) for kinds, prompt in zip(told, prompts, strict=True)
    ]
    lengths = {(drafted, accepted) for drafted, accepted in itertools.chain(*runs)}
    assert {(K, accepted) for accepted in range(K + 1)} < lengths  # each draft the first refused
    of_told, of_own = seen
    np.testing.assert_array_equal(of_told.steps, [len(run) for run in runs])
    np.testing.assert_array_equal(of_told.drafted, [sum(d for d, _ in run) for run in runs])
    np.testing.assert_array_equal(of_told.accepted, [sum(a for _, a in run) for run in runs])
    for statistics in seen:
        np.testing.assert_array_equal(statistics.tokens, NEW)
        np.testing.assert_array_equal(statistics.steps + statistics.accepted, NEW)
    assert of_told.tokens_per_step > 2 > of_own.tokens_per_step >= 1


@everyday("12b")
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_of_plain_decoding(name, monkeypatch):
    """Sliding layers in rings, and in 12B, 26B-A4B and 31B full ones in compact caches."""
    assert_all_is_told(generator_of(name), name, monkeypatch)


def contiguous(batch):
    return Contiguous(batch, CAPACITY)


def ring(batch):
    return Ring(batch, 8, 16)  # the fixtures' window, and a chunk


def paged(batch):
    """Pages from the end of the pool, every other one another's; none past the capacity."""
    columns = -(-CAPACITY // 16)
    table = 2 * (batch * columns - 1 - np.arange(batch * columns)).reshape(batch, columns)
    return Paged(2 * batch * columns, 16, jnp.asarray(table, jnp.int32))


def give_page_tables(model, layouts, monkeypatch):
    """Lets steps be planned with page tables, which a generator has none of."""
    plan = model.plan

    def planned(self, positions, cache, page_tables=None):
        assert page_tables is None
        return plan(self, positions, cache, page_tables_of(layouts(None, positions.shape[0])))

    monkeypatch.setattr(model, "plan", planned)


@everyday()
@pytest.mark.parametrize(
    ("name", "sliding", "full", "form"),
    # With the generator's own choice, ring, contiguous and compact, all that each type can have.
    [
        ("gemma-4-31b", contiguous, paged, CompactKVCache),
        ("gemma-4-31b", paged, contiguous, KVCache),
        ("gemma-4-31b", ring, paged, KVCache),
        # Pages that KV-shared layers read, and with experts.
        ("gemma-4-e2b", paged, paged, KVCache),
        ("gemma-4-26b-a4b", paged, paged, CompactKVCache),
    ],
)
def test_layouts_and_forms(name, sliding, full, form, monkeypatch):
    def layouts(programs, batch):
        return {"sliding_attention": sliding(batch), "full_attention": full(batch)}

    monkeypatch.setattr(generation.programs.Programs, "_layouts", layouts)
    for model in (Gemma4Decoder, Gemma4Assistant):
        give_page_tables(model, layouts, monkeypatch)
    options = {"capacity": CAPACITY, "chunk_tokens": 16, "forms": {"full_attention": form}}
    generator = Generator(target_of(name), assistant=assistant_of(name), draft_tokens=K, **options)
    assert_all_is_told(generator, name, monkeypatch)


@everyday()
def test_a_ring_of_a_window_and_a_group(monkeypatch):
    """No slot more than is asked for, 59 + 5 in a tile of 64, with chunks smaller than a group.

    In float8, so that drafts also read scaled caches.
    """
    name, window = "gemma-4-31b", 59
    configs = (target_of(name).config, assistant_of(name).config)
    target_config, text = (
        dataclasses.replace(config, sliding_window=window)
        for config in (configs[0].truncated(3), configs[1].text)
    )
    target = Gemma4Decoder(target_config, rngs=nnx.Rngs(0), **FLOAT32)
    assistant = Gemma4Assistant(
        dataclasses.replace(configs[1], text=text), rngs=nnx.Rngs(1), **FLOAT32
    )
    prompts = prompts_of(name)
    # A ring of chunks of 200 tokens has 320 slots, as many as the sequence has tokens: contiguous.
    roomy = {"capacity": CAPACITY, "chunk_tokens": 200, "cache_dtype": FLOAT8}
    plain = Generator(target, **roomy)(prompts, NEW)
    kinds = np.random.default_rng(1).choice([WRONG, RIGHT, OWN], size=(len(prompts), CAPACITY))
    use(guided(prompts, plain, kinds), monkeypatch)
    seen = []
    for options in (roomy, roomy | {"chunk_tokens": 2}):
        generator = Generator(target, assistant=assistant, draft_tokens=K, **options)
        cache = generator._empty_cache(generator._weights, batch=1)
        assert cache.layers[0].k.shape[1] == (CAPACITY if options is roomy else window + K + 1)
        assert generator(prompts, NEW, on_drafts=seen.append) == plain
    # The assistant's own drafts are the same too: it sees the same keys.
    for of_roomy, of_tight in zip(*seen, strict=True):
        np.testing.assert_array_equal(of_roomy, of_tight)


class Logits(NamedTuple):
    """Greedy, with logits for draft_probs."""

    def draft(self, logits, position):
        return Greedy().draft(logits, position)[0], logits

    def accept(self, *of_step):
        return Greedy().accept(*of_step)


@everyday()
def test_a_group_drafts_as_if_nothing_had_been_refused():
    """From the hidden state of the last token but one, over the keys of all before the last."""
    name = "gemma-4-31b"
    target, assistant = target_of(name), assistant_of(name)
    # From 24 on the fixture's tokens are what the target says.
    tokens = np.load(TARGETS / name / "golden.npz")["tokens"].repeat(3, axis=0)
    batch, length = tokens.shape
    layouts = {
        "sliding_attention": Ring(batch, target.config.sliding_window, length),
        "full_attention": Contiguous(batch, length + K),
    }
    merge, weights = split_weights((target, assistant))
    forms = {"full_attention": CompactKVCache}

    @jax.jit
    def fill(weights, positions):
        target, _ = merge(weights)
        cache = target.init_cache(layouts, forms)
        return target.hidden(tokens, target.plan(positions, cache), cache)

    @jax.jit
    def drafted(weights, last, cache):
        return draft(*merge(weights), last, cache, Logits(), draft_tokens=K)

    @jax.jit
    def verified(weights, last, drafts, cache):
        target, _ = merge(weights)
        return verify(target, last, drafts, cache, Logits())

    rows, index = np.arange(batch), np.arange(length)
    begin = np.array([30, 41, 40, 30, 63, 64], np.int32)
    accepted = np.array([0, 1, 2, 3, 4, 2], np.int32)
    num_drafts = np.array([4, 4, 4, 4, 4, 2], np.int32)  # the last has no others to refuse
    drafts = tokens[rows[:, None], begin[:, None] + 1 + np.arange(K)]
    refused = np.arange(K) >= accepted[:, None]
    drafts = np.where(refused, (drafts + 1) % 128, drafts).astype(np.int32)
    _, before = fill(weights, np.where(index < begin[:, None], index, -1))
    drafts = Drafts(drafts, None, num_drafts)
    group = verified(weights, LastTokens(tokens[rows, begin], begin), drafts, before)
    np.testing.assert_array_equal(group.num_accepted, accepted)

    position = begin + accepted + 1
    whole, cache = fill(weights, np.where(index < position[:, None], index, -1))
    hidden = np.asarray(whole)[rows, position - 1]
    np.testing.assert_allclose(group.hidden, hidden, rtol=0, atol=2e-4)
    token = tokens[rows, position]
    np.testing.assert_array_equal(np.asarray(group.tokens)[rows, accepted], token)
    last = LastTokens(token, position, hidden)
    of_group = drafted(weights, last._replace(hidden=group.hidden), group.cache)
    expected = drafted(weights, last, cache)
    np.testing.assert_allclose(of_group.probs, expected.probs, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(of_group.tokens, expected.tokens)
    # The state of another token would be noticed.
    wrong = np.asarray(whole)[rows, position - 2]
    other = drafted(weights, last._replace(hidden=wrong), cache)
    assert np.abs(other.probs - expected.probs).max(axis=(1, 2)).min() > 0.01


@everyday("gemma-4-e4b")
@pytest.mark.parametrize("name", ["gemma-4-e4b", "gemma-4-31b"])
def test_drafts_of_hugging_face(name):
    golden = np.load(ASSISTANTS / name / "golden.npz")["tokens"]
    target, tokens = target_of(name), np.load(TARGETS / name / "golden.npz")["tokens"]
    lengths = np.array([5, 80], np.int32)  # of golden_assistant/make_golden.py
    layouts = dict.fromkeys(("sliding_attention", "full_attention"), Contiguous(2, 88))
    merge, weights = split_weights((target, assistant_of(name)))

    @jax.jit
    def drafts(weights, positions):
        target, assistant = merge(weights)
        cache = target.init_cache(layouts)
        hidden, cache = target.hidden(tokens, target.plan(positions, cache), cache)
        rows = np.arange(2)
        last = LastTokens(tokens[rows, lengths], lengths, hidden[rows, lengths - 1])
        return draft(target, assistant, last, cache, Greedy(), draft_tokens=golden.shape[1]).tokens

    index = np.arange(tokens.shape[1])
    positions = np.where(index < lengths[:, None], index, -1)
    np.testing.assert_array_equal(drafts(weights, positions), golden)


@everyday()
@pytest.mark.parametrize("draft_tokens", [1, 8])
def test_fewest_and_most_drafts(draft_tokens):
    name, seen = "gemma-4-e4b", []
    generator = generator_of(name, draft_tokens)
    assert generator.draft_tokens == draft_tokens
    assert generator(prompts_of(name), NEW, on_drafts=seen.append) == plain_of(name)
    steps = seen[0].steps
    # All steps but the first read as many drafts as there are, but for the last ones.
    assert (seen[0].drafted <= (steps - 1) * draft_tokens).all()
    assert (seen[0].drafted >= (steps - 1 - draft_tokens) * draft_tokens).all()


@everyday()
def test_a_stop_token_in_a_run_of_drafts_ends_the_sequence(monkeypatch):
    """Steps of 1, 5, 5 ... tokens: as the first, a middle one and the last of a run."""
    name = "gemma-4-e4b"
    prompts, answers = prompts_of(name), plain_of(name)
    use(guided(prompts, answers, RIGHT), monkeypatch)
    ends = set()
    for stop in range(128):
        expected = [
            answer[: answer.index(stop) + 1] if stop in answer else answer for answer in answers
        ]
        found = {(len(answer) - 2) % (K + 1) for answer in expected if len(answer) < NEW}
        if found <= ends:
            continue
        ends |= found
        seen = []
        answer = generator_of(name)(prompts, NEW, stop_tokens=[stop], on_drafts=seen.append)
        assert answer == expected
        np.testing.assert_array_equal(seen[0].tokens, [len(tokens) for tokens in expected])
        for tokens, steps, accepted in zip(expected, seen[0].steps, seen[0].accepted, strict=True):
            assert steps == 1 + -(-(len(tokens) - 1) // (K + 1))
            # All but one of each whole step are drafts.
            is_whole = (len(tokens) - 1) % (K + 1) == 0
            assert accepted == len(tokens) - steps + (not is_whole and len(tokens) < NEW)
    assert ends == set(range(K + 1))


@everyday()
@pytest.mark.parametrize("kinds", [WRONG, RIGHT])
def test_max_new_tokens_is_exact_and_may_fill_the_capacity(kinds, monkeypatch):
    """The last tokens have no room for drafts after them, and those go nowhere."""
    name = "gemma-4-e4b"
    prompts, answers = prompts_of(name), plain_of(name)
    use(guided(prompts, answers, kinds), monkeypatch)
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    assert max(map(len, whole)) == CAPACITY
    for new in (1, 2, 3, 5, 6, 7, 9):
        assert generator_of(name)(prompts, new) == [answer[:new] for answer in answers]
        last = generator_of(name)([tokens[:-new] for tokens in whole], new)
        assert last == [answer[-new:] for answer in answers]


VOCAB, DRAWN_SEQUENCES = 4, 60_000


def chain(seed):
    """Logits of what follows each token."""
    return np.random.default_rng(seed).normal(scale=1.5, size=(VOCAB, VOCAB)).astype(np.float32)


def distribution(logits, sampling):
    """[V, V], of what follows each token, in float64."""
    rows = []
    for row in logits.astype(np.float64) / sampling.temperature:
        row[list(sampling.suppress_tokens)] = -np.inf
        order = np.argsort(-row)
        if sampling.top_k is not None:
            row[order[sampling.top_k :]] = -np.inf
        weights = np.exp(row - row.max())
        weights /= weights.sum()
        if sampling.top_p is not None:
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= sampling.top_p]] = 0
        rows.append(weights / weights.sum())
    return np.stack(rows)


NO_CACHE = ModelCache((), {})  # chains remember nothing


@functools.cache
def drawn_from_chains(sampling, same_chain=False):
    """(tokens [DRAWN_SEQUENCES, 3] after token 0, share of accepted drafts), K drafts a group.

    The target is a Markov chain, and so is the assistant: `draft` and `verify` as they are, with
    models whose logits are looked up.
    """
    target, assistant = chain(0), chain(0 if same_chain else 1)
    decoder = SimpleNamespace(
        embed_tokens=lambda tokens: tokens[..., None].astype(jnp.float32),
        dtype=jnp.dtype(jnp.float32),
        plan=lambda positions, cache, page_tables: None,
        readable=lambda cache: None,
        hidden=lambda tokens, step, cache: (tokens[..., None], cache),
        logits=lambda hidden: jnp.asarray(target)[hidden[..., 0]],
    )

    class Reader:
        dtype = jnp.dtype(jnp.float32)

        def plan(self, positions, cache, page_tables):
            return None

        def __call__(self, embeddings, hidden, step, readable):
            return jnp.asarray(assistant)[embeddings[..., 0].astype(int)], hidden

    keys = jax.random.split(jax.random.key(5), DRAWN_SEQUENCES)
    rule = generation._rule(sampling, keys, DRAWN_SEQUENCES, VOCAB)

    @jax.jit
    def group(token, position, num_drafts, rule):
        last = LastTokens(token, position, jnp.zeros((DRAWN_SEQUENCES, 1)))
        drafts = draft(decoder, Reader(), last, NO_CACHE, rule, draft_tokens=K)
        verified = verify(decoder, last, drafts.at_most(num_drafts), NO_CACHE, rule)
        return verified._replace(hidden=None, cache=None), drafts.tokens

    made = np.full((DRAWN_SEQUENCES, 3 + K), -1)
    token, position = np.zeros((2, DRAWN_SEQUENCES), np.int32)
    rows, accepted, drafted = np.arange(DRAWN_SEQUENCES), 0, 0
    while (position < 3).any():
        # Fewer drafts than there are, none too, are read in some sequences.
        num_drafts = (np.where(position >= 3, 0, rows % (K + 1))).astype(np.int32)
        verified, drafts = jax.device_get(group(token, position, num_drafts, rule))
        count = verified.num_accepted + 1
        assert (verified.num_accepted <= num_drafts).all()
        index = np.arange(K + 1)
        np.testing.assert_array_equal(verified.tokens >= 0, index < count[:, None])
        is_draft = index[:K] < verified.num_accepted[:, None]
        np.testing.assert_array_equal(verified.tokens[:, :K][is_draft], drafts[is_draft])
        live = position < 3
        for i in range(K + 1):
            places = live & (i < count)
            made[rows[places], position[places] + i] = verified.tokens[places, i]
        accepted += verified.num_accepted[live].sum()
        drafted += np.minimum(num_drafts, count)[live].sum()
        token = np.where(live, verified.tokens[rows, count - 1], token).astype(np.int32)
        position = np.where(live, position + count, position).astype(np.int32)
    return made[:, :3], accepted / drafted


@everyday("sampling1", "sampling4")
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(1.5, top_k=3),
        Sampling(1.0, top_k=3, top_p=0.8),
        Sampling(1.0, suppress_tokens=[1]),
        Sampling(1.2, top_k=2, suppress_tokens=[3]),
    ],
)
def test_drawn_tokens_are_the_targets(sampling):
    """Three tokens together, so that what one is drawn with says nothing of the next."""
    p = distribution(chain(0), sampling)
    expected = (p[0][:, None, None] * p[:, :, None] * p[None]).ravel()
    tokens, rate = drawn_from_chains(sampling)
    counts = np.bincount(tokens @ [VOCAB**2, VOCAB, 1], minlength=VOCAB**3)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    test = scipy.stats.chisquare(counts[possible], DRAWN_SEQUENCES * expected[possible])
    # Seeds are fixed: this passes always or never.
    assert test.pvalue > 1e-3, (counts, expected)
    assert 0.2 < rate < 0.9


def test_a_distribution_of_the_assistants_own_would_be_noticed():
    sampling = Sampling(1.0)
    q = distribution(chain(1), sampling)
    tokens, _ = drawn_from_chains(sampling)
    counts = np.bincount(tokens[:, 0], minlength=VOCAB)
    assert scipy.stats.chisquare(counts, DRAWN_SEQUENCES * q[0]).pvalue < 1e-9


def test_all_drafts_of_the_same_distribution_stay():
    tokens, rate = drawn_from_chains(Sampling(0.8, top_k=3), same_chain=True)
    assert rate > 0.9999
    assert len(np.unique(tokens)) > 1


def test_the_draft_that_goes_is_drawn_from_what_is_left():
    """max(p - q, 0) of p = (0.5, 0.3, 0.2) and q = (0.2, 0.7, 0.1) is (0.3, 0, 0.1)."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.7, 0.1])
    batch = 40_000
    rule = RejectionSampling(np.float32(1), None, None, jax.random.split(jax.random.key(0), batch))
    position = np.full(batch, 7, np.int32)
    drafts, draft_probs = rule.draft(jnp.tile(jnp.log(q), (batch, 1)), position)
    logits = jnp.tile(jnp.log(p).astype(jnp.float32), (batch, 2, 1))
    num_drafts = np.ones(batch, np.int32)
    of_step = drafts[:, None], draft_probs[:, None], num_drafts, position
    num_accepted, token = map(np.asarray, rule.accept(logits, *of_step))
    stays = np.minimum(p, q).sum()
    assert scipy.stats.binomtest(int(num_accepted.sum()), batch, stays).pvalue > 1e-3
    left = np.bincount(token[num_accepted == 0], minlength=3)
    assert left[1] == 0
    assert scipy.stats.chisquare(left[[0, 2]], left.sum() * np.array([0.75, 0.25])).pvalue > 1e-3
    after = np.bincount(token[num_accepted == 1], minlength=3)
    assert scipy.stats.chisquare(after, after.sum() * p).pvalue > 1e-3


@everyday()
def test_64_bit_numbers_change_nothing():
    name = "gemma-4-e4b"
    with jax.enable_x64(True):
        generator = Generator(target_of(name), capacity=CAPACITY, assistant=assistant_of(name))
        answers = generator(prompts_of(name), 8)
    assert answers == [answer[:8] for answer in plain_of(name)]


@everyday()
def test_suppressed_tokens_are_suppressed_with_an_assistant_too():
    name = "gemma-4-e4b"
    prompts, plain = prompts_of(name), plain_of(name)
    suppressed = {answer[0] for answer in plain}
    sampling = Sampling(suppress_tokens=suppressed)
    expected = Generator(target_of(name), capacity=CAPACITY, chunk_tokens=16)(
        prompts, 64, sampling=sampling
    )
    assert not suppressed & set(itertools.chain(*expected))
    assert generator_of(name)(prompts, 64, sampling=sampling) == expected


def test_more_room_than_drafts():
    """All of three drafts are read if there is room for five."""
    target = target_of("gemma-4-e4b")
    layouts = dict.fromkeys(("sliding_attention", "full_attention"), Contiguous(2, 16))
    last = LastTokens(jnp.array([3, 5]), jnp.zeros(2, jnp.int32))
    drafts = jnp.array([[1, 2, 3], [4, 5, 6]])

    @jax.jit
    def verified(count):
        cache = target.init_cache(layouts)
        return verify(target, last, Drafts(drafts, None, count), cache, All(jnp.int32(9)))

    exact, more = (verified(jnp.full(2, room)) for room in (3, 5))
    assert exact.num_accepted.tolist() == [3, 3]
    jax.tree.map(np.testing.assert_array_equal, exact, more)


class All(NamedTuple):
    """Every draft that may be read stays."""

    last: jax.Array

    def accept(self, logits, drafts, draft_probs, num_drafts, position):
        return num_drafts, jnp.broadcast_to(self.last, num_drafts.shape)


@everyday()
def test_sequences_draw_from_their_keys_alone():
    """Two prompts are the same and differ in the key, which alone gives them their tokens."""
    name, sampling = "gemma-4-e4b", Sampling(0.9, top_k=40, top_p=0.95)
    generator = generator_of(name)
    prompts = [prompts_of(name)[row] for row in (0, 1, 0)]
    key = jax.random.key(3)
    together = generator(prompts, 24, sampling=sampling, key=key)
    assert together == generator(prompts, 24, sampling=sampling, key=key)
    assert together[0] != together[2]
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(4))
    # Among others, and in other rows.
    others = [prompts[1], prompts_of(name)[2], prompts[2]]
    apart = generator(others, 24, sampling=sampling, key=keys[jnp.array([1, 3, 2])])
    assert [apart[0], apart[2]] == together[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens is 0"),
        ({"draft_tokens": 9}, "draft_tokens is 9"),
        ({"draft_tokens": True}, "draft_tokens is True"),
        ({"assistant": None}, "draft_tokens is 4"),
        ({"assistant": "31b"}, "assistant is a str"),
        ({"assistant": "gemma-4-31b"}, "assistant was made for another decoder: backbone_hidden"),
        ({"assistant": jnp.bfloat16}, "assistant has dtype bfloat16"),
    ],
)
def test_generators_that_make_no_sense(changes, message):
    name, options = "gemma-4-e4b", {"draft_tokens": K} | changes
    given = options.pop("assistant", name)
    if given in MODELS:
        given = assistant_of(given)
    elif given is jnp.bfloat16:
        config = assistant_of(name).config
        given = nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        Generator(target_of(name), capacity=8, assistant=given, **options)


def test_statistics_need_an_assistant():
    generator = Generator(target_of("gemma-4-e4b"), capacity=8)
    with pytest.raises(ValueError, match="on_drafts is given"):
        generator([[1]], 2, on_drafts=print)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": np.zeros((2, 1), int)}, r"last.token .* \(2, 1\).*\[B\]"),
        ({"position": np.zeros(3, int)}, r"last.position .* \(3,\).*\(2,\)"),
        ({"tokens": np.zeros((2, 9), int)}, r"drafts.tokens .* \(2, 9\).*\[2, 0 to 8\]"),
        ({"tokens": np.zeros((2, 4))}, "drafts.tokens .* float64; accepted: integer"),
        ({"count": 4}, "drafts.count is a int"),
    ],
)
def test_groups_that_make_no_sense(changes, message):
    last = {"token": np.zeros(2, int), "position": np.zeros(2, int)}
    drafts = {"tokens": np.zeros((2, 4), int), "probs": None, "count": np.zeros(2, int)}
    last |= {key: changes[key] for key in changes if key in last}
    drafts |= {key: changes[key] for key in changes if key in drafts}
    target = target_of("gemma-4-e4b")
    with pytest.raises(ValueError, match=message):
        verify(target, LastTokens(**last), Drafts(**drafts), cache=None, rule=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens is 0"),
        ({"token": np.zeros(2)}, r"last.token .*float64"),
        ({"position": np.zeros((2, 1), int)}, r"last.position .*\(2, 1\)"),
        ({"hidden": None}, "last.hidden is None"),
    ],
)
def test_drafts_that_make_no_sense(changes, message):
    last = {"token": np.zeros(2, int), "position": np.zeros(2, int), "hidden": np.zeros((2, 48))}
    draft_tokens = changes.pop("draft_tokens", K)
    models = target_of("gemma-4-e4b"), assistant_of("gemma-4-e4b")
    with pytest.raises(ValueError, match=message):
        draft(*models, LastTokens(**last | changes), None, Greedy(), draft_tokens=draft_tokens)
