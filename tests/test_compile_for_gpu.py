"""Compiled for NVIDIA GPUs on a machine without one: kernels compile, launches are counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode, ops
from g4attn_jax.cache import KVCache
from g4attn_jax.commands.decode import count_norm_launches
from g4attn_jax.rope import apply_rope, rope_cos_sin
from tests import gpu_target

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

on_every_gpu = pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)
LAYERS = [("31b", 0), ("31b", 5), ("e2b", 4), ("e2b", 15)]


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(mode, *, tokens, num_kv_heads, group, head_dim, dtype=jnp.bfloat16):
    return struct(tokens, num_kv_heads, group + mode.num_kv_projections, head_dim, dtype=dtype)


def scales(mode, head_dim, dtype=jnp.bfloat16):
    return [struct(head_dim, dtype=dtype)] * (1 if mode is ProjectionMode.Q_ONLY else 2)


# One per launch configuration and kind of buffer, not the product of all.
KERNELS = [
    # tokens, Nkv, G, D, activations, scales
    (1, 4, 8, 512, jnp.bfloat16, jnp.bfloat16),
    (32, 4, 8, 512, jnp.bfloat16, jnp.float32),
    (8192, 16, 2, 256, jnp.bfloat16, jnp.bfloat16),
    (33, 3, 5, 96, jnp.float16, jnp.bfloat16),
    (257, 1, 7, 320, jnp.float32, jnp.float32),
    # 2^31 elements and more need 64-bit offsets.
    (2**17, 4, 8, 512, jnp.bfloat16, jnp.bfloat16),
]


@on_every_gpu
@pytest.mark.parametrize("mode", ProjectionMode)
@pytest.mark.parametrize(("tokens", "nkv", "group", "d", "dtype", "scale_dtype"), KERNELS)
def test_qkv_rms_norm_is_one_launch(gpu, mode, tokens, nkv, group, d, dtype, scale_dtype):
    qkv = packed(mode, tokens=tokens, num_kv_heads=nkv, group=group, head_dim=d, dtype=dtype)
    compiled = gpu_target.compile_for(
        gpu, lambda *a: ops.qkv_rms_norm(*a, mode=mode), qkv, *scales(mode, d, scale_dtype)
    )
    assert count_norm_launches(compiled.as_text()) == 1
    opcodes = gpu_target.entry_opcodes(compiled)
    assert set(opcodes) - gpu_target.FREE_OPCODES == {"custom-call"}
    assert opcodes["custom-call"] == 1


@on_every_gpu
@pytest.mark.parametrize(("tokens", "nkv", "group", "d", "dtype", "scale_dtype"), KERNELS)
def test_q_keqv_rms_norm_is_one_launch(gpu, tokens, nkv, group, d, dtype, scale_dtype):
    compiled = gpu_target.compile_for(
        gpu,
        ops.q_keqv_rms_norm,
        struct(tokens, nkv * group, d, dtype=dtype),
        struct(tokens, nkv, d, dtype=dtype),
        *[struct(d, dtype=scale_dtype)] * 2,
    )
    opcodes = gpu_target.entry_opcodes(compiled)
    assert set(opcodes) - gpu_target.FREE_OPCODES == {"custom-call"}
    assert opcodes["custom-call"] == 1


@on_every_gpu
@pytest.mark.parametrize("mode", [ProjectionMode.QK_ONLY, ProjectionMode.QKV_FULL])
def test_scale_offset_and_v_scale_stay_in_the_launch(gpu, mode):
    qkv = packed(mode, tokens=32, num_kv_heads=4, group=8, head_dim=512)
    compiled = gpu_target.compile_for(
        gpu,
        lambda *a: ops.qkv_rms_norm(*a, mode=mode, scale_offset=1.0),
        qkv,
        *[struct(512)] * 3,
    )
    assert count_norm_launches(compiled.as_text()) == 1
    assert set(gpu_target.entry_opcodes(compiled)) <= {*gpu_target.FREE_OPCODES, "custom-call"}


@on_every_gpu
@pytest.mark.parametrize("mode", ProjectionMode)
def test_vmap_stays_one_launch(gpu, mode):
    qkv = struct(8, *packed(mode, tokens=4, num_kv_heads=4, group=8, head_dim=512).shape)
    compiled = gpu_target.compile_for(
        gpu,
        lambda x, *s: jax.vmap(lambda y: ops.qkv_rms_norm(y, *s, mode=mode))(x),
        qkv,
        *scales(mode, 512),
    )
    assert count_norm_launches(compiled.as_text()) == 1
    assert set(gpu_target.entry_opcodes(compiled)) <= {*gpu_target.FREE_OPCODES, "custom-call"}


@on_every_gpu
@pytest.mark.parametrize("mode", ProjectionMode)
@pytest.mark.parametrize("tokens", [1, 8, 2048])
def test_prologue_copies_and_slices_nothing(gpu, mode, tokens):
    """From the hidden state to rotated q and k: nothing but the matmul touches the packed buffer
    before the norm, and it is the norm's operand as it is."""
    nkv, group, d = 4, 8, 512
    weight = struct(
        2048, *packed(mode, tokens=1, num_kv_heads=nkv, group=group, head_dim=d).shape[1:]
    )

    def prologue(x, weight, positions, *scales):
        qkv = jnp.einsum("me,eknd->mknd", x, weight)
        q, k, v = ops.qkv_rms_norm(qkv, *scales, mode=mode)
        cos, sin = rope_cos_sin(positions, theta=1e6, head_dim=d, rotary_dim=128)
        return apply_rope(q, cos, sin), None if k is None else apply_rope(k, cos, sin), v

    compiled = gpu_target.compile_for(
        gpu,
        prologue,
        struct(tokens, 2048),
        weight,
        struct(tokens, dtype=jnp.int32),
        *scales(mode, d),
    )
    assert count_norm_launches(compiled.as_text()) == 1
    opcodes = gpu_target.entry_opcodes(compiled)
    assert not {"copy", "slice", "transpose", "dynamic-slice"} & set(opcodes)
    # Fusions before the norm may only be the matmul and its split-K reduction: nothing else has
    # as many elements as the packed buffer.
    text = compiled.as_text()
    before, _, _ = text[text.index("\nENTRY ") :].partition("__gpu$xla.gpu.triton")
    size = np.prod(packed(mode, tokens=tokens, num_kv_heads=nkv, group=group, head_dim=d).shape)
    writers = [
        line
        for line in before.splitlines()[:-1]
        if ("fusion(" in line or "custom-call(" in line) and _elements(line) == size
    ]
    assert len(writers) == 1
    assert "dot" in writers[0]


