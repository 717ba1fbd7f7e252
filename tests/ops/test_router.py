"""Choice of experts, against float64 and `jax.lax.top_k`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.ops.router import MAX_TOKENS, _op
from g4attn_jax.ops.router.cases import CASES
from g4attn_jax.ops.router.triton import choose_launch
from g4attn_jax.testing.case import tagged
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("router")
on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)


def routed(scores, top_k, implementation, dtype=jnp.float32):
    """Routing by given scores [M, X]: a token of one number has them as its products."""
    scores = jnp.asarray(scores, dtype)
    tokens, experts = scores.shape
    # x is a unit vector times sqrt(E), so its norm is itself, and r W one row of W.
    x = jnp.eye(tokens, dtype=dtype) * np.sqrt(tokens)
    ones = jnp.ones(tokens, dtype), scores, jnp.ones(experts, dtype)
    return ops.router(x, *ones, top_k=top_k, eps=0.0, implementation=implementation)


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    arguments = case.arguments()
    routing, exact = case.run(arguments, implementation), case.exact(arguments)
    np.testing.assert_allclose(routing.weights, exact.weights, atol=2e-6)
    for ours, theirs in zip(routing[1:], exact[1:], strict=True):
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, theirs)


@on_both
def test_rows_of_an_expert_are_in_the_order_of_tokens(implementation):
    scores = np.array([[3.0, 2, 1, 0], [0, 3, 2, 1], [3, 0, 1, 2]])
    routing = routed(scores, 2, implementation)
    np.testing.assert_array_equal(routing.experts, [[0, 1], [1, 2], [0, 3]])
    np.testing.assert_array_equal(routing.group_sizes, [2, 2, 1, 1])
    np.testing.assert_array_equal(routing.row_tokens, [0, 2, 0, 1, 1, 2])
    np.testing.assert_array_equal(routing.place, [[0, 2], [3, 4], [1, 5]])


@on_both
@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 2, 2, 1, 2],
        [0.0, 0, 0, 0, 0],
        [-1.0, -2, -1, -3, -2],
        [np.inf, 1, np.inf, -np.inf, 0],
        [-np.inf, -np.inf, -np.inf, 5, -np.inf],
    ],
)
def test_equal_scores_are_as_in_top_k(scores, implementation):
    """The lower expert first; infinities are numbers."""
    _, experts = jax.lax.top_k(jnp.asarray([scores]), 3)
    np.testing.assert_array_equal(routed([scores], 3, implementation).experts, experts)


@on_the_kernel
def test_nan_has_experts_too(implementation):
    """Rows of other tokens are as they were; every row has a place."""
    scores = np.random.default_rng(0).normal(size=(3, 16))
    clean = routed(scores, 4, implementation)
    x = (jnp.eye(3) * np.sqrt(3)).at[1].set(jnp.nan)
    arrays = jnp.ones(3), jnp.asarray(scores, jnp.float32), jnp.ones(16)
    routing = ops.router(x, *arrays, top_k=4, eps=0.0, implementation=implementation)
    for token in (0, 2):
        np.testing.assert_array_equal(routing.experts[token], clean.experts[token])
    assert sorted(np.ravel(routing.place)) == list(range(12))
    assert len(set(np.asarray(routing.experts[1]).tolist())) == 4
    assert int(routing.group_sizes.sum()) == 12


@everyday("3-triton_interpret", "17-triton_interpret")
@on_the_kernel
@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 17, 64])
def test_any_number_of_tokens(implementation, tokens):
    """As the reference, to the last integer, and twice the same."""
    rng = np.random.default_rng(tokens)
    shapes = (tokens, 40), (40,), (40, 20), (20,)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    run = functools.partial(ops.router, *arrays, top_k=3)
    ours, theirs = run(implementation=implementation), run(implementation="xla")
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-6)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(ours, run(implementation=implementation), strict=True):
        np.testing.assert_array_equal(a, b)


@on_both
def test_x64(implementation):
    """Indices stay int32 where JAX makes Python's integers int64."""
    case = tagged(CASES, "odd")[0]
    arguments = case.arguments()
    exact = case.exact(arguments)
    with jax.enable_x64(True):
        routing = case.run(arguments, implementation)
    for ours, theirs in zip(routing[1:], exact[1:], strict=True):
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, theirs)


