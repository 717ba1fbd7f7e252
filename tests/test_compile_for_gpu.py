"""Compiled for NVIDIA GPUs on a machine without one: kernels compile, launches are counted."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode, ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache, bytes_per_token, zeros
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches, entry_opcodes

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

on_every_gpu = pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)
LAYERS = [("31b", 0), ("31b", 5), ("e2b", 15)]


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
    assert count_launches(compiled.as_text(), "head_norm") == 1
    opcodes = entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
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
    opcodes = entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
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
    assert count_launches(compiled.as_text(), "head_norm") == 1
    assert set(entry_opcodes(compiled)) <= {*FREE_OPCODES, "custom-call"}


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
    assert count_launches(compiled.as_text(), "head_norm") == 1
    assert set(entry_opcodes(compiled)) <= {*FREE_OPCODES, "custom-call"}


def prologue(mode, form, tokens, nkv, group, d, rotary_dim, dtype=jnp.bfloat16):
    """Arguments of `qkv_norm_rope_write`; dtype is the cache's."""
    widths = {"k": d, "v": d} if form is KVCache else {"v": d, "k_rot": rotary_dim}
    arrays = {name: struct(1024, 64, nkv, width, dtype=dtype) for name, width in widths.items()}
    scale = struct(2, dtype=jnp.float32) if dtype == FLOAT8 else None
    return [
        packed(mode, tokens=tokens, num_kv_heads=nkv, group=group, head_dim=d),
        *[struct(d)] * 2,
        *[struct(tokens, rotary_dim // 2, dtype=jnp.float32)] * 2,
        struct(tokens, dtype=jnp.int32),
        form(**arrays, scale=scale),
    ]


PROLOGUES = [
    # mode, form, tokens, Nkv, G, D, R
    (ProjectionMode.QK_ONLY, KVCache, 1, 4, 8, 512, 128),
    (ProjectionMode.QK_ONLY, CompactKVCache, 8192, 4, 8, 512, 128),
    (ProjectionMode.QKV_FULL, KVCache, 2048, 16, 2, 256, 256),
    (ProjectionMode.QKV_FULL, KVCache, 33, 3, 5, 96, 24),
    (ProjectionMode.Q_ONLY, KVCache, 128, 1, 8, 512, 128),
    (ProjectionMode.Q_ONLY, CompactKVCache, 5, 1, 8, 512, 128),
]


@on_every_gpu
@pytest.mark.parametrize(("mode", "form", "tokens", "nkv", "group", "d", "rotary_dim"), PROLOGUES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, FLOAT8])
def test_qkv_norm_rope_write_is_one_launch(
    gpu, mode, form, tokens, nkv, group, d, rotary_dim, dtype
):
    if dtype == FLOAT8 and gpu == "8.0":
        pytest.skip("has no float8 conversions")
    arguments = prologue(mode, form, tokens, nkv, group, d, rotary_dim, dtype)
    compiled = gpu_target.compile_for(
        gpu, lambda *a: ops.qkv_norm_rope_write(*a, mode=mode), *arguments, donate_argnums=6
    )
    opcodes = entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
    assert opcodes["custom-call"] == count_launches(compiled.as_text(), "norm_rope") == 1
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[6])
    )
    assert memory.temp_size_in_bytes < 1024


@on_every_gpu
@pytest.mark.parametrize("mode", ProjectionMode)
def test_qkv_norm_rope_is_one_launch(gpu, mode):
    arguments = prologue(mode, KVCache, 300, 4, 8, 512, 128)[:5]
    if mode is ProjectionMode.Q_ONLY:
        arguments[2] = None
    compiled = gpu_target.compile_for(gpu, lambda *a: ops.qkv_norm_rope(*a, mode=mode), *arguments)
    assert count_launches(compiled.as_text(), "norm_rope") == 1
    assert set(entry_opcodes(compiled)) <= {*FREE_OPCODES, "custom-call"}


