"""Generation against Hugging Face's greedy tokens, against itself, and against probabilities."""

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, Gemma4Config, Gemma4Decoder, Generator, KVCache, Sampling
from g4attn_jax.cache import FLOAT8, CompactKVCache
from g4attn_jax.checkpoint import load_hf_into
from g4attn_jax.generation.programs import Limits
from g4attn_jax.generation.prompts import check_prompts, chunks
from g4attn_jax.model.acceptance import Greedy
from tests.everyday import everyday

GOLDEN = Path(__file__).parent / "golden_model"
MODELS = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
PROMPT, LENGTH = 24, 88  # of make_golden.py; the window is 8
DRAWN = Sampling(temperature=0.8, top_k=20, top_p=0.9)


@functools.cache
def model_of(name):
    """(decoder, tokens [2, LENGTH] of the fixture)."""
    config = Gemma4Config.from_hf(GOLDEN / name / "config.json")
    abstract = nnx.eval_shape(
        lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    )
    decoder, _ = load_hf_into(GOLDEN / name, abstract)
    return decoder, np.load(GOLDEN / name / "golden.npz")["tokens"]


@functools.cache
def small_model():
    """A sliding layer and a full one with K = V, which compile soon."""
    config = Gemma4Config.from_hf(GOLDEN / "gemma-4-12b" / "config.json").truncated(2)
    return Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)


@functools.cache
def generator_of(name="gemma-4-e2b", **changes):
    return Generator(model_of(name)[0], **{"capacity": LENGTH} | changes)


@functools.cache
def small_generator(**changes):
    return Generator(small_model(), **{"capacity": LENGTH} | changes)


def prompts_of(*lengths, name="gemma-4-e2b"):
    """The first so many tokens of the fixture's sequences, in turn."""
    tokens = model_of(name)[1]
    return [tokens[row % 2, :length].tolist() for row, length in enumerate(lengths)]


def follows(*lengths, end=LENGTH, name="gemma-4-e2b"):
    """Tokens of the fixture after `prompts_of`, from PROMPT on made greedily."""
    tokens = model_of(name)[1]
    return [tokens[row % 2, length:end].tolist() for row, length in enumerate(lengths)]


@everyday("12b")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_hugging_face(name):
    answers = generator_of(name)(prompts_of(PROMPT, PROMPT, name=name), LENGTH - PROMPT)
    assert answers == follows(PROMPT, PROMPT, name=name)


@everyday()
def test_64_bit_numbers_change_nothing():
    prompts, name = prompts_of(PROMPT, 3), "gemma-4-e2b"
    with jax.enable_x64(True):
        answers = Generator(model_of(name)[0], capacity=LENGTH)(prompts, 8)
    assert answers == generator_of(name)(prompts, 8)


@everyday()
@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-50])
def test_hardly_any_temperature_is_greedy(temperature):
    """The last two are subnormal and 0 in float32."""
    prompts, generator = prompts_of(PROMPT, 3), generator_of()
    drawn = generator(prompts, 8, sampling=Sampling(temperature), key=jax.random.key(0))
    assert drawn == generator(prompts, 8)


@everyday()
def test_unequal_prompts_in_chunks():
    generator = generator_of(chunk_tokens=17)
    answers = generator(prompts_of(PROMPT + 20, PROMPT), 20)
    assert answers == [tokens[:20] for tokens in follows(PROMPT + 20, PROMPT)]


@everyday()
# Smaller than the window, as large, larger, and such that a ring would exceed the capacity.
@pytest.mark.parametrize("chunk_tokens", [3, 8, 17, 100])
def test_chunks_fill_caches_as_a_whole_prompt_does(chunk_tokens):
    """The last layer's cache, which is full, has what all layers before it did."""
    caches = []
    for size in (chunk_tokens, 64):
        generator = generator_of("gemma-4-31b", chunk_tokens=size)
        held = generator._empty_cache(generator._weights, batch=2)
        for chunk in chunks(check_prompts(prompts_of(60, 33), 128, LENGTH), size):
            held = generator._prefill(generator._weights, *chunk, held)
        caches.append(held.layers[5])
    written = np.arange(LENGTH) < np.array([[59], [32]])
    for chunked, whole in zip(jax.tree.leaves(caches[0]), jax.tree.leaves(caches[1]), strict=True):
        np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(np.any(np.asarray(whole), axis=(2, 3)), written)