def test_many_tokens_are_left_to_xla():
    """But not by the interpreter, which takes any number."""
    for count, none, interpreted in (
        (MAX_TOKENS, None, "triton_interpret"),
        (MAX_TOKENS + 1, "xla", "triton_interpret"),
    ):
        assert _op.for_tokens(None, count, most=MAX_TOKENS) == none
        assert _op.for_tokens("triton_interpret", count, most=MAX_TOKENS) == interpreted


@pytest.mark.parametrize("num_sms", [1, 84, 132])
def test_every_row_of_w_is_in_one_part(num_sms):
    """A launch has no more parts than W has blocks, and one part at least."""
    for tokens, depth in itertools.product((1, 4, 5, 8, 9, 64), (1, 64, 65, 2816)):
        launch = choose_launch(num_sms, tokens=tokens, depth=depth)
        assert 1 <= launch.parts <= -(-depth // launch.block_depth)
        assert launch.block_tokens == 1 or launch.block_tokens >= 16


@on_the_kernel
def test_gradients(implementation):
    rng = np.random.default_rng(0)
    shapes = (3, 16), (16,), (16, 6), (6,)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def loss(*arrays, implementation):
        weights = ops.router(*arrays, top_k=2, implementation=implementation).weights
        return jnp.sum(jnp.sin(3 * weights))

    ours, theirs = (
        jax.grad(functools.partial(loss, implementation=name), (0, 1, 2, 3))(*arrays)
        for name in (implementation, "xla")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5)


@on_the_kernel
def test_vmap(implementation):
    rng = np.random.default_rng(0)
    shapes = (2, 3, 16), (16,), (16, 6), (6,)
    x, *arrays = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    run = functools.partial(ops.router, top_k=2, implementation=implementation)
    together = jax.vmap(lambda x: run(x, *arrays))(x)
    for i in range(2):
        for a, b in zip(together, run(x[i], *arrays), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-6)


def test_many_experts_are_refused():
    """The program that sorts would not fit into the shared memory."""
    arguments = jnp.ones((2, 8)), jnp.ones(8), jnp.ones((8, 257)), jnp.ones(257)
    with pytest.raises(NotImplementedError, match="257"):
        ops.router(*arguments, top_k=2, implementation="triton_interpret")
    assert ops.router(*arguments, top_k=2).experts.shape == (2, 2)


def test_no_tokens():
    arrays = jnp.ones((0, 8)), jnp.ones(8), jnp.ones((8, 4)), jnp.ones(4)
    routing = ops.router(*arrays, top_k=2, implementation="triton_interpret")
    assert routing.weights.shape == (0, 2) and routing.row_tokens.shape == (0,)
    np.testing.assert_array_equal(routing.group_sizes, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 7))}, r"scale has shape \(8,\)"),
        ({"w": jnp.zeros((7, 4))}, r"w has shape \(7, 4\)"),
        ({"w": jnp.zeros((8, 4), int)}, "w has dtype int32"),
        ({"per_expert_scale": jnp.zeros(3)}, r"per_expert_scale has shape \(3,\)"),
        ({"top_k": 5}, "top_k is 5; accepted: an integer from 1 to 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_refusals(change, message):
    good = {
        "x": jnp.zeros((3, 8)),
        "scale": jnp.zeros(8),
        "w": jnp.zeros((8, 4)),
        "per_expert_scale": jnp.zeros(4),
        "top_k": 2,
    }
    ops.router(**good)
    with pytest.raises(ValueError, match=message):
        ops.router(**(good | change))
