"""Generation with an assistant on a GPU, over the attention shapes of all five sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, Gemma4Config, Gemma4Decoder, Generator, generation
from g4attn_jax.assistant_config import AssistantConfig, AssistantTextConfig
from g4attn_jax.model import Gemma4Assistant
from tests.test_speculative import OWN, RIGHT, WRONG, Guided

# Any length will do: launches depend on the capacity.
PROMPTS = ([3, 1, 4] * 11, [5], [9, 2, 6, 5] * 5)
NEW, CAPACITY = 24, 2048
LENGTH = max(map(len, PROMPTS)) + NEW


def config_of(name):
    """A sliding and a full layer, and of sizes that share K and V two that share; few tokens."""
    config = Gemma4Config.preset(name)
    shared = 2 if config.num_kv_shared_layers else 0
    few_experts = {"num_experts": 16} if config.enable_moe_block else {}
    return dataclasses.replace(
        config,
        num_hidden_layers=2 + shared,
        num_kv_shared_layers=shared,
        layer_types=("sliding_attention", "full_attention") * (2 if shared else 1),
        vocab_size=2048,
        vocab_size_per_layer_input=2048,
        **few_experts,
    )


def assistant_config_of(target):
    """A sliding and a full layer with the target's heads."""
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    fields |= {
        "hidden_size": 256,
        "intermediate_size": 512,
        "hidden_size_per_layer_input": 0,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 2,
        "layer_types": ("sliding_attention", "full_attention"),
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    }
    return AssistantConfig(
        text=AssistantTextConfig(**fields),
        backbone_hidden_size=target.hidden_size,
        use_ordered_embeddings=False,
    )


@functools.lru_cache(maxsize=1)
def models_of(name):
    config = config_of(name)
    decoder = Gemma4Decoder(config, rngs=nnx.Rngs(0))
    return decoder, Gemma4Assistant(assistant_config_of(config), rngs=nnx.Rngs(1))


@functools.lru_cache(maxsize=1)
def logits_by_xla(name):
    """Logits of whole sequences [3, LENGTH] in float32, and with the usual roundings."""
    decoder, _ = models_of(name)
    _, params = nnx.split(decoder)

    def program(dtype):
        graph, _ = nnx.split(
            nnx.eval_shape(
                lambda: Gemma4Decoder(
                    config_of(name), rngs=nnx.Rngs(0), dtype=dtype, implementation="xla"
                )
            )
        )
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(PROMPTS), 1))
        layouts = dict.fromkeys(decoder.config.layer_types, Contiguous(*positions.shape))

        def run(params, tokens):
            model = nnx.merge(graph, params)
            cache = model.init_cache(layouts)
            return model(tokens, model.plan(positions, cache), cache)[0]

        return jax.jit(run)

    programs = program(jnp.float32), program(jnp.bfloat16)

    def run(tokens):
        with jax.default_matmul_precision("highest"):
            return [np.asarray(program(params, tokens)) for program in programs]

    return run


def judge(name, prompts, answers):
    """Each token is the likeliest by float32, up to twice the error of logits in bfloat16."""
    tokens = np.zeros((len(PROMPTS), LENGTH), np.int32)
    made = np.zeros(tokens.shape, bool)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert len(answer) == NEW
        tokens[b, : len(prompt) + NEW] = [*prompt, *answer]
        made[b, len(prompt) - 1 :][:NEW] = True
    exact, usual = logits_by_xla(name)(tokens)
    next_tokens = np.roll(tokens, -1, axis=1)[..., None]
    gap = exact.max(axis=-1) - np.take_along_axis(exact, next_tokens, axis=-1)[..., 0]
    assert gap[made].max() <= 2 * np.abs(usual - exact)[made].max()


def pytest_generate_tests(metafunc):
    """Gives each size one or three sequences, two numbers of drafts; with `--whole-tables` all."""
    some = [
        ("gemma-4-e2b", 1, (1, 5)),
        ("gemma-4-e4b", 3, (2, 6)),
        ("gemma-4-12b", 1, (3, 7)),
        ("gemma-4-26b-a4b", 3, (4, 8)),
        ("gemma-4-31b", 3, (5, 8)),
    ]
    assert {name for name, *_ in some} == set(Gemma4Config.preset_names())
    if metafunc.config.getoption("whole_tables"):
        some = [(name, batch, range(1, 9)) for name, *_ in some for batch in (1, 3)]
    ids = [f"{name}-{batch}" for name, batch, _ in some]
    metafunc.parametrize(("name", "batch", "numbers_of_drafts"), some, ids=ids)


@pytest.mark.gpu(
    "decode_attention", "prefill_attention", "qkv_norm_rope_write", "linear", "add_rms_norm",
    "grouped_matmul", "grouped_gated_matmul", slow=True,
)  # fmt: skip
def test_drafts_of_every_size(name, batch, numbers_of_drafts, monkeypatch):
    """Some drafts are accepted, some refused, and some are the assistant's own."""
    decoder, assistant = models_of(name)
    prompts, options = PROMPTS[:batch], {"capacity": CAPACITY, "chunk_tokens": 16}
    plain = Generator(decoder, **options)(prompts, NEW)
    judge(name, prompts, plain)
    follows = np.zeros((batch, CAPACITY), np.int32)
    for row, prompt, answer in zip(follows, prompts, plain, strict=True):
        row[len(prompt) - 1 :][:NEW] = answer
    for draft_tokens in numbers_of_drafts:
        kinds = np.resize([RIGHT] * (draft_tokens + 2) + [WRONG, RIGHT, OWN], follows.shape)
        rule = Guided(follows, kinds.astype(np.int32))
        monkeypatch.setattr(generation, "_rule", lambda *_, rule=rule: rule)
        generator = Generator(decoder, assistant=assistant, draft_tokens=draft_tokens, **options)
        statistics = []
        answers = generator(prompts, NEW, on_drafts=statistics.append)
        assert statistics[0].acceptance_rate > 0.2, draft_tokens
        judge(name, prompts, answers)