def test_forms_of_caches_do_not_matter():
    name = "gemma-4-12b"
    separate = Generator(model_of(name)[0], capacity=LENGTH, forms={"full_attention": KVCache})
    forms = [
        set(map(type, generator._empty_cache(generator._weights, batch=1).layers))
        for generator in (generator_of(name), separate)
    ]
    assert forms == [{KVCache, CompactKVCache}, {KVCache}]
    answers = separate(prompts_of(PROMPT, PROMPT, name=name), LENGTH - PROMPT)
    assert answers == follows(PROMPT, PROMPT, name=name)


@everyday()
def test_unequal_prompts_are_alone_and_draw_from_their_keys():
    """One token, one in a chunk in which others go on, and two that differ in the key alone."""
    generator = small_generator(chunk_tokens=16)
    prompts = prompts_of(1, 18, 1, 40)
    key = jax.random.key(3)
    together = generator(prompts, 12, sampling=DRAWN, key=key)
    assert together == generator(prompts, 12, sampling=DRAWN, key=key)
    assert together != generator(prompts, 12, sampling=DRAWN, key=jax.random.key(4))
    assert together[0] != together[2]
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(4))
    assert together == generator(prompts, 12, sampling=DRAWN, key=keys)
    assert together == [
        generator([prompt], 12, sampling=DRAWN, key=keys[row : row + 1])[0]
        for row, prompt in enumerate(prompts)
    ]
    # The same positions draw the same, wherever the prompt ends.
    longer = [prompt + answer[:5] for prompt, answer in zip(prompts, together, strict=True)]
    rest = generator(longer, 7, sampling=DRAWN, key=key)
    assert rest == [answer[5:] for answer in together]


def logits_of_one(decoder, token):
    """Logits of a prompt of one token."""
    graph, params = nnx.split(decoder)
    layouts = dict.fromkeys(("sliding_attention", "full_attention"), Contiguous(1, 1))

    @jax.jit
    def step(params):
        decoder, where = nnx.merge(graph, params), jnp.zeros((1, 1), jnp.int32)
        cache = decoder.init_cache(layouts)
        return decoder(where + token, decoder.plan(where, cache), cache)[0][0, 0]

    return step(params)


@everyday()
def test_drawn_tokens_follow_their_distribution():
    batch, temperature, top_k = 512, 0.5, 5
    answers = small_generator()(
        [[7]] * batch, 1, sampling=Sampling(temperature, top_k=top_k), key=jax.random.key(0)
    )
    logits = np.asarray(logits_of_one(small_model(), 7))
    best = np.argsort(-logits)[:top_k]
    probabilities = np.exp((logits[best] - logits.max()) / temperature)
    probabilities /= probabilities.sum()
    counts = [sum(answer == [token] for answer in answers) for token in best]
    assert sum(counts) == batch
    # Five standard deviations.
    limits = 5 * np.sqrt(batch * probabilities * (1 - probabilities))
    assert (np.abs(counts - batch * probabilities) < limits).all()


def test_a_stop_token_ends_its_sequence_alone():
    first, second = follows(PROMPT, PROMPT)
    # One that the first sequence makes early and the second late or never.
    stop = next(token for token in first[3:] if token not in first[:3] + second[:30])
    cut = [
        tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in (first, second)
    ]
    assert len(cut[0]) < 30 < len(cut[1])
    seen = [[], []]

    def on_tokens(new):
        for tokens, more in zip(seen, new, strict=True):
            tokens += more

    prompts = prompts_of(PROMPT, PROMPT)
    answers = generator_of()(prompts, 64, stop_tokens=[stop, 127], on_tokens=on_tokens)
    assert answers == seen == cut


