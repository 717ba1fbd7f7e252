"""Prefill attention on a real GPU: real shapes, cuDNN or the kernel, long prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import profiler

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache
from g4attn_jax.ops.decode_attention import reference as dense
from g4attn_jax.ops.prefill_attention import cudnn
from g4attn_jax.ops.prefill_attention.cases import CASES

pytestmark = pytest.mark.gpu("prefill_attention")

ROTARY = 128


def arguments(
    batch, tokens, capacity, nkv, group, d, *, form=KVCache, page_size=None, dtype=jnp.bfloat16
):
    """q, cache and page table of random numbers; positions are the caller's."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    shape, table = (batch, capacity, nkv), None
    if page_size is not None:
        pages = batch * capacity // page_size
        shape = (pages, page_size, nkv)
        table = jax.random.permutation(keys[3], pages).astype(jnp.int32).reshape(batch, -1)
    v = jax.random.normal(keys[0], (*shape, d), dtype)
    k = jax.random.normal(keys[1], (*shape, ROTARY if form is CompactKVCache else d), dtype)
    width = d + ROTARY if form is CompactKVCache else d
    q = jax.random.normal(keys[2], (batch, tokens, nkv * group, width), dtype) * d**-0.5
    cache = CompactKVCache(v, k) if form is CompactKVCache else KVCache(k, v)
    return q.astype(dtype), cache, table


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens == 700], ids=str)
def test_real_shapes(case):
    """A chunk after 500 tokens, next to the error of XLA in bfloat16 on a whole score matrix."""
    q, cache, table, positions = case.arguments(poison=(1.0,))

    def run(q, cache, implementation):
        return case.run([q, cache, table, positions], implementation)

    with jax.default_matmul_precision("highest"):
        exact = run(*jax.tree.map(lambda x: x.astype(jnp.float32), (q, cache)), "xla")
    constants = {"sliding_window": case.sliding_window, "scale": 1.0, "num_splits": None}
    usual = jax.jit(
        lambda q, cache: dense.decode_attention(q, cache, table, positions, **constants)
    )(q, cache)
    ours = run(q, cache, "triton")
    errors = [np.linalg.norm(np.asarray(o - exact, np.float32)) for o in (ours, usual)]
    assert errors[0] <= errors[1]
    np.testing.assert_array_equal(ours, run(q, cache, "triton"))


@pytest.mark.parametrize("form", [KVCache, CompactKVCache])
def test_float8(form):
    """As good as XLA on the same bytes."""
    q, cache, table = arguments(1, 700, 1024, 4, 8, 512, form=form, page_size=64)
    scale = jnp.array([0.02, 0.03])
    arrays = {
        name: (array / 0.02).astype(FLOAT8)
        for name, array in zip(cache._fields, cache[:2], strict=False)
    }
    cache = cache._replace(**arrays, scale=scale)
    positions = 100 + jnp.arange(700, dtype=jnp.int32)[None]
    with jax.default_matmul_precision("highest"):
        exact = ops.prefill_attention(
            q.astype(jnp.float32), cache, table, positions, implementation="xla"
        )
    ours, usual = (
        ops.prefill_attention(q, cache, table, positions, implementation=which)
        for which in ("triton", "xla")
    )
    errors = [np.linalg.norm(np.asarray(o - exact, np.float32)) for o in (ours, usual)]
    assert errors[0] <= 1.05 * errors[1]


TOKENS, CAPACITY = 4100, 5120


def positions_of(*lengths):
    token = np.arange(TOKENS)
    return np.array([np.where(token < n, token, -1) for n in lengths], np.int32)


CHOICES = {
    # positions, where behind the tokens NaN begins, whether cuDNN runs
    "from position 0": (positions_of(TOKENS, TOKENS), None, True),
    "padded": (positions_of(700, TOKENS), None, True),
    "a sequence of no tokens": (positions_of(0, 1000), None, True),
    "no tokens at all": (positions_of(0, 0), None, True),
    "padding in front": (positions_of(700, TOKENS)[:, ::-1], None, False),
    "a later chunk": (positions_of(TOKENS, TOKENS) + 500, None, False),
    "NaN right behind": (positions_of(700, TOKENS), 0, False),
    "NaN out of a tile's reach": (positions_of(700, TOKENS), 256, True),
}


