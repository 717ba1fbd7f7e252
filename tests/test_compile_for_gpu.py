"""Compiled for NVIDIA GPUs on a machine without one: kernels compile, launches are counted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode, ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache, bytes_per_token, zeros
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from g4attn_jax.ops.qkv_norm_rope_write import cases as prologue
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.case import nbytes, struct
from g4attn_jax.testing.cases import all_cases
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches, entry_opcodes
from tests.everyday import everyday, everyday_cases

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

on_every_gpu = pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)
LAYERS = [("31b", 0), ("31b", 5), ("e2b", 15)]


# Names of kernels by op; decode attention may combine splits in a second one.
KERNELS = {
    "router": "router_scores",
    "qkv_rms_norm": "head_norm",
    "q_keqv_rms_norm": "head_norm",
    "qkv_norm_rope": "norm_rope",
    "qkv_norm_rope_write": "norm_rope",
}
# Second launches, which read the partial sums of the first.
SECOND_KERNELS = {"router": "router_top_k"}
HAS_PRODUCTS = ("decode_attention", "prefill_attention")


def compiled_case(gpu, case):
    """The op compiled for the case, a cache that it writes being donated."""
    donated = {"donate_argnums": 6} if case.op == "qkv_norm_rope_write" else {}
    return gpu_target.compile_for(gpu, lambda *a: case.run(a, "triton"), *case.structs(), **donated)


@pytest.mark.parametrize(
    "case", {case.label: case for case in all_cases("compile")}.values(), ids=lambda c: c.label
)
def test_x64(case):
    """Kernels stay 32 bits wide where JAX makes Python's integers int64."""
    structs = case.structs()
    with jax.enable_x64(True):
        gpu_target.compile_for("9.0", lambda *a: case.run(a, "triton"), *structs)


@on_every_gpu
@everyday_cases
@everyday(
    "9.0",
    "decode_attention-CompactKVCache-32-4-512-6-131071-131072",
    "prefill_attention-KVCache-32-16-256-8192-8191-8192-sliding_window=1024",
)
@pytest.mark.parametrize("case", all_cases("compile"), ids=str)
def test_is_one_launch(gpu, case):
    """Or two: those of `SECOND_KERNELS`, and decode attention's combination of splits.

    They fit in the shared memory, and nothing is copied.
    """
    if gpu == "8.0" and getattr(case, "storage", None) == FLOAT8.name:
        pytest.skip("has no float8 conversions")
    compiled = compiled_case(gpu, case)
    text, opcodes = compiled.as_text(), entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
    kernel = KERNELS.get(case.op, case.label.split()[0])
    if case.label == "linear_partial_sums":
        kernel = "linear"
    assert count_launches(text, kernel) == 1
    combining = count_launches(text, "combine_splits")
    second = SECOND_KERNELS.get(case.op)
    seconds = 0 if second is None else count_launches(text, second)
    assert opcodes["custom-call"] == 1 + combining + seconds
    assert combining <= (case.op == "decode_attention")
    assert seconds == (second is not None)
    memory = compiled.memory_analysis()
    if case.op == "qkv_norm_rope_write":
        assert memory.alias_size_in_bytes == nbytes(case.structs()[6])
    if not combining and not seconds:
        assert memory.temp_size_in_bytes < 1024


@everyday("decode_attention-CompactKVCache-32-4-512-6-8x8191-8192-page_size=64")
@pytest.mark.parametrize(
    "case",
    [c for c in all_cases("bench") if c.op in HAS_PRODUCTS and c.tokens in (6, 2048)],
    ids=str,
)
def test_attention_of_several_tokens_is_on_tensor_cores(case):
    """A wgmma instruction takes 64 rows. One of mma.sync takes 16, to which fewer query rows of a
    KV head are padded. Other units would give the right result, many times slower."""
    ptx = gpu_target.assembly("9.0", lambda *a: case.run(a, "triton"), *case.structs())
    assert ("wgmma.mma_async" if case.tokens * case.group > 16 else "mma.sync") in ptx


@on_every_gpu
@everyday("9.0")
@pytest.mark.parametrize("mode", [ProjectionMode.QK_ONLY, ProjectionMode.QKV_FULL])
def test_scale_offset_and_v_scale_stay_in_the_launch(gpu, mode):
    qkv, *_ = QkvRmsNormCase(mode, 32, 4, 512, 32).structs()
    compiled = gpu_target.compile_for(
        gpu,
        lambda *a: ops.qkv_rms_norm(*a, mode=mode, scale_offset=1.0),
        qkv,
        *[struct(512)] * 3,
    )
    assert count_launches(compiled.as_text(), "head_norm") == 1
    assert set(entry_opcodes(compiled)) <= {*FREE_OPCODES, "custom-call"}


@on_every_gpu
@everyday("9.0")
@pytest.mark.parametrize("mode", ProjectionMode)
def test_vmap_stays_one_launch(gpu, mode):
    qkv, *scales = QkvRmsNormCase(mode, 32, 4, 512, 4).structs()
    compiled = gpu_target.compile_for(
        gpu,
        lambda x, *s: jax.vmap(lambda y: ops.qkv_rms_norm(y, *s, mode=mode))(x),
        struct(8, *qkv.shape),
        *scales,
    )
    assert count_launches(compiled.as_text(), "head_norm") == 1
    assert set(entry_opcodes(compiled)) <= {*FREE_OPCODES, "custom-call"}


@on_every_gpu
@everyday(
    *(
        f"{mode}-9.0"
        for mode in ("QK_ONLY-CompactKVCache-32-4-512-128-8", "QKV_FULL-KVCache-32-16-256-256-2048")
    )
)
@pytest.mark.parametrize(
    "case",
    [c for c in prologue.CASES if "bench" in c.tags and c.tokens in (1, 8, 2048)],
    ids=lambda case: case.name.partition("-page_size")[0],
)
def test_nothing_but_the_launch_between_matmul_and_attention(gpu, case):
    """The launch reads what the matmul wrote, as it is, and no cache is copied."""
    qkv, *arguments = case.structs()
    tokens, mode = case.tokens, case.mode
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


def name_of(x):
    if isinstance(x, (Contiguous, Paged, Ring)):
        x = type(x)
    return getattr(x, "__name__", str(x))


def layouts(spec):
    yield Contiguous(8, 4096), KVCache
    yield Paged(4096, 64, struct(8, 64, dtype=jnp.int32)), KVCache
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
    ids=name_of,
)
@everyday("4-31b-5-Contiguous-CompactKVCache", "1-e2b-15-Paged-KVCache")
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


@everyday_cases
@pytest.mark.parametrize("case", all_cases("export"), ids=str)
def test_export_for_cuda(case):
    """Exported where there is no GPU, the program holds the kernel, with no choice left open."""
    with jax.sharding.use_abstract_mesh(gpu_target.mesh("9.0").abstract_mesh):
        exported = jax.export.export(
            jax.jit(lambda *a: case.run(a)),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
        )(*case.structs())
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 1
    outputs = jax.tree.leaves(jax.eval_shape(lambda *a: case.run(a), *case.structs()))
    assert [a.shape for a in exported.out_avals] == [a.shape for a in outputs]