@everyday()
def test_a_directory_gives_sampling_and_stop_tokens_unless_a_call_does(tmp_path):
    first, second = follows(PROMPT, PROMPT)
    prompts, name = prompts_of(PROMPT, PROMPT), "gemma-4-e2b"
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, tmp_path)
    fields = {"suppress_tokens": [second[0]], "eos_token_id": first[0], "num_beams": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    options = {"capacity": LENGTH, "dtype": jnp.float32}
    with pytest.warns(UserWarning, match="not followed: num_beams 3"):
        generator = Generator.from_hf(tmp_path, **options)
    assert generator.sampling == Sampling(suppress_tokens=[second[0]])
    assert generator.stop_tokens == (first[0],)
    expected = generator_of()(
        prompts, 6, sampling=generator.sampling, stop_tokens=generator.stop_tokens
    )
    assert generator(prompts, 6) == expected
    assert generator(prompts, 6, sampling=Sampling(), stop_tokens=()) == [first[:6], second[:6]]
    fields = {"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    generator = Generator.from_hf(tmp_path, **options, stop_tokens=[5])
    assert (generator.sampling, generator.stop_tokens) == (Sampling(0.7, 64, 0.95), (5,))
    with pytest.raises(ValueError, match="key is None"):
        generator(prompts, 6)


@everyday()
def test_a_directory_of_an_assistant():
    name = "gemma-4-e4b"
    generator = Generator.from_hf(
        GOLDEN / name,
        capacity=LENGTH,
        dtype=jnp.float32,
        assistant=GOLDEN.parent / "golden_assistant" / name,
        draft_tokens=2,
        stop_tokens=(),
    )
    assert generator.draft_tokens == 2
    prompts = prompts_of(PROMPT, PROMPT, name=name)
    assert generator(prompts, 12) == [row[:12] for row in follows(PROMPT, PROMPT, name=name)]


def test_a_directory_is_read_as_load_hf_reads_it(tmp_path):
    """With an implementation and quietly; a last layer that slides is said once."""
    folder, seen = GOLDEN / "gemma-4-e2b", []
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"][-1] = "sliding_attention"
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.warns(UserWarning, match="the last, is 'sliding_attention'") as warned:
        Generator.from_hf(
            tmp_path,
            capacity=LENGTH,
            implementation="xla",
            progress=lambda *done: seen.append(done),
        )
    assert len(warned) == 1 and seen
    with pytest.raises(ValueError, match="directory is a dict"):
        Generator.from_hf(config, capacity=LENGTH)


def test_a_kernel_that_cannot_run_the_model_is_refused_before_weights_are_read(tmp_path):
    name, message = "mosaic_gpu_interpret", "implementation 'mosaic_gpu_interpret' does not run"
    shutil.copy(GOLDEN / "gemma-4-12b" / "config.json", tmp_path)
    with pytest.raises(NotImplementedError, match=message):
        Generator.from_hf(tmp_path, capacity=LENGTH, implementation=name)
    config = Gemma4Config.from_hf(tmp_path / "config.json").truncated(2)
    with pytest.raises(NotImplementedError, match=message):
        Generator(
            nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), implementation=name)),
            capacity=LENGTH,
        )


def test_a_kernel_that_can_run_the_model_is_not_refused():
    config = Gemma4Config.from_hf(GOLDEN / "gemma-4-12b" / "config.json").truncated(2)
    name = "triton_interpret"
    decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0), implementation=name))
    assert Generator(decoder, capacity=LENGTH).capacity == LENGTH


def test_nothing_is_done_after_all_have_stopped():
    first, second = follows(PROMPT, PROMPT)
    assert first[1] not in (first[0], second[0]) and second[1] not in (first[0], second[0])
    calls = []
    answers = generator_of()(
        prompts_of(PROMPT, PROMPT),
        64,
        stop_tokens=[first[1], second[1]],
        on_tokens=calls.append,
    )
    assert answers == [first[:2], second[:2]]
    assert calls == [[[first[0]], [second[0]]], [[first[1]], [second[1]]]]


def test_tokens_are_handed_out_as_they_are_made():
    calls = []
    answers = small_generator()(prompts_of(PROMPT, 7), 8, on_tokens=calls.append)
    assert [[len(tokens) for tokens in new] for new in calls] == [[1, 1], [2, 2], [4, 4], [1, 1]]
    for row, answer in enumerate(answers):
        assert list(itertools.chain(*(new[row] for new in calls))) == answer
        assert len(answer) == 8


@pytest.fixture
def compiled():
    """Programs compiled meanwhile, by the names of JAX's events; small ones count too."""
    events = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.clear_event_listeners()


def test_programs_are_compiled_once(compiled):
    generator = Generator(small_model(), capacity=LENGTH, chunk_tokens=32)
    prompts = prompts_of(20, 30)
    compiled.clear()  # what made the model, if no test before has
    generator(prompts, 10)
    assert len(compiled) == 3  # caches, a chunk, the steps
    compiled.clear()
    generator(prompts_of(31, 18), 10)
    generator(prompts, 3)
    generator(prompts, 40, stop_tokens=[1, 2, 3])
    generator(prompts_of(1, 33), 5)
    generator([np.asarray(prompt) for prompt in prompts], np.int64(5), sampling=Sampling(0))
    assert not compiled
    generator(prompts_of(3, 60), 5)  # 32 tokens, and 27 in another chunk of 32
    assert not compiled
    generator(prompts_of(3, 40), 5)  # 32 tokens and 7
    assert len(compiled) == 1