def kernels_of(f, *arguments):
    """The kernels that a program has run."""
    _, kernels = profiler.measure(f, aggregate=False)(*arguments)
    return {name for name, _ in kernels}


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("name", CHOICES)
def test_cudnn_for_prompts_from_position_0(name, window):
    positions, poison, by_cudnn = CHOICES[name]
    positions = jnp.asarray(positions)
    q, cache, _ = arguments(2, TOKENS, CAPACITY, 4, 2, 256)
    assert cudnn.refusal(q, cache, None, sliding_window=window, scale=1.0) is None
    if poison is not None:
        length = (positions >= 0).sum(axis=1)[:, None]
        held = jnp.arange(CAPACITY) < length + poison
        cache = jax.tree.map(lambda x: jnp.where(held[..., None, None], x, jnp.nan), cache)

    def run(q, cache, positions, implementation=None):
        return ops.prefill_attention(
            q, cache, None, positions, sliding_window=window, implementation=implementation
        )

    # Not by the kernels' names: of a CUDA graph the profiler lists those of all branches.
    assert bool(cudnn.starts_at_0(cache, positions)) == by_cudnn
    o = jax.jit(run)(q, cache, positions)
    expected = run(q, cache, positions, "triton")
    np.testing.assert_allclose(
        np.asarray(o, np.float32), np.asarray(expected, np.float32), atol=1e-2
    )
    np.testing.assert_array_equal(np.asarray(o)[np.asarray(positions) < 0], 0)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, TOKENS, CAPACITY, 4, 8, 512), {}),
        ((1, TOKENS, CAPACITY, 4, 8, 256), {"form": CompactKVCache}),
        ((1, TOKENS, CAPACITY, 4, 8, 256), {"page_size": 64}),
        ((1, TOKENS, CAPACITY, 4, 8, 256), {"dtype": jnp.float32}),
        ((1, TOKENS, TOKENS - 12, 4, 8, 256), {}),  # a ring of fewer slots than tokens
        ((1, 100, CAPACITY, 4, 8, 256), {}),
    ],
)
def test_the_kernel_for_what_cudnn_does_not_take(sizes, options):
    q, cache, table = arguments(*sizes, **options)
    refusal = cudnn.refusal(q, cache, table, sliding_window=None, scale=1.0)
    assert refusal is not None or not cudnn.is_faster(q)
    positions = jnp.arange(sizes[1], dtype=jnp.int32)[None]
    positions = jnp.where(positions < sizes[2], positions, -1)
    assert kernels_of(ops.prefill_attention, q, cache, table, positions) == {"prefill_attention"}


def test_each_of_a_batch_chooses_under_vmap():
    q, cache, _ = arguments(2, TOKENS, CAPACITY, 4, 2, 256)
    positions = jnp.asarray(positions_of(TOKENS, TOKENS)) + jnp.array([[0], [400]])

    def run(q, cache, positions, implementation=None):
        return ops.prefill_attention(
            q[None],
            jax.tree.map(lambda x: x[None], cache),
            None,
            positions[None],
            implementation=implementation,
        )[0]

    o = jax.jit(jax.vmap(run))(q, cache, positions)
    for b in range(2):
        one = jax.tree.map(lambda x, b=b: x[b], (q, cache, positions))
        np.testing.assert_allclose(
            np.asarray(o[b], np.float32), np.asarray(run(*one, "triton"), np.float32), atol=1e-2
        )


def test_derivative_where_cudnn_runs():
    """Derivatives are those of the formula."""
    q, cache, _ = arguments(1, TOKENS, TOKENS, 2, 2, 64)
    positions = jnp.asarray(positions_of(TOKENS))

    def loss(q, cache, implementation):
        o = ops.prefill_attention(q, cache, None, positions, implementation=implementation)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)))

    ours, expected = (
        jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(q, cache, which)
        for which in (None, "xla")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("nkv", "group", "d", "window", "form"),
    [
        (4, 8, 512, None, KVCache),
        (4, 8, 512, None, CompactKVCache),
        (16, 2, 256, 1024, KVCache),
    ],
)
def test_a_prompt_of_32768_tokens(nkv, group, d, window, form):
    """31B's layers; a score matrix of 32 heads would take 64 GiB in bfloat16."""
    tokens = 32768
    q, cache, _ = arguments(1, tokens, tokens, nkv, group, d, form=form)
    positions = jnp.arange(tokens, dtype=jnp.int32)[None]

    def run(q, cache, positions):
        return ops.prefill_attention(q, cache, None, positions, sliding_window=window)

    compiled = jax.jit(run).lower(q, cache, positions).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
    o = compiled(q, cache, positions)
    last = ops.decode_attention(
        q[:, -4:], cache, None, positions[:, -4:], sliding_window=window, implementation="xla"
    )
    np.testing.assert_allclose(
        np.asarray(o[:, -4:], np.float32), np.asarray(last, np.float32), atol=1e-2
    )
