"""Products of few tokens and a weight, against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.config import Gemma4Config
from g4attn_jax.ops.gpu import Gpu, gpu_refusal
from g4attn_jax.ops.linear.cases import CASES, GegluCase, weights_of
from g4attn_jax.ops.linear.launch import (
    choose_launch,
    choose_logits_launch,
    choose_num_partial_sums,
    geglu_is_faster,
)
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("linear")

on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)
# Edges of tiles and of the blocks of columns.
ODD = tagged(CASES, "odd")
WEIGHTS = [
    weight
    for model in Gemma4Config.preset_names()
    for name, weight in weights_of(Gemma4Config.preset(model)).items()
    if name != "logits"
]

EPS = 2.0**-24


def case(tokens, k, *n, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (tokens, 1, k), dtype)
    return x, (jax.random.normal(keys[1], (k, *n)) * k**-0.5).astype(dtype)


exact, gelu = oracle.linear, oracle.gelu


def close(y, truth, error):
    """Asserts that y is within a norm `error` of the truth, and no number ten times as far off.

    Sums of K products of random numbers in float32, whatever their order, are off by sqrt(K) 2^-24
    of their norm or less: each of K roundings by half an ulp of a part of the sum, as often up as
    down.
    """
    off = np.asarray(y, np.float64) - truth
    assert np.linalg.norm(off) <= error
    assert np.abs(off).max() <= 10 * error / truth.size**0.5


def rms(x):
    return np.sqrt(np.mean(x**2))


@everyday_cases
@on_both
@pytest.mark.parametrize("case", [c for c in ODD if not isinstance(c, GegluCase)], ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    with jax.default_matmul_precision("highest"):
        y = case.result(case.run(arguments, implementation))
    truth = case.exact(arguments)
    close(y, truth, case.depth**0.5 * EPS * np.linalg.norm(truth))


def test_xla_makes_one_part():
    assert len(ops.linear_partial_sums(*case(4, 2048, 640), implementation="xla")) == 1


@everyday_cases
@on_both
@pytest.mark.parametrize("case", [c for c in ODD if isinstance(c, GegluCase)], ids=str)
def test_geglu_against_float64(case, implementation):
    x, w = case.arguments()
    gate, up = np.moveaxis(exact(x, w), -2, 0)
    with jax.default_matmul_precision("highest"):
        y = case.run([x, w], implementation)
    # gelu is nowhere steeper than 1.13, and the rest takes four roundings of the result.
    truth = gelu(gate) * up
    of_sums = 1.13 * rms(gate) * np.linalg.norm(up) + rms(up) * np.linalg.norm(gelu(gate))
    close(y, truth, EPS * (case.depth**0.5 * of_sums + 4 * np.linalg.norm(truth)))


@everyday("bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_one_rounding(dtype, implementation):
    """Within half an ulp, and what float32 sums of K numbers may be off by."""
    x, w = case(8, 700, 200, dtype=dtype)
    y = np.asarray(ops.linear(x, w, implementation=implementation)).astype(np.float64)
    truth = exact(x, w)
    half_ulp = 2.0 ** np.floor(np.log2(np.abs(truth))) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(y - truth) <= half_ulp + 2e-5).all()
    gated = case(8, 700, 2, 200, dtype=dtype)
    gate, up = np.moveaxis(exact(*gated), -2, 0)
    truth = gelu(gate) * up
    errors = [
        np.abs(np.asarray(ops.geglu(*gated, implementation=which)).astype(np.float64) - truth).max()
        for which in (implementation, "xla")
    ]
    assert errors[0] <= errors[1]


@on_the_kernel
def test_partial_sums(implementation):
    """As many as fill a GPU, none of them empty where there are tiles enough."""
    x, w = case(4, 2048, 640)
    partial_sums = ops.linear_partial_sums(x, w, implementation=implementation)
    assert partial_sums.shape == (8, 4, 1, 640) and partial_sums.dtype == jnp.float32
    assert (np.abs(partial_sums).max(axis=(1, 2, 3)) > 0).all()
    wide = jnp.zeros((2048, 64 * 132), x.dtype)
    assert len(ops.linear_partial_sums(x, wide, implementation=implementation)) == 1
    shallow = ops.linear_partial_sums(x[..., :600], w[:600], implementation=implementation)
    assert len(shallow) == 4


@on_both
def test_sums_that_are_not_rounded(implementation):
    """Float32 of bfloat16 operands, with one partial sum too."""
    x, w = case(3, 700, 64 * 132, dtype=jnp.bfloat16)
    rounded, sums = (
        ops.linear_partial_sums(x, w, dtype=dtype, implementation=implementation)
        for dtype in (None, jnp.float32)
    )
    assert len(rounded) == len(sums) == 1
    assert rounded.dtype == jnp.bfloat16 and sums.dtype == jnp.float32
    truth = exact(x, w)
    close(sums[0], truth, 700**0.5 * EPS * np.linalg.norm(truth))


def test_who_gets_what():
    """None takes XLA for many tokens, and the kernel for any number of columns."""

    def runs_kernel(f, x, w, implementation=None):
        jaxpr = jax.make_jaxpr(lambda x, w: f(x, w, implementation=implementation))(x, w)
        return "pallas_call" in str(jaxpr)

    few, many = jnp.zeros((64, 64)), jnp.zeros((65, 64))
    narrow, wide = jnp.zeros((64, 640)), jnp.zeros((64, 64 * 140))
    for f, w in [
        *itertools.product((ops.linear, ops.linear_partial_sums), (narrow, wide)),
        (ops.geglu, wide.reshape(64, 2, -1)),
        (ops.logits, wide.T),
    ]:
        assert runs_kernel(f, few, w)
        assert not runs_kernel(f, few, w, "xla")
        assert not runs_kernel(f, many, w)
    # Nobody adds partial sums of gate and up: of few columns and more than 16 tokens XLA splits K.
    few_columns = wide.reshape(64, 2, -1)[..., : 64 * 40]
    assert runs_kernel(ops.geglu, few, few_columns, "triton_interpret")
    assert runs_kernel(ops.geglu, few[:16], few_columns)
    assert not runs_kernel(ops.geglu, few[:17], few_columns)


@pytest.mark.parametrize("f", [ops.linear_partial_sums, ops.logits])
def test_a_weight_beyond_the_indices_is_xlas(f):
    def size(x, w):
        return f(x, w, implementation="triton_interpret")

    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 2**16), (2**16, 2**15)))
    w = w if f is ops.linear_partial_sums else jax.ShapeDtypeStruct(w.shape[::-1], w.dtype)
    with pytest.raises(NotImplementedError, match=r"has 2147483648 numbers; accepted: fewer"):
        jax.eval_shape(size, x, w)
    assert "pallas_call" not in str(jax.make_jaxpr(f)(x, w))


@on_the_kernel
def test_transformations(implementation):
    x, w = case(4, 96, 160)

    def loss(x, w, implementation=implementation):
        y = ops.add_partial_sums(
            ops.linear_partial_sums(x, w, implementation=implementation), x.dtype
        )
        return jnp.sum(jnp.sin(y))

    with jax.default_matmul_precision("highest"):
        for ours, theirs in zip(
            jax.grad(loss, (0, 1))(x, w), jax.grad(loss, (0, 1))(x, w, "xla"), strict=True
        ):
            # Sums of 160 numbers up to 0.5, and of 4 up to 5, in orders of their own.
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        batched = jax.vmap(lambda x: ops.linear(x, w, implementation=implementation))(x)
        truth = exact(x, w)
        close(batched, truth, 96**0.5 * EPS * np.linalg.norm(truth))


@pytest.mark.parametrize("f", [ops.linear, ops.linear_partial_sums, ops.geglu, ops.logits])
def test_symbolic_numbers_of_tokens(f):
    shape = {ops.geglu: (64, 2, 6400), ops.logits: (6400, 64)}.get(f, (64, 6400))
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 64), jnp.float32)
    exported = jax.export.export(jax.jit(f))(x, jax.ShapeDtypeStruct(shape, jnp.float32))
    x, w = jnp.ones((3, 64)), jnp.ones(shape)
    np.testing.assert_allclose(exported.call(x, w), f(x, w, implementation="xla"), rtol=1e-6)


def test_a_demand_is_checked_for_any_number_of_tokens():
    if gpu_refusal() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(NotImplementedError, match=r"'triton' .* needs an NVIDIA GPU"):
        ops.linear(jnp.zeros((65, 64)), jnp.zeros((64, 64)), implementation="triton")


def test_no_tokens():
    x, w = jnp.zeros((0, 64)), jnp.zeros((64, 640))
    assert ops.linear(x, w, implementation="triton_interpret").shape == (0, 640)
    assert ops.logits(x, w.T, implementation="triton_interpret").shape == (0, 640)


@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024])
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_launches_fit(shared_memory, rows):
    gpu = Gpu(8.6, 132, shared_memory)
    for weight, itemsize in itertools.product(WEIGHTS, (2, 4)):
        launch = launch_of(gpu, rows, weight, itemsize)[0]
        columns = weight.matrices * launch.block_columns
        tile = (max(16, rows) + columns) * launch.block_k * itemsize
        assert launch.num_stages * tile <= shared_memory
        assert launch.block_k >= 16
        logits = choose_logits_launch(gpu, rows=rows, itemsize=itemsize)
        tile = (max(16, rows) + logits.block_columns) * logits.block_k * itemsize
        assert logits.num_stages * tile <= shared_memory


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_programs_fill_the_bus_and_no_more(rows):
    """Programs for half of the multiprocessors or more, and 40 to 128 KiB on their way to each, if
    the weight has so much."""
    gpu = Gpu(9.0, 132, 227 * 1024)
    for weight in WEIGHTS:
        if weight.matrices == 2 and not geglu_is_faster(gpu, rows=17, columns=weight.columns):
            continue
        launch, count = launch_of(gpu, rows, weight, 2)
        programs = count * -(-weight.columns // launch.block_columns)
        tile = launch.block_k * weight.matrices * launch.block_columns * 2
        tiles = weight.depth / (launch.block_k * count)
        if tiles >= launch.num_stages:
            buffers = launch.num_stages - (rows < 64)
            assert programs >= 66, weight
            assert 40 <= programs * buffers * tile / 1024 / 132 <= 128, weight
        assert count == 1 or programs <= (132 if rows != 32 else 184), weight


def launch_of(gpu, rows, weight, itemsize):
    """(launch, number of partial sums) of a weight."""
    count = 1
    if weight.matrices == 1:
        count = choose_num_partial_sums(gpu, rows=rows, k=weight.depth, columns=weight.columns)
    launch = choose_launch(
        gpu,
        rows=rows,
        k=weight.depth,
        columns=weight.columns,
        matrices=weight.matrices,
        num_partial_sums=count,
        itemsize=itemsize,
    )
    return launch, count


@pytest.mark.parametrize(
    ("f", "x", "w", "message"),
    [
        (ops.linear, (2, 8), (9, 4), r"w has shape \(9, 4\)"),
        (ops.linear, (2, 8), (8, 4, 4), r"w has shape \(8, 4, 4\)"),
        (ops.linear, (), (8, 4), r"x has shape \(\)"),
        (ops.linear_partial_sums, (2, 8), (8, 0), r"w has shape \(8, 0\); .* N may not be 0"),
        (ops.geglu, (2, 8), (8, 4), r"w has shape \(8, 4\)"),
        (ops.geglu, (2, 8), (8, 3, 4), r"w has shape \(8, 3, 4\)"),
        (ops.logits, (2, 8), (4, 9), r"table has shape \(4, 9\)"),
    ],
)
def test_refusals(f, x, w, message):
    with pytest.raises(ValueError, match=message):
        f(jnp.zeros(x), jnp.zeros(w))


def test_dtypes_must_agree():
    with pytest.raises(ValueError, match="w has dtype bfloat16"):
        ops.linear(jnp.zeros((2, 8)), jnp.zeros((8, 4), jnp.bfloat16))
    with pytest.raises(ValueError, match="table has dtype bfloat16"):
        ops.logits(jnp.zeros((2, 8)), jnp.zeros((4, 8), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"dtype is dtype.'float16'.; accepted: .*float32"):
        ops.linear_partial_sums(jnp.zeros((2, 8)), jnp.zeros((8, 4)), dtype=jnp.float16)
