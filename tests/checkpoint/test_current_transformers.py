"""Directories as current transformers saves them: loaded, saved, and the same greedy tokens."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, Gemma4Config
from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.checkpoint import load_assistant_into, load_hf_into, save_hf
from g4attn_jax.generation import Generator
from g4attn_jax.model import Gemma4Assistant
from tests.checkpoint.directories import (
    abstract,
    assert_same_bytes,
    read_config,
    read_tensors,
)
from tests.everyday import everyday

GOLDEN = Path(__file__).parents[1] / "golden_checkpoint"
MODELS = ("text", "text-experts", "text-untied", "multimodal", "unified-text", "unified")
TARGETS = {"assistant": "text", "unified-assistant": "unified-text"}
PROMPT, STEPS = 11, 24  # of make_golden.py
LENGTH, DRAFTS = 13, 4


def directory(name, form, tmp_path):
    """The fixture with its config in the new form, as it was saved, or in the old."""
    if form == "new":
        return GOLDEN / name
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    (folder / "old_config.json").replace(folder / "config.json")
    return folder


def test_fixtures_are_small():
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(sizes) < 1_000_000


def in_float32(folder):
    return load_hf_into(folder, abstract(read_config(folder), jnp.float32))


def tokens_of(name):
    return np.load(GOLDEN / name / "golden.npz")["tokens"]


@pytest.mark.parametrize("name", [*MODELS, *TARGETS])
def test_the_fixtures_are_of_both_forms(name):
    new, old = (
        json.loads((GOLDEN / name / file).read_text())
        for file in ("config.json", "old_config.json")
    )
    new, old = (config.get("text_config", config) for config in (new, old))
    assert "per_layer_config" in new
    assert "per_layer_config" not in old
    assert not {"global_head_dim", "num_global_key_value_heads"} & new.keys()
    assert {"global_head_dim", "num_global_key_value_heads"} <= old.keys()
    read = Gemma4Config if name in MODELS else AssistantConfig
    assert read.from_hf(GOLDEN / name / "config.json") == read.from_hf(
        GOLDEN / name / "old_config.json"
    )


@everyday("text-untied-old", "multimodal-new", "unified-new")
@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_greedy_tokens(name, form, tmp_path):
    decoder, report = in_float32(directory(name, form, tmp_path))
    assert sum(report.skipped.values()) + report.loaded == len(read_tensors(GOLDEN / name))
    tokens = tokens_of(name)
    generator = Generator(decoder, capacity=PROMPT + STEPS, chunk_tokens=8)
    with jax.default_matmul_precision("highest"):
        answers = generator(tokens[:, :PROMPT].tolist(), STEPS)
    assert [list(answer) for answer in answers] == tokens[:, PROMPT:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_saved_as_the_text_model_it_is_the_same(name, tmp_path):
    decoder, _ = load_hf_into(GOLDEN / name, abstract(read_config(GOLDEN / name)))
    save_hf(tmp_path, decoder, GOLDEN / name / "config.json", max_shard_bytes=30_000)
    given = {
        tensor.replace("model.language_model.", "model.", 1): value
        for tensor, value in read_tensors(GOLDEN / name).items()
        if "vision" not in tensor
    }
    assert_same_bytes(read_tensors(tmp_path), given)
    saved = read_config(tmp_path)
    assert Gemma4Config.from_hf(saved) == decoder.config
    text = read_config(GOLDEN / name)
    text = text.get("text_config", text)
    assert saved["per_layer_config"] == text["per_layer_config"]


@everyday("unified-assistant-new")
@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_same_drafts(name, form, tmp_path):
    folder = directory(name, form, tmp_path)
    config = AssistantConfig.from_hf(folder / "config.json")
    model = nnx.eval_shape(
        lambda: Gemma4Assistant(
            config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32
        )
    )
    assistant, _ = load_assistant_into(folder, model)
    target, _ = in_float32(GOLDEN / TARGETS[name])
    config.check_target(target.config)
    tokens = tokens_of(TARGETS[name])[:, : LENGTH + 1]
    drafts = drafts_of(assistant, target, tokens)
    np.testing.assert_array_equal(drafts, tokens_of(name))


def drafts_of(assistant, target, tokens):
    """Greedy drafts [B, DRAFTS] after tokens [B, LENGTH + 1]."""
    batch = len(tokens)
    layouts = dict.fromkeys(("sliding_attention", "full_attention"), Contiguous(batch, LENGTH + 1))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (batch, LENGTH))
    with jax.default_matmul_precision("highest"):
        cache = target.init_cache(layouts)
        step = target.plan(positions, cache)
        hidden, cache = target.hidden(jnp.asarray(tokens[:, :LENGTH]), step, cache)
        readable = target.readable(cache)
        step = assistant.plan(jnp.full((batch, 1), LENGTH), cache)
        token, hidden, drafts = jnp.asarray(tokens[:, LENGTH:]), hidden[:, -1:], []
        for _ in range(DRAFTS):
            embeddings = target.embed_tokens(token)
            logits, hidden = assistant(embeddings, hidden, step, readable)
            token = jnp.argmax(logits, axis=-1)
            drafts.append(token)
    return np.concatenate(drafts, axis=1)