@everyday()
def test_sampling_parameters_compile_nothing(compiled):
    generator = Generator(small_model(), capacity=LENGTH)
    keys = jax.random.key(0), jax.random.key(1)
    generator(prompts_of(20), 5, sampling=DRAWN, key=keys[0])
    compiled.clear()
    generator(prompts_of(20), 5, sampling=Sampling(1.5, 3, 0.5), key=keys[1])
    generator(prompts_of(20), 5, sampling=Sampling(1, 10**12, 1), key=keys[1])
    assert not compiled
    generator(prompts_of(20), 5)
    assert len(compiled) == 1


@everyday()
def test_suppressed_tokens_compile_nothing(compiled):
    generator = Generator(small_model(), capacity=LENGTH)
    for sampling, key in ((Sampling(), None), (DRAWN, jax.random.key(0))):
        suppressing = functools.partial(dataclasses.replace, sampling)
        generator(prompts_of(20), 5, sampling=suppressing(suppress_tokens=[3]), key=key)
        compiled.clear()
        generator(prompts_of(20), 5, sampling=suppressing(suppress_tokens=[4, 5, 6]), key=key)
        assert not compiled


@everyday()
def test_suppressed_tokens_are_not_made():
    """The best of the others follows: what a model makes whose table lacks the tokens."""
    prompts, generator = prompts_of(PROMPT, 3), small_generator()
    plain = generator(prompts, 12)
    suppressed = {answer[0] for answer in plain}
    answers = generator(prompts, 12, sampling=Sampling(suppress_tokens=suppressed))
    assert not suppressed & set(itertools.chain(*answers))
    expected = greedily(small_model(), prompts[1], 4, suppressed)
    assert answers[1][:4] == expected


