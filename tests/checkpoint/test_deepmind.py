"""DeepMind's parameter trees; the fixtures come from its package, logits with them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax.checkpoint import CheckpointError, load_deepmind_into
from g4attn_jax.layout import Contiguous
from tests.checkpoint.directories import abstract, read_config
from tests.everyday import everyday

FIXTURES = Path(__file__).parents[1] / "golden_deepmind"
MODELS = ("gemma-4-e2b", "gemma-4-26b-a4b")


def read(name):
    """(params by path, tokens, logits)."""
    with np.load(FIXTURES / name / "golden.npz") as file:
        params = {
            key.removeprefix("params/"): file[key].view(jnp.bfloat16)
            for key in file.files
            if key.startswith("params/")
        }
        return params, file["tokens"], file["logits"]


def nested(params):
    tree = {}
    for path, array in params.items():
        *outer, leaf = path.split("/")
        at = tree
        for key in outer:
            at = at.setdefault(key, {})
        at[leaf] = array
    return tree


def flat(params):
    """As the files of DeepMind have it: two levels, and the weights of MLPs one deeper."""
    tree = {}
    for path, array in params.items():
        if path.endswith(("mlp/linear", "mlp/gating_einsum")):
            path += "/w"
        outer, leaf = f"transformer/{path}".rsplit("/", 1)
        tree.setdefault(outer, {})[leaf] = array
    return tree


def load(name, params):
    return load_deepmind_into(params, abstract(read_config(FIXTURES / name), jnp.float32))


@everyday("gemma-4-26b-a4b-nested", "gemma-4-26b-a4b-flat")
@pytest.mark.parametrize("form", [nested, flat])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_deepminds(name, form):
    params, tokens, expected = read(name)
    model, report = load(name, form(params))
    shared = model.config.num_kv_shared_layers
    assert report.loaded + 2 * shared == len(params)
    assert sum(report.skipped.values()) == 2 * shared
    layouts = dict.fromkeys(model.config.layer_types, Contiguous(*tokens.shape))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    cache = model.init_cache(layouts)
    logits, _ = model(tokens, model.plan(positions, cache), cache)
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_other_towers_are_skipped_and_counted():
    params, *_ = read("gemma-4-26b-a4b")
    _, report = load(
        "gemma-4-26b-a4b",
        nested(params)
        | {
            "vision_encoder": {"a": {"w": np.ones(2)}, "b": np.ones(3, np.int32)},
            "embedder": nested(params)["embedder"] | {"mm_input_projection": {"w": np.ones(2)}},
        },
    )
    assert report.skipped == {"vision_encoder/": 2, "embedder/mm_": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_norm/scale": None}, "lacks final_norm/scale"),
        ({"layer_0/attn/other/w": np.ones(2)}, "has layer_0/attn/other; this model"),
        ({"layer_1/skip_scale": np.ones(2, np.float32)}, r"layer_1/skip_scale has shape \(2,\)"),
        ({"layer_1/skip_scale": np.ones(1, np.int8)}, "layer_1/skip_scale has dtype int8"),
        ({"layer_1/skip_scale": "1"}, "layer_1/skip_scale is a str"),
        (
            {"layer_1/skip_scale": [np.ones(1)]},
            "has layer_1/skip_scale/0 in a node that is no dict",
        ),
        ({"vision_encoder/a": (np.ones(1),)}, "has vision_encoder/a/0 in a node that is no dict"),
        ({"transformer/layer_1/skip_scale": np.ones(1)}, "has layer_1/skip_scale twice"),
    ],
)
def test_wrong_trees_are_refused(change, message):
    params = {k: v for k, v in (read("gemma-4-e2b")[0] | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        load("gemma-4-e2b", nested(params))
