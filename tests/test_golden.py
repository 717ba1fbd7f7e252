"""Our layer against outputs of Hugging Face's, prefill and cached decode past the window."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from tests.everyday import everyday

GOLDEN = Path(__file__).parent / "golden"
PROMPT = 12  # of make_golden.py; the window is 8
LAYERS = [
    ("k_eq_v", 0, ProjectionMode.QKV_FULL),
    ("k_eq_v", 1, ProjectionMode.QK_ONLY),
    ("kv_shared", 0, ProjectionMode.QKV_FULL),
    ("kv_shared", 1, ProjectionMode.QKV_FULL),
    ("kv_shared", 2, ProjectionMode.Q_ONLY),
    ("kv_shared", 3, ProjectionMode.Q_ONLY),
]


def from_bits(array):
    return array.view(jnp.bfloat16) if array.dtype == np.uint16 else array


def load_layer(model, layer, dtype, implementation=None):
    fixture = np.load(GOLDEN / f"{model}.npz")
    attention = Gemma4Attention(
        Gemma4Config.from_hf(GOLDEN / f"{model}.json"),
        layer,
        rngs=nnx.Rngs(0),
        dtype=dtype,
        implementation=implementation,
    )
    prefix = f"{layer}/"
    arrays = {
        key.removeprefix(prefix): from_bits(fixture[key])
        for key in fixture.files
        if key.startswith(prefix)
    }
    attention.load_hf({key: value for key, value in arrays.items() if key.endswith(".weight")})
    return attention, arrays


def layout_of(name, spec, batch, tokens):
    if name == "contiguous":
        return Contiguous(batch, tokens)
    if name == "ring":
        return Ring(batch, spec.sliding_window, PROMPT)
    # Pages from the end of the pool, every other one another's.
    pages = -(-tokens // 16)
    table = 2 * (batch * pages - 1 - np.arange(batch * pages)).reshape(batch, pages)
    return Paged(2 * batch * pages, 16, jnp.asarray(table, jnp.int32))


def run_layer(model, layer, dtype, implementation=None, layout="contiguous", form=KVCache):
    """Prefill of PROMPT tokens, then single steps, as the fixture was made; (ours, fixture)."""
    attention, arrays = load_layer(model, layer, dtype, implementation)
    x = jnp.asarray(arrays["x"])
    layout = layout_of(layout, attention.spec, *x.shape[:2])
    producer, producer_x = attention, None
    if attention.spec.kv_layer != layer:
        producer, producer_arrays = load_layer(
            model, attention.spec.kv_layer, dtype, implementation
        )
        producer_x = jnp.asarray(producer_arrays["x"])
    cache = producer.init_cache(layout, form)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    ys = []
    bounds = [0, *range(PROMPT, x.shape[1] + 1)]
    for start, stop in itertools.pairwise(bounds):
        plan = plan_step(attention.spec, positions[:, start:stop], layout)
        if producer_x is not None:
            _, cache = producer(producer_x[:, start:stop], plan, cache)
        y, cache = attention(x[:, start:stop], plan, cache)
        ys.append(y)
    return np.asarray(jnp.concatenate(ys, axis=1)), arrays


LAYOUTS_AND_FORMS = [
    (model, layer, layout, form)
    for model, layer, mode in LAYERS
    for layout in ("contiguous", "ring", "paged")
    for form in (KVCache, CompactKVCache)
    # Only sliding layers (the even ones) have rings, only K = V layers the compact form.
    if (layout != "ring" or layer % 2 == 0) and (form is KVCache or mode is ProjectionMode.QK_ONLY)
]


@pytest.mark.parametrize(("model", "layer", "mode"), LAYERS)
def test_modes(model, layer, mode):
    assert Gemma4Config.from_hf(GOLDEN / f"{model}.json").attention_spec(layer).mode is mode


@everyday(
    "k_eq_v-1-contiguous-CompactKVCache",
    "kv_shared-1-paged-KVCache",
    "k_eq_v-0-ring-KVCache",
    "kv_shared-2-contiguous-KVCache",
)
@pytest.mark.parametrize(("model", "layer", "layout", "form"), LAYOUTS_AND_FORMS)
def test_float32_matches_hugging_face(model, layer, layout, form):
    with jax.default_matmul_precision("highest"):
        y, arrays = run_layer(model, layer, jnp.float32, None, layout, form)
    np.testing.assert_allclose(y, arrays["y_float32"], rtol=0, atol=1e-5)


@everyday("k_eq_v-1-paged-CompactKVCache-triton_interpret", "kv_shared-2-contiguous-KVCache-None")
@pytest.mark.parametrize("implementation", [None, "triton_interpret"])
@pytest.mark.parametrize(("model", "layer", "layout", "form"), LAYOUTS_AND_FORMS)
def test_bfloat16_is_no_worse_than_hugging_face(model, layer, layout, form, implementation):
    y, arrays = run_layer(model, layer, jnp.bfloat16, implementation, layout, form)
    exact = arrays["y_float32"].astype(np.float64)
    ours = y.astype(np.float64) - exact
    theirs = arrays["y_bfloat16"].astype(np.float64) - exact
    assert np.linalg.norm(ours) <= np.linalg.norm(theirs)
    # The largest of 2816 errors is one element's luck: 0.55 to 0.73 of theirs in five layers,
    # 1.23 in kv_shared's layer 2.
    assert np.abs(ours).max() <= 1.25 * np.abs(theirs).max()


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 2_000_000


def test_configs_are_hugging_face_configs():
    for model in {model for model, _, _ in LAYERS}:
        config = json.loads((GOLDEN / f"{model}.json").read_text())
        assert config["model_type"] == "gemma4_text"
