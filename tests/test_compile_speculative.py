"""A group of speculative decoding compiled for a GPU that is not there: launches and copies."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Config, Gemma4Decoder, Generator
from g4attn_jax.assistant_config import AssistantConfig, AssistantTextConfig
from g4attn_jax.generation.programs import Limits
from g4attn_jax.model import Gemma4Assistant
from g4attn_jax.model.acceptance import Greedy
from g4attn_jax.speculative import draft
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches
from tests.everyday import everyday

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

BATCH, DRAFTS, LAYERS, CAPACITY = 8, 4, 6, 4096
TARGET = Gemma4Config.preset("gemma-4-31b").truncated(LAYERS)
ASSISTANT_LAYERS = ("sliding_attention",) * 3 + ("full_attention",)
_FIELDS = {field.name: getattr(TARGET, field.name) for field in dataclasses.fields(TARGET)} | {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "layer_types": ASSISTANT_LAYERS,
}
ASSISTANT = AssistantConfig(AssistantTextConfig(**_FIELDS), TARGET.hidden_size, False)
# Queries, output and down projection; gate and up; two sums.
PER_LAYER = {"linear": 3, "geglu": 1, "norm_rope": 1, "decode_attention": 1, "add_rms_norm": 2}


def generator_and_cache():
    """Generator and cache of models without weights."""
    decoder, assistant = nnx.eval_shape(
        lambda: (
            Gemma4Decoder(TARGET, rngs=nnx.Rngs(0)),
            Gemma4Assistant(ASSISTANT, rngs=nnx.Rngs(0)),
        )
    )
    generator = Generator(decoder, capacity=CAPACITY, assistant=assistant, draft_tokens=DRAFTS)
    cache = jax.eval_shape(
        functools.partial(generator._empty_cache, batch=BATCH), generator._weights
    )
    return generator, cache


def sequences_of(generator):
    return generator._sequences([np.ones(1, np.int32)] * BATCH, np.zeros(BATCH, np.int32))


def producers_of(text, cache):
    """The opcodes that make an array of the shape of one of the caches, but for the free ones."""
    shapes = {f"bf16[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(cache)}
    lines = re.findall(r"^\s+(?:ROOT )?%?\S+ = (\S+?)\{\S* ([\w-]+)\(", text, re.M)
    found = {opcode for shape, opcode in lines if shape in shapes}
    assert found  # the caches are there, in these shapes
    return found - FREE_OPCODES


@everyday()
def test_a_draft_only_projects_queries_and_reads_the_caches():
    generator, cache = generator_and_cache()
    programs = generator._decode.__wrapped__.__self__

    def drafts(weights, last, cache):
        return draft(*programs.merge(weights), last, cache, Greedy(), draft_tokens=DRAFTS)

    arguments = generator._weights, sequences_of(generator).last, cache
    text = gpu_target.compile_for("9.0", drafts, *arguments).as_text()
    # The passes are one loop, whose trip count is known: nothing waits for the host.
    assert re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', text) == [str(DRAFTS)]
    # Its body is in the text once.
    counts, layers = {name: count_launches(text, name) for name in PER_LAYER}, len(ASSISTANT_LAYERS)
    assert counts == {name: count * layers for name, count in PER_LAYER.items()}
    # A prologue makes queries alone, for the compact cache with the 128 dims that rotate.
    prologues = [line for line in text.splitlines() if 'name = "norm_rope"' in line]
    heads = BATCH * TARGET.num_attention_heads
    assert [re.search(r" = (\S+?)\{", line).group(1) for line in prologues] == [
        *[f"bf16[{heads},256]"] * 3,
        f"bf16[{heads},{512 + 128}]",
    ]
    assert producers_of(text, cache) == set()


@everyday()
def test_the_generators_loop_updates_the_caches_in_place():
    generator, cache = generator_and_cache()
    row = np.zeros(BATCH, np.int32)
    compiled = gpu_target.compile_for(
        "9.0",
        generator._decode.__wrapped__,
        generator._weights,
        sequences_of(generator),
        cache,
        *(Limits(row, row, np.zeros(TARGET.vocab_size, bool)), np.int32(1), Greedy()),
        donate_argnums=2,
    )
    assert producers_of(compiled.as_text(), cache) == set()
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == cache_bytes
    # Float32 logits of all tokens of a group are most of it.
    assert memory.temp_size_in_bytes < 2 * 4 * BATCH * (DRAFTS + 1) * TARGET.vocab_size
