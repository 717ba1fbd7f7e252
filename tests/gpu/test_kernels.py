"""On a GPU: the whole sweep, real shapes, repeatability, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode, ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache, float8_scale
from g4attn_jax.commands import check, decode
from g4attn_jax.layout import Contiguous
from g4attn_jax.ops.decode_attention import cases as decode_attention
from g4attn_jax.ops.qkv_norm_rope.cases import QkvNormRopeCase
from g4attn_jax.ops.qkv_norm_rope_write import cases as qkv_norm_rope_write
from g4attn_jax.ops.qkv_norm_rope_write.cases import QkvNormRopeWriteCase
from g4attn_jax.ops.qkv_rms_norm import cases as qkv_rms_norm
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
from g4attn_jax.rope import rope_cos_sin
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.test_golden import LAYOUTS_AND_FORMS, run_layer

on_a_gpu = pytest.mark.gpu  # with the ops that a test is evidence for
LAYER = ("qkv_norm_rope_write", "decode_attention", "prefill_attention")


def of_cases(cases):
    """A parameter for each case, marked with its op."""
    marked = [pytest.param(case, marks=on_a_gpu(case.op), id=str(case)) for case in cases]
    return pytest.mark.parametrize("case", marked)


@of_cases(check.sweep())
def test_published_sweep(case):
    result = check.judge(case, case.arguments(), "triton")
    assert result.passed, result


def heads_cases(tag):
    """Cases with a tag, of the ops between matmul and attention."""
    return tagged((*qkv_rms_norm.CASES, *qkv_norm_rope_write.CASES), tag)


@of_cases(heads_cases("real"))
def test_real_model_shapes(case):
    result = check.judge(case, case.arguments(), "triton")
    assert result.passed, result


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@of_cases(heads_cases("odd"))
def test_odd_shapes_and_dtypes(case, dtype):
    """Whole arrays of the prologue are compared: other slots of the cache keep their poison."""
    arguments = case.arguments(dtype)
    outputs = case.run(arguments, "triton"), case.exact(arguments), case.usual(arguments)
    for ours, exact, usual in zip(*map(jax.tree.leaves, outputs), strict=True):
        exact = np.asarray(exact).astype(np.float64)
        error, usual_error = oracle.max_error(ours, exact), oracle.max_error(usual, exact)
        assert oracle.no_worse_than(error, usual_error, dtype), (error, usual_error)


@on_a_gpu("qkv_rms_norm")
@pytest.mark.parametrize("mode", [ProjectionMode.QK_ONLY, ProjectionMode.QKV_FULL])
def test_v_scale_and_scale_offset(mode):
    qkv, *scales = QkvRmsNormCase(mode, 32, 4, 512, 33).arguments()
    scales.append(scales[0] * 1.5)
    ours = ops.qkv_rms_norm(qkv, *scales, mode=mode, scale_offset=1.0, implementation="triton")
    exact = oracle.qkv_rms_norm(qkv, *scales, mode=mode, scale_offset=1.0)
    usual = oracle.qkv_rms_norm(
        qkv, *scales, mode=mode, scale_offset=1.0, norm=oracle.usual_rms_norm
    )
    for x, y, z in zip(ours, exact, usual, strict=True):
        error, usual_error = oracle.max_error(x, y), oracle.max_error(z, y)
        assert oracle.no_worse_than(error, usual_error, x.dtype), (error, usual_error)


PROLOGUES = [
    QkvNormRopeWriteCase(ProjectionMode.QK_ONLY, KVCache, 32, 4, 512, 128, 2048),
    QkvNormRopeWriteCase(ProjectionMode.QK_ONLY, CompactKVCache, 32, 4, 512, 128, 2048),
    QkvNormRopeWriteCase(ProjectionMode.QKV_FULL, KVCache, 32, 16, 256, 256, 2048),
]


@of_cases(PROLOGUES)
def test_float8_storage(case):
    """The kernel rounds as XLA does: half an ulp, and NaN rather than clamped."""
    arguments = case.arguments()
    cache = arguments[6]._replace(scale=float8_scale(arguments[2]))
    for factor in (1, 1 / 3):  # with a third of the scale large numbers do not fit
        scaled = cache._replace(
            **{name: getattr(cache, name).astype(FLOAT8) for name in cache._fields[:2]},
            scale=cache.scale * factor,
        )
        (_, ours), (_, xla) = (
            case.run([*arguments[:6], scaled], implementation)
            for implementation in ("triton", "xla")
        )
        for name in cache._fields[:2]:
            a, b = (np.asarray(getattr(c, name)).astype(np.float32) for c in (ours, xla))
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
            # float32 results that differ in the last bit may round apart, few of them.
            assert np.mean(~np.isnan(a) & (a != b)) < 1e-4
            # Neighbours differ by up to an eighth, subnormal numbers by 2^-9.
            np.testing.assert_allclose(a, b, rtol=0.13, atol=2**-9)
        if factor == 1:
            assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(ours))


@on_a_gpu
def test_angles_are_as_good_as_float32_gets():
    positions = np.array([0, 1, 511, 65_537, 262_143])
    for theta, d, rotary_dim in ((1e6, 512, 128), (1e4, 256, 256)):
        exact = positions[:, None] * theta ** (-2.0 * np.arange(rotary_dim // 2) / d)
        cos, sin = jax.jit(
            lambda p, t=theta, d=d, r=rotary_dim: rope_cos_sin(p, theta=t, head_dim=d, rotary_dim=r)
        )(jnp.asarray(positions))
        bound = exact * 2.0**-23 + 2.0**-22
        assert np.all(np.abs(cos - np.cos(exact)) <= bound)
        assert np.all(np.abs(sin - np.sin(exact)) <= bound)


@on_a_gpu("qkv_rms_norm")
def test_unwritten_rows_do_not_exist():
    """Every element is written, however the rows divide: NaN in freed memory would show."""
    for tokens in (1, 3, 5, 129, 1025):
        qkv = jax.random.normal(jax.random.key(0), (tokens, 3, 7, 80), jnp.bfloat16)
        poison = [jnp.full((tokens * 3 * 7, 80), jnp.nan, jnp.bfloat16) for _ in range(4)]
        jax.block_until_ready(poison)
        del poison
        outputs = ops.qkv_rms_norm(
            qkv, jnp.ones(80), jnp.ones(80), mode=ProjectionMode.QK_ONLY, implementation="triton"
        )
        assert all(bool(jnp.isfinite(x).all()) for x in outputs)


@of_cases([*(QkvRmsNormCase(mode, 32, 4, 512, 2048) for mode in ProjectionMode), *PROLOGUES])
def test_results_are_bitwise_repeatable(case):
    arguments = case.arguments()
    first = jax.tree.map(np.asarray, case.run(arguments, "triton"))
    for _ in range(20):
        again = jax.tree.map(np.asarray, case.run(arguments, "triton"))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


@on_a_gpu("qkv_norm_rope")
@pytest.mark.parametrize("mode", ProjectionMode)
def test_derivative_of_the_prologue(mode):
    case = QkvNormRopeCase(mode, 8, 2, 256, 64, 6)
    qkv, q_norm, *others = case.arguments(jnp.float32)

    def loss(qkv, q_norm, implementation):
        outputs = case.run([qkv, q_norm, *others], implementation)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    ours, reference = (
        jax.grad(loss, argnums=(0, 1))(qkv, q_norm, implementation)
        for implementation in ("triton", "xla")
    )
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@on_a_gpu("qkv_rms_norm")
@pytest.mark.parametrize("mode", ProjectionMode)
def test_transformations(mode):
    """The derivative and vmap around the real kernel give what they give around the reference."""
    case = QkvRmsNormCase(mode, 8, 2, 256, 6)
    qkv, *scales = case.arguments(jnp.float32)

    def loss(qkv, scales, implementation):
        outputs = case.run([qkv, *scales], implementation)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    results = [
        (
            jax.grad(loss, argnums=(0, 1))(qkv, scales, implementation),
            jax.jvp(lambda x, i=implementation: loss(x, scales, i), (qkv,), (qkv,)),
            jax.vmap(lambda x, i=implementation: loss(x, scales, i))(qkv),
        )
        for implementation in ("triton", "xla")
    ]
    for ours, reference in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


@on_a_gpu("qkv_rms_norm")
def test_exported_program_runs():
    case = QkvRmsNormCase(ProjectionMode.QK_ONLY, 32, 4, 512, 8)
    arguments = case.arguments()
    exported = jax.export.export(
        jax.jit(lambda *a: case.run(a, None)),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    )(*arguments)
    restored = jax.export.deserialize(exported.serialize())
    ours, direct = restored.call(*arguments), case.run(arguments, "triton")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(direct), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@on_a_gpu(*LAYER)
@pytest.mark.parametrize(("model", "layer", "layout", "form"), LAYOUTS_AND_FORMS)
def test_golden_through_the_kernel(model, layer, layout, form):
    y, arrays = run_layer(model, layer, jnp.bfloat16, "triton", layout, form)
    exact = arrays["y_float32"].astype(np.float64)
    ours = y.astype(np.float64) - exact
    theirs = arrays["y_bfloat16"].astype(np.float64) - exact
    assert np.linalg.norm(ours) <= np.linalg.norm(theirs)


@on_a_gpu("qkv_norm_rope_write")
@pytest.mark.parametrize(("model", "layer", "layout", "form"), LAYOUTS_AND_FORMS)
def test_golden_in_float32(model, layer, layout, form):
    with jax.default_matmul_precision("highest"):
        y, arrays = run_layer(model, layer, jnp.float32, "triton", layout, form)
    np.testing.assert_allclose(y, arrays["y_float32"], rtol=0, atol=1e-5)


@on_a_gpu(*LAYER)
@pytest.mark.parametrize(
    ("preset", "layer"), [("gemma-4-e2b", 15), ("gemma-4-31b", 0), ("gemma-4-31b", 5)]
)
def test_decode_of_real_layers_uses_the_kernel(preset, layer):
    config = Gemma4Config.preset(preset)
    for row in decode.decode_layers(config, [layer], batch=4, prompt_len=64, steps=8):
        assert row.passed, row
        assert row.prologue_launches.total() == 1
        assert row.attention_launches.total() in (1, 2)


@on_a_gpu("qkv_norm_rope_write", "decode_attention", slow=True)
@pytest.mark.parametrize("form", [KVCache, CompactKVCache])
def test_ten_thousand_donated_steps_take_no_memory(form):
    config = Gemma4Config.preset("gemma-4-12b")
    attention = Gemma4Attention(config, 5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(attention)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(params, x, positions, cache):
        y, cache = nnx.merge(graph, params)(x, positions, cache)
        return y, positions + 1, cache

    batch, steps = 8, 10_000
    cache = attention.init_cache(Contiguous(batch, steps + 8), form)
    x = jax.random.normal(jax.random.key(0), (batch, 1, config.hidden_size), jnp.bfloat16)
    positions = jnp.zeros((batch, 1), jnp.int32)
    pointers = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)}
    device = jax.devices()[0]
    in_use = None
    for i in range(steps):
        y, positions, cache = step(params, x, positions, cache)
        if i == 8:
            jax.block_until_ready(cache)
            in_use = device.memory_stats()["bytes_in_use"]
    jax.block_until_ready(cache)
    assert device.memory_stats()["bytes_in_use"] <= in_use
    assert {a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)} == pointers
    assert bool(jnp.isfinite(y).all())
    assert bool((jnp.abs(cache.v[:, :steps].astype(jnp.float32)).max(axis=(2, 3)) > 0).all())


@of_cases(tagged(decode_attention.CASES, "real"))
def test_decode_attention_at_real_shapes(case):
    """In bfloat16, next to XLA's error against float32."""
    arguments = case.arguments(poison=(1.0,))
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments
        )
        exact = np.asarray(case.run(wide, "xla"))
    errors = [
        np.linalg.norm(np.asarray(case.run(arguments, which), np.float32) - exact)
        for which in ("triton", "xla")
    ]
    assert errors[0] <= errors[1]