@on_every_gpu
@pytest.mark.parametrize(("mode", "form", "_", "nkv", "group", "d", "rotary_dim"), PROLOGUES[:5])
@pytest.mark.parametrize("tokens", [1, 8, 2048])
def test_nothing_but_the_launch_between_matmul_and_attention(
    gpu, mode, form, _, nkv, group, d, rotary_dim, tokens
):
    """The launch reads what the matmul wrote, as it is, and no cache is copied."""
    qkv, *arguments = prologue(mode, form, tokens, nkv, group, d, rotary_dim)
    weight = struct(2048, *qkv.shape[1:])

    def step(x, weight, *arguments):
        qkv = jnp.einsum("me,eknd->mknd", x, weight)
        return ops.qkv_norm_rope_write(qkv, *arguments, mode=mode)

    compiled = gpu_target.compile_for(
        gpu, step, struct(tokens, 2048), weight, *arguments, donate_argnums=7
    )
    assert count_launches(compiled.as_text(), "norm_rope") == 1
    opcodes = entry_opcodes(compiled)
    assert not {"copy", "slice", "transpose", "dynamic-slice", "scatter"} & set(opcodes)
    # Fusions may only be the matmul and its split-K reduction: nothing else has as many elements
    # as the packed buffer.
    text = compiled.as_text()
    before, _, after = text[text.index("\nENTRY ") :].partition("__gpu$xla.gpu.triton")
    assert "fusion(" not in after
    writers = [
        line
        for line in before.splitlines()[:-1]
        if ("fusion(" in line or "custom-call(" in line) and _elements(line) == np.prod(qkv.shape)
    ]
    assert len(writers) == 1
    assert "dot" in writers[0]


def _elements(line):
    """Elements of an HLO instruction's result, or of the first of several."""
    shape = line.split(" = ")[1].lstrip("(").split("[")[1].split("]")[0]
    return np.prod([int(n) for n in shape.split(",") if n])


ATTENTIONS = [
    # batch, context, Nkv, G, D, form, tokens, q's dtype, the cache's
    (8, 8192, 4, 8, 512, KVCache, 1, jnp.bfloat16, jnp.bfloat16),
    (8, 8192, 4, 8, 512, CompactKVCache, 1, jnp.bfloat16, jnp.bfloat16),
    (1, 131072, 4, 8, 512, CompactKVCache, 6, jnp.bfloat16, jnp.bfloat16),
    (2, 4096, 1, 16, 512, KVCache, 16, jnp.bfloat16, jnp.bfloat16),
    (32, 1088, 16, 2, 256, KVCache, 1, jnp.bfloat16, jnp.bfloat16),
    (1, 1088, 16, 2, 256, KVCache, 6, jnp.bfloat16, jnp.bfloat16),
    (2, 512, 2, 4, 512, KVCache, 1, jnp.float32, jnp.float32),
    (2, 512, 2, 4, 512, CompactKVCache, 6, jnp.float32, jnp.float32),
    (3, 100, 3, 5, 96, KVCache, 3, jnp.float16, jnp.float16),
    (3, 100, 1, 8, 320, KVCache, 6, jnp.float16, jnp.float16),
    (3, 100, 1, 8, 320, CompactKVCache, 6, jnp.float16, jnp.float16),
    (8, 8192, 4, 8, 512, KVCache, 1, jnp.bfloat16, FLOAT8),
    (8, 8192, 4, 8, 512, CompactKVCache, 6, jnp.bfloat16, FLOAT8),
]


@on_every_gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("batch", "context", "nkv", "group", "d", "form", "tokens", "dtype", "storage"), ATTENTIONS
)
def test_decode_attention_is_two_launches(
    gpu, batch, context, nkv, group, d, form, tokens, dtype, storage, paged
):
    """At most, and it fits in the shared memory."""
    if storage == FLOAT8 and gpu == "8.0":
        pytest.skip("has no float8 conversions")
    pages = (4 * batch, 64) if paged else (batch, context)
    widths = (d, 128) if form is CompactKVCache else (d, d)
    scale = struct(2, dtype=jnp.float32) if storage == FLOAT8 else None
    cache = form(*(struct(*pages, nkv, w, dtype=storage) for w in widths), scale)
    width = d + 128 if form is CompactKVCache else d
    compiled = gpu_target.compile_for(
        gpu,
        ops.decode_attention,
        struct(batch, tokens, nkv * group, width, dtype=dtype),
        cache,
        struct(batch, 4, dtype=jnp.int32) if paged else None,
        struct(batch, tokens, dtype=jnp.int32),
    )
    text = compiled.as_text()
    assert count_launches(text, "decode_attention") == 1
    opcodes = entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
    assert opcodes["custom-call"] == 1 + count_launches(text, "combine_splits") <= 2


