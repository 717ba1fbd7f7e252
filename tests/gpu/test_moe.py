"""The mixture of experts on a real GPU at the sizes of 26B-A4B."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Gemma4Config, ops
from g4attn_jax.model import Gemma4MoE, ModuleOptions
from g4attn_jax.ops.moe_combine import cases as moe_combine
from g4attn_jax.ops.router import cases as router
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged

pytestmark = pytest.mark.gpu("grouped_matmul", "grouped_gated_matmul")

CONFIG = Gemma4Config.preset("gemma-4-26b-a4b")
EMBED, WIDTH = CONFIG.hidden_size, CONFIG.moe_intermediate_size
AROUND = tagged((*router.CASES, *moe_combine.CASES), "real")
EXPERTS, TOP_K = CONFIG.num_experts, CONFIG.top_k_experts


@functools.lru_cache(maxsize=1)  # of 1.4 GiB in bfloat16
@functools.partial(jax.jit, static_argnums=0)  # without a copy for every operation
def matrices(dtype):
    keys = jax.random.split(jax.random.key(0))
    gate_up = jax.random.normal(keys[0], (EXPERTS, EMBED, 2, WIDTH), dtype) * EMBED**-0.5
    down = jax.random.normal(keys[1], (EXPERTS, WIDTH, EMBED), dtype) * WIDTH**-0.5
    return gate_up.astype(dtype), down.astype(dtype)


def routed(tokens, dtype):
    """x, rows and group sizes of tokens that each take 8 random experts."""
    rng = np.random.default_rng(tokens)
    experts = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
    rows = np.argsort(experts.ravel(), kind="stable").astype(np.int32) // TOP_K
    sizes = np.bincount(experts.ravel(), minlength=EXPERTS).astype(np.int32)
    x = jax.random.normal(jax.random.key(tokens), (tokens, EMBED), dtype)
    return x, jnp.asarray(rows), jnp.asarray(sizes)


@pytest.mark.parametrize("tokens", [1, 8, 32, 300, 1030])
def test_real_sizes(tokens):
    """Against float64, next to the error of rounding both products."""
    gate_up, down = matrices(jnp.bfloat16)
    x, rows, sizes = routed(tokens, jnp.bfloat16)
    gated = ops.grouped_gated_matmul(x, gate_up, sizes, rows, implementation="triton")
    exact = oracle.grouped_gated_matmul(x, np.asarray(gate_up), sizes, rows)
    usual = oracle.usual_grouped_gated_matmul(x, np.asarray(gate_up), sizes, rows)
    errors = [np.linalg.norm(np.asarray(y).astype(np.float64) - exact) for y in (gated, usual)]
    assert errors[0] < 0.8 * errors[1]

    y = ops.grouped_matmul(gated, down, sizes, implementation="triton")
    exact = oracle.grouped_matmul(gated, np.asarray(down), sizes)
    half_ulp = 2.0**-8 * np.exp2(np.floor(np.log2(np.abs(exact))))
    assert (np.abs(np.asarray(y).astype(np.float64) - exact) <= half_ulp + 2e-5).all()
    again = ops.grouped_matmul(gated, down, sizes, implementation="triton")
    np.testing.assert_array_equal(y, again)


def test_float32_sizes():
    """Against float64: K products summed one after another are off by sqrt(K) 2^-24 or less."""
    gate_up, _ = matrices(jnp.float32)
    x, rows, sizes = routed(8, jnp.float32)
    gated = ops.grouped_gated_matmul(x, gate_up, sizes, rows, implementation="triton")
    exact = oracle.grouped_gated_matmul(x, np.asarray(gate_up), sizes, rows)
    error = np.linalg.norm(np.asarray(gated) - exact)
    assert error <= EMBED**0.5 * 2.0**-24 * np.linalg.norm(exact)


@pytest.mark.gpu("router", "moe_combine")
@pytest.mark.parametrize("case", AROUND, ids=str)
def test_real_sizes_of_what_is_around(case):
    """Integers as in float64, numbers no worse than the usual path's; twice the same."""
    arguments = case.arguments()
    y = case.run(arguments, "triton")
    jax.tree.map(np.testing.assert_array_equal, y, case.run(arguments, "triton"))
    exact, usual = case.exact(arguments), case.usual(arguments)
    if case.op == "moe_combine":  # a sum next to a tie may be stored as the other neighbour
        norms = [oracle.rms_norm(y[0], scale, eps=1e-6) for scale in arguments[-2]]
        exact, usual = (exact[0], norms), (usual[0], [n.astype(y[0].dtype) for n in norms])
    outputs = case.result(y), exact, usual
    for ours, exact, usual in zip(*map(jax.tree.leaves, outputs), strict=True):
        if np.issubdtype(ours.dtype, np.integer):
            np.testing.assert_array_equal(ours, exact)
            continue
        errors = case.error(ours, exact), case.error(usual, exact)
        assert oracle.no_worse_than(*errors, ours.dtype, oracle.largest(exact)), errors


@pytest.mark.gpu("router")
@pytest.mark.parametrize("tokens", [1, 32, 1030])
def test_the_module(tokens):
    """Next to the same in float32: no worse than XLA's ragged_dot in bfloat16.

    Of 32 experts, as XLA has copies of all in float32.
    """
    config = dataclasses.replace(CONFIG, num_experts=32)
    x, h = jax.random.normal(jax.random.key(0), (2, tokens, 1, EMBED), jnp.bfloat16)

    def run(implementation, dtype):
        moe = Gemma4MoE(config, ModuleOptions(nnx.Rngs(0), dtype, dtype, implementation))
        bf16 = Gemma4MoE(config, ModuleOptions(nnx.Rngs(0)))
        nnx.update(moe, jax.tree.map(lambda w: w.astype(dtype), nnx.state(bf16)))
        graph, params = nnx.split(moe)
        with jax.default_matmul_precision("highest"):
            y = jax.jit(lambda p, x, h: nnx.merge(graph, p)(x, h))(params, x, h.astype(dtype))
        return np.asarray(y).astype(np.float64)

    exact = run("triton", jnp.float32)
    ours, usual = run("triton", jnp.bfloat16), run("xla", jnp.bfloat16) if tokens <= 32 else None
    error = np.linalg.norm(ours - exact)
    assert error < 1e-2 * np.linalg.norm(exact)
    if usual is not None:
        assert error <= np.linalg.norm(usual - exact)
