"""On a real GPU: the whole sweep, real shapes, repeatability, memory, the sanitizer."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode, ops, oracle
from g4attn_jax.commands import check, decode
from tests.test_golden import LAYERS, run_layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", list(check.sweep()), ids=str)
def test_published_sweep(case):
    result = check.judge(case, case.arguments(), "triton")
    assert result.passed, result


def real_shapes():
    specs = {
        config.attention_spec(layer)
        for config in map(Gemma4Config.preset, Gemma4Config.preset_names())
        for layer in range(config.num_hidden_layers)
    }
    return sorted(
        {(s.mode.name, s.num_q_heads, s.num_kv_heads, s.head_dim) for s in specs},
    )


@pytest.mark.parametrize("tokens", [1, 33, 1030])
@pytest.mark.parametrize(("mode", "nq", "nkv", "d"), real_shapes())
def test_real_model_shapes(mode, nq, nkv, d, tokens):
    case = check.Case(ProjectionMode[mode], nq, nkv, d, tokens)
    result = check.judge(case, case.arguments(), "triton")
    assert result.passed, result


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("d", [1, 2, 17, 96, 320, 512])
@pytest.mark.parametrize("mode", ProjectionMode)
def test_odd_shapes_and_dtypes(mode, d, dtype):
    case = check.Case(mode, 15, 3, d, 13)
    arguments = case.arguments(dtype)
    outputs = (
        case.run(arguments, "triton"),
        case.expected(arguments, oracle.rms_norm),
        case.expected(arguments, oracle.usual_rms_norm),
    )
    for ours, exact, usual in zip(*map(jax.tree.leaves, outputs), strict=True):
        error, usual_error = oracle.max_error(ours, exact), oracle.max_error(usual, exact)
        assert oracle.no_worse_than(error, usual_error, dtype), (error, usual_error)


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


@pytest.mark.parametrize("mode", ProjectionMode)
def test_results_are_bitwise_repeatable(mode):
    case = check.Case(mode, 32, 4, 512, 2048)
    arguments = case.arguments()
    first = jax.tree.map(np.asarray, case.run(arguments, "triton"))
    for _ in range(20):
        again = jax.tree.map(np.asarray, case.run(arguments, "triton"))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize("mode", ProjectionMode)
def test_transformations(mode):
    """The derivative and vmap around the real kernel give what they give around the reference."""
    case = check.Case(mode, 8, 2, 256, 6)
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


def test_exported_program_runs():
    case = check.Case(ProjectionMode.QK_ONLY, 32, 4, 512, 8)
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


@pytest.mark.parametrize(("model", "layer", "mode"), LAYERS)
def test_golden_through_the_kernel(model, layer, mode):
    y, arrays = run_layer(model, layer, jnp.bfloat16, "triton")
    exact = arrays["y_float32"].astype(np.float64)
    ours = y.astype(np.float64) - exact
    theirs = arrays["y_bfloat16"].astype(np.float64) - exact
    assert np.linalg.norm(ours) <= np.linalg.norm(theirs)


@pytest.mark.parametrize(("model", "layer", "mode"), LAYERS)
def test_golden_in_float32(model, layer, mode):
    with jax.default_matmul_precision("highest"):
        y, arrays = run_layer(model, layer, jnp.float32, "triton")
    np.testing.assert_allclose(y, arrays["y_float32"], rtol=0, atol=1e-5)


def test_decode_of_real_layers_uses_the_kernel():
    for preset, layers in (("gemma-4-e2b", [15]), ("gemma-4-31b", [0, 5])):
        config = Gemma4Config.preset(preset)
        for row in decode.decode_layers(config, layers, batch=4, prompt_len=64, steps=8):
            assert row.passed, row
            assert row.norm_launches == 1


def test_thousand_donated_steps_take_no_memory():
    config = Gemma4Config.preset("gemma-4-12b")
    attention = Gemma4Attention(config, 5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(attention)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(params, x, positions, cache):
        y, cache = nnx.merge(graph, params)(x, positions, cache)
        return y, positions + 1, cache

    batch, steps = 8, 1000
    cache = attention.init_cache(batch, steps + 8)
    x = jax.random.normal(jax.random.key(0), (batch, 1, config.hidden_size), jnp.bfloat16)
    positions = jnp.zeros((batch, 1), jnp.int32)
    pointers = {a.unsafe_buffer_pointer() for a in cache}
    device = jax.devices()[0]
    in_use = None
    for i in range(steps):
        y, positions, cache = step(params, x, positions, cache)
        if i == 8:
            jax.block_until_ready(cache)
            in_use = device.memory_stats()["bytes_in_use"]
    jax.block_until_ready(cache)
    assert device.memory_stats()["bytes_in_use"] <= in_use
    assert {a.unsafe_buffer_pointer() for a in cache} == pointers
    assert bool(jnp.isfinite(y).all())
    assert bool((jnp.abs(cache.k[:, :steps].astype(jnp.float32)).max(axis=(2, 3)) > 0).all())


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_clean(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # JAX's own start-up calls may fail where a driver lacks a feature; only kernels count here.
    command += ["--report-api-errors", "no", "--kernel-regex", "kernel_substring=head_norm"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.sanitizer_program"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "RACECHECK SUMMARY: 0" in result.stdout
    assert "launched 24" in result.stdout
