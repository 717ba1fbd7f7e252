"""Prefill attention compiled for NVIDIA GPUs on a machine without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode
from g4attn_jax.cache import CompactKVCache, KVCache, zeros
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.case import struct
from g4attn_jax.testing.launches import count_launches
from tests.everyday import everyday

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)


def name_of(x):
    if isinstance(x, (Contiguous, Paged, Ring)):
        x = type(x)
    return getattr(x, "__name__", str(x))


def layers():
    for model, layer in (("31b", 0), ("31b", 5), ("e2b", 15)):
        spec = Gemma4Config.preset(model).attention_spec(layer)
        yield model, layer, Contiguous(1, 32768), KVCache
        yield model, layer, Paged(512, 64, struct(1, 512, dtype=jnp.int32)), KVCache
        if spec.sliding_window is not None:
            yield model, layer, Ring(1, spec.sliding_window, 2048), KVCache
        if spec.mode is ProjectionMode.QK_ONLY:
            yield model, layer, Contiguous(1, 32768), CompactKVCache


@everyday("31b-0-Ring-KVCache")
@pytest.mark.parametrize(
    ("model", "layer", "layout", "form"),
    list(layers()),
    ids=name_of,
)
def test_chunk_of_a_layer(model, layer, layout, form):
    """The cache is updated in place, and no temporary is as large as a tokens x context matrix."""
    config, tokens = Gemma4Config.preset(model), 2048
    attention = nnx.eval_shape(lambda: Gemma4Attention(config, layer, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(attention)
    pages = {"num_pages": layout.num_pages, "page_size": layout.page_size}
    cache = jax.eval_shape(lambda: zeros(form, attention.spec, **pages, dtype=jnp.bfloat16))

    def step(params, x, positions, cache, layout):
        plan = plan_step(attention.spec, positions, layout)
        return nnx.merge(graph, params)(x, plan, cache)

    compiled = gpu_target.compile_for(
        "9.0",
        step,
        params,
        struct(1, tokens, config.hidden_size),
        struct(1, tokens, dtype=jnp.int32),
        cache,
        layout,
        donate_argnums=3,
    )
    assert count_launches(compiled.as_text(), "prefill_attention") == 1
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)
    )
    spec = attention.spec
    packed = tokens * spec.num_kv_heads * (spec.group_size + 2) * spec.head_dim * 2
    assert memory.temp_size_in_bytes < 4 * packed < np.int64(4) * tokens * layout.capacity * 32
