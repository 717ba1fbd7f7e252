"""Prefill attention compiled for NVIDIA GPUs on a machine without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode, ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache, zeros
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches, entry_opcodes

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

SHAPES = [
    # batch, tokens, context, Nkv, G, D, form, window, q's dtype, the cache's
    (1, 8192, 8192, 4, 8, 512, KVCache, None, jnp.bfloat16, jnp.bfloat16),
    (1, 2048, 8192, 4, 8, 512, CompactKVCache, None, jnp.bfloat16, jnp.bfloat16),
    (1, 8192, 8192, 16, 2, 256, KVCache, 1024, jnp.bfloat16, jnp.bfloat16),
    (8, 33, 1088, 1, 16, 128, KVCache, 512, jnp.bfloat16, jnp.bfloat16),
    (2, 512, 512, 4, 8, 512, KVCache, None, jnp.bfloat16, FLOAT8),
    (2, 512, 512, 4, 8, 512, CompactKVCache, None, jnp.bfloat16, FLOAT8),
    (2, 512, 512, 16, 2, 256, KVCache, 128, jnp.bfloat16, FLOAT8),
    (2, 100, 512, 2, 4, 512, KVCache, None, jnp.float32, jnp.float32),
    (2, 100, 512, 2, 4, 512, CompactKVCache, None, jnp.float32, jnp.float32),
    (3, 100, 512, 3, 5, 320, KVCache, None, jnp.float16, jnp.float16),
    (3, 100, 512, 3, 5, 24, KVCache, 7, jnp.float16, jnp.float16),
    # 2^31 elements and more need 64-bit offsets.
    (1, 2**18, 2**18, 16, 2, 512, KVCache, 1024, jnp.bfloat16, jnp.bfloat16),
]


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s[:6])))
def test_one_launch_and_no_copy(gpu, paged, shape):
    """It fits in the shared memory, and nothing but the launch touches the cache."""
    batch, tokens, context, nkv, group, d, form, window, dtype, storage = shape
    if storage == FLOAT8 and gpu == "8.0":
        pytest.skip("has no float8 conversions")
    pages = (batch * context // 16, 16) if paged else (batch, context)
    widths = (d, 128) if form is CompactKVCache else (d, d)
    scale = struct(2, dtype=jnp.float32) if storage == FLOAT8 else None
    compiled = gpu_target.compile_for(
        gpu,
        functools.partial(ops.prefill_attention, sliding_window=window),
        struct(batch, tokens, nkv * group, d + 128 * (form is CompactKVCache), dtype=dtype),
        form(*(struct(*pages, nkv, w, dtype=storage) for w in widths), scale),
        struct(batch, context // 16, dtype=jnp.int32) if paged else None,
        struct(batch, tokens, dtype=jnp.int32),
    )
    opcodes = entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
    assert opcodes["custom-call"] == count_launches(compiled.as_text(), "prefill_attention") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


def layers():
    for model, layer in (("31b", 0), ("31b", 5), ("e2b", 15)):
        spec = Gemma4Config.preset(model).attention_spec(layer)
        yield model, layer, Contiguous(1, 32768), KVCache
        yield model, layer, Paged(struct(1, 512, dtype=jnp.int32), 512, 64), KVCache
        if spec.sliding_window is not None:
            yield model, layer, Ring(1, spec.sliding_window, 2048), KVCache
        if spec.mode is ProjectionMode.QK_ONLY:
            yield model, layer, Contiguous(1, 32768), CompactKVCache


@pytest.mark.parametrize(
    ("model", "layer", "layout", "form"),
    list(layers()),
    ids=lambda x: x.__name__ if isinstance(x, type) else type(x).__name__ if "." in repr(x) else x,
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