def layouts(spec):
    yield Contiguous(8, 4096), KVCache
    yield Paged(struct(8, 64, dtype=jnp.int32), 4096, 64), KVCache
    if spec.sliding_window is not None:
        yield Ring(8, spec.sliding_window, 16), KVCache
    if spec.mode is ProjectionMode.QK_ONLY:
        yield Contiguous(8, 4096), CompactKVCache


def decode_cases():
    for model, layer in LAYERS:
        spec = Gemma4Config.preset(model).attention_spec(layer)
        for layout, form in layouts(spec):
            yield model, layer, layout, form


@pytest.mark.parametrize(
    ("model", "layer", "layout", "form"),
    list(decode_cases()),
    ids=lambda x: x.__name__ if isinstance(x, type) else type(x).__name__ if "." in repr(x) else x,
)
@pytest.mark.parametrize("tokens", [1, 4])
def test_decode_step_of_a_layer(model, layer, layout, form, tokens):
    """One launch of the prologue, two at most of attention; the cache is updated in place."""
    config = Gemma4Config.preset(model)
    attention = nnx.eval_shape(lambda: Gemma4Attention(config, layer, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(attention)
    spec = attention.spec
    pages = {"num_pages": layout.num_pages, "page_size": layout.page_size}
    cache = jax.eval_shape(lambda: zeros(form, spec, **pages, dtype=jnp.bfloat16))

    def step(params, x, positions, cache, layout):
        plan = plan_step(spec, positions, layout)
        return nnx.merge(graph, params)(x, plan, cache)

    compiled = gpu_target.compile_for(
        "9.0",
        step,
        params,
        struct(8, tokens, config.hidden_size),
        struct(8, tokens, dtype=jnp.int32),
        cache,
        layout,
        donate_argnums=3,
    )
    text = compiled.as_text()
    assert count_launches(text, "norm_rope") == count_launches(text, "decode_attention") == 1
    assert count_launches(text, "combine_splits") <= 1
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    # Nothing but the launch writes as much as the smallest array: no copy, transpose, conversion.
    smallest = min(x.size for x in jax.tree.leaves(cache))
    for line in text[text.index("\nENTRY ") :].splitlines()[2:]:
        written_by = re.search(r" ([\w-]+)\(", line)
        if written_by and written_by[1] not in {*FREE_OPCODES, "custom-call"}:
            assert _elements(line) < smallest, line
    if spec.mode is not ProjectionMode.Q_ONLY and not isinstance(layout, Paged):
        assert cache_bytes == 8 * layout.capacity * bytes_per_token(spec, form)


def export_cases():
    for mode in ProjectionMode:
        qkv = packed(mode, tokens=8, num_kv_heads=4, group=8, head_dim=512)
        yield functools.partial(ops.qkv_rms_norm, mode=mode), (qkv, *scales(mode, 512))
    for mode, form in (
        (ProjectionMode.QK_ONLY, CompactKVCache),
        (ProjectionMode.QKV_FULL, KVCache),
    ):
        arguments = prologue(mode, form, 8, 4, 8, 512, 128)
        yield functools.partial(ops.qkv_norm_rope_write, mode=mode), arguments
        yield functools.partial(ops.qkv_norm_rope, mode=mode), arguments[:5]
    for form, width in ((KVCache, 512), (CompactKVCache, 640)):
        cache = prologue(ProjectionMode.QK_ONLY, form, 8, 4, 8, 512, 128)[6]
        q, positions = struct(8, 1, 32, width), struct(8, 1, dtype=jnp.int32)
        # One split, so one kernel, as the other ops have.
        yield (
            functools.partial(ops.decode_attention, num_splits=1),
            (q, cache, struct(8, 128, dtype=jnp.int32), positions),
        )
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