def _elements(line):
    """Elements of an HLO instruction's result, or of the first of several."""
    shape = line.split(" = ")[1].lstrip("(").split("[")[1].split("]")[0]
    return np.prod([int(n) for n in shape.split(",") if n])


@on_every_gpu
@pytest.mark.parametrize(("model", "layer"), LAYERS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_decode_step_does_not_copy_the_cache(gpu, model, layer, tokens):
    config = Gemma4Config.preset(model)
    attention = nnx.eval_shape(lambda: Gemma4Attention(config, layer, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(attention)
    spec, batch, capacity = attention.spec, 8, 4096
    array = struct(batch, capacity, spec.num_kv_heads, spec.head_dim)
    compiled = gpu_target.compile_for(
        gpu,
        lambda params, x, positions, cache: nnx.merge(graph, params)(x, positions, cache),
        params,
        struct(batch, tokens, config.hidden_size),
        struct(batch, tokens, dtype=jnp.int32),
        KVCache(array, array),
        donate_argnums=3,
    )
    assert count_norm_launches(compiled.as_text()) == 1
    cache_bytes = 2 * array.size * array.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    # A copy, transpose or conversion of K or of V would be a temporary of half this at least.
    assert memory.temp_size_in_bytes < cache_bytes / 4


def export_cases():
    for mode in ProjectionMode:
        qkv = packed(mode, tokens=8, num_kv_heads=4, group=8, head_dim=512)
        yield functools.partial(ops.qkv_rms_norm, mode=mode), (qkv, *scales(mode, 512))
    yield ops.q_keqv_rms_norm, (struct(8, 32, 512), struct(8, 4, 512), struct(512), struct(512))


@pytest.mark.parametrize(("op", "arguments"), list(export_cases()))
def test_export_for_cuda(op, arguments):
    """Exported where there is no GPU, the program holds the kernel, with no choice left open."""
    with jax.sharding.use_abstract_mesh(gpu_target.mesh("9.0").abstract_mesh):
        exported = jax.export.export(
            jax.jit(lambda *a: op(*a)),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
        )(*arguments)
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 1
    outputs = jax.tree.leaves(jax.eval_shape(op, *arguments))
    assert [a.shape for a in exported.out_avals] == [a.shape for a in outputs]