def greedily(decoder, prompt, new_tokens, suppressed):
    """One token after the other, from the logits of the whole sequence."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        logits = np.array(logits_of(decoder, tokens)[-1])
        logits[list(suppressed)] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def logits_of(decoder, tokens):
    """[n, V], of a sequence in one step."""
    layouts = dict.fromkeys(("sliding_attention", "full_attention"), Contiguous(1, len(tokens)))
    positions = np.arange(len(tokens))[None]
    cache = decoder.init_cache(layouts)
    return decoder(np.array([tokens]), decoder.plan(positions, cache), cache)[0][0]


@everyday()
def test_weights_that_are_placed_compile_nothing_more(compiled):
    """As of a sharded model: then everything that comes out of a program is placed too."""
    graph, params = nnx.split(small_model())
    params = jax.device_put(params, jax.devices()[0])
    generator = Generator(nnx.merge(graph, params), capacity=LENGTH, chunk_tokens=16)
    generator(prompts_of(20), 5)
    assert len(compiled) == 3
    generator(prompts_of(1), 50)
    generator(prompts_of(40), 2)
    assert len(compiled) == 3


def test_caches_are_updated_in_place():
    """The programs return the memory of the caches that they are given, and no step copies them."""
    generator = small_generator(chunk_tokens=16)
    batch = 2
    cache = generator._empty_cache(generator._weights, batch=batch)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    row = np.zeros(batch, np.int32)
    chunk = np.zeros((batch, 16), np.int32)
    stops = np.zeros(128, bool)
    sequences = generator._sequences([row, row], row)
    constants = Limits(row, row, stops), np.int32(1), Greedy()
    for lowered in (
        generator._prefill.lower(generator._weights, chunk, chunk, cache),
        generator._decode.lower(generator._weights, sequences, cache, *constants),
    ):
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= size


def test_weights_go_with_the_generator():
    graph, params = nnx.split(small_model())
    params = jax.tree.map(jnp.copy, params)
    leaf = jax.tree.leaves(params)[0]
    generator = Generator(nnx.merge(graph, params), capacity=LENGTH)
    generator(prompts_of(3), 2)
    before = len(jax.live_arrays())
    expected = before - len(jax.tree.leaves(params)) + 1
    del generator, params
    assert len(jax.live_arrays()) == expected
    assert not leaf.is_deleted()


def test_weights_are_those_that_the_models_had():
    decoder = nnx.clone(small_model())
    weights = jax.tree.leaves(nnx.state(decoder))
    generator = Generator(decoder, capacity=8)
    decoder.norm[...] = jnp.zeros_like(decoder.norm[...])
    held = generator._weights
    assert all(ours is theirs for ours, theirs in zip(held, weights, strict=True))


def test_float8_caches():
    generator = small_generator(cache_dtype=FLOAT8)
    cache = generator._empty_cache(generator._weights, batch=1)
    assert {of_layer.v.dtype for of_layer in cache.layers} == {FLOAT8}
    [answer] = generator(prompts_of(PROMPT), 16)
    assert len(answer) == 16


@everyday()
def test_a_prompt_may_fill_the_capacity():
    generator = generator_of(capacity=PROMPT + 4)
    assert generator(prompts_of(PROMPT), 4) == [follows(PROMPT)[0][:4]]
    with pytest.raises(ValueError, match=r"prompts\[0\] has 24 tokens"):
        generator(prompts_of(PROMPT), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": None}, "prompts is None"),
        ({"prompts": [[[1], [2, 3]]]}, r"prompts\[0\] is \[\[1\], \[2, 3\]\]"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [1, 2]}, r"prompts\[0\] is 1"),
        ({"prompts": ["text"]}, r"prompts\[0\] is 'text'"),
        ({"prompts": [[1.0]]}, r"prompts\[0\] is \[1.0\]"),
        ({"prompts": [[5, 128]]}, r"prompts\[0\] has 128"),
        ({"prompts": [[-1]]}, r"prompts\[0\] has -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_new_tokens": LENGTH - 1}, r"prompts\[0\] has 2 tokens"),
        (
            {"max_new_tokens": 10**20},
            "max_new_tokens is 10{20}",
        ),
        ({"stop_tokens": [128]}, "stop_tokens has 128"),
        ({"stop_tokens": 5}, "stop_tokens is 5"),
        ({"on_tokens": 5}, "on_tokens is 5"),
        ({"sampling": 0.5}, "sampling is a float"),
        (
            {"sampling": Sampling(suppress_tokens=[128])},
            "suppress_tokens has 128",
        ),
        (
            {"sampling": Sampling(suppress_tokens=range(128))},
            "suppress_tokens has all 128 tokens",
        ),
        ({"log_probs": 1}, "log_probs is a int"),
        ({"sampling": DRAWN}, "key is None"),
        ({"sampling": DRAWN, "key": 3}, "key is 3"),
        (
            {"sampling": DRAWN, "key": jax.random.key(0, impl="rbg")},
            "key has .* impl 'rbg'",
        ),
        ({"sampling": DRAWN, "key": jax.random.split(jax.random.key(0))}, r"key has shape \(2,\)"),
    ],
)
def test_calls_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        small_generator()(**{"prompts": [[1, 2]], "max_new_tokens": 3} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 2**31}, "capacity is 2147483648"),
        ({"chunk_tokens": True}, "chunk_tokens is True"),
        ({"chunk_tokens": 2**31}, "chunk_tokens is 2147483648"),
        ({"decoder": "x"}, "decoder is a str"),
        ({"forms": [1]}, "forms is a list"),
        ({"forms": {"full": KVCache}}, "forms has 'full'"),
        ({"forms": {"full_attention": CompactKVCache}}, "CompactKVCache holds one projection"),
        ({"sampling": None}, "sampling is a NoneType"),
        ({"stop_tokens": None}, "stop_tokens is None"),
        ({"stop_tokens": [128]}, "stop_tokens has 128"),
        ({"cache_dtype": jnp.int8}, "cache_dtype .*int8.*; accepted: float32, float8_e4m3fn"),
        ({"cache_dtype": "foo"}, "cache_dtype .*foo; accepted: float32, float8_e4m3fn"),
    ],
)
def test_generators_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Generator(**{"decoder": model_of("gemma-4-e2b")[0], "capacity": 8} | changes)


def test_more_prompts_than_slots_can_be_numbered_for():
    generator = Generator(small_model(), capacity=2**30, chunk_tokens=2**31 - 1)
    with pytest.raises(ValueError, match="prompts has 2"):
        generator([[1], [2]], 1)


def test_a_model_without_weights_generates_nothing():
    config = small_model().config
    abstract = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="is abstract; accepted: models with weights, as the new"):
        Generator(abstract, capacity=8)([[1]], 1)
