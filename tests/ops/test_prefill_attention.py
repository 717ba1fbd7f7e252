import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, KVCache
from g4attn_jax.ops.decode_attention import reference as dense
from g4attn_jax.ops.decode_attention.cases import NOT_FINITE
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch, HeadSizes
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.prefill_attention import _by_cudnn, cudnn, reference, triton
from g4attn_jax.ops.prefill_attention.cases import CASES
from g4attn_jax.ops.prefill_attention.triton import choose_launch
from g4attn_jax.testing.case import tagged
from g4attn_jax.testing.oracle import cached_attention as formula
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of
from tests.ops.test_decode_attention import GPUS, case, described

KERNEL = kernel_of("prefill_attention")
on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)


def close(o, exact, positions):
    np.testing.assert_allclose(o, exact, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(o)[np.asarray(positions) < 0], 0)


@everyday("{'sliding_window': 9}")
@on_both
@pytest.mark.parametrize("sizes", [{"compact": True}, {"pages": 6}, {"sliding_window": 9}], ids=str)
def test_a_token_without_a_slot_is_nan(sizes, implementation):
    window = sizes.get("sliding_window")
    sizes = {name: size for name, size in sizes.items() if name != "sliding_window"}
    q, cache, table, positions = case([70, 33], capacity=96, tokens=17, **sizes)
    positions = positions.at[0, 3].set(-2).at[1, 16].set(-2).at[1, 0].set(-1)
    o = ops.prefill_attention(
        q, cache, table, positions, sliding_window=window, implementation=implementation
    )
    exact = formula(q, cache, table, positions, sliding_window=window)
    assert np.isnan(exact[0, 3]).all() and np.isnan(exact[1, 16]).all()
    np.testing.assert_allclose(o, exact, atol=2e-6)


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", [c for c in tagged(CASES, "odd") if c.tokens <= 70], ids=str)
def test_against_float64(case, implementation):
    """Slots that no sequence holds are not finite."""
    arguments = case.arguments(poison=NOT_FINITE)
    close(case.run(arguments, implementation), case.exact(arguments), case.positions)


@everyday("300-sizes1")
@pytest.mark.parametrize("sizes", [{"capacity": 1200}, {"pages": 75}])
@pytest.mark.parametrize("window", [None, 300, 600])
def test_many_blocks_of_the_reference(sizes, window):
    """Neither tokens nor slots are a multiple of a block, and many blocks see nothing."""
    arguments = case([1150, 290], tokens=300, num_kv_heads=1, poison=np.inf, **sizes)
    o = ops.prefill_attention(*arguments, sliding_window=window, implementation="xla")
    close(o, formula(*arguments, sliding_window=window), arguments[3])


@everyday("True")
@on_both
@pytest.mark.parametrize("compact", [False, True])
def test_scale_and_float8(compact, implementation):
    arguments = case([40, 3], capacity=48, tokens=17, compact=compact, storage=FLOAT8, poison=1.0)
    for scale in (0.7, -0.7):
        o = ops.prefill_attention(*arguments, scale=scale, implementation=implementation)
        close(o, formula(*arguments, scale=scale), arguments[3])


@on_both
def test_the_last_positions_of_int32(implementation):
    """A ring has slots for them; here without the 2^31 tokens before."""
    q, cache, _, positions = case([300], capacity=64, tokens=20)
    far = positions + (2**31 - 2 - 300) // 64 * 64
    near, far = (
        ops.prefill_attention(q, cache, None, p, sliding_window=40, implementation=implementation)
        for p in (positions, far)
    )
    np.testing.assert_allclose(far, near, atol=2e-6)


@on_both
def test_padding_anywhere(implementation):
    q, cache, table, positions = case([70, 40], pages=5, tokens=33)
    holes = np.random.default_rng(0).random(positions.shape) < 0.4
    positions = jnp.where(holes, -1, positions)
    q = jnp.where(holes[..., None, None], jnp.nan, q)
    o = ops.prefill_attention(q, cache, table, positions, implementation=implementation)
    close(o, formula(q, cache, table, positions), positions)


@everyday()
@on_both
@pytest.mark.parametrize("window", [None, 20])
def test_chunks_equal_one_prompt(window, implementation):
    """Each sees what the cache holds of those before; what comes after it does not."""
    q, cache, table, positions = case([69, 69], pages=5, tokens=70)
    run = functools.partial(
        ops.prefill_attention, sliding_window=window, implementation=implementation
    )
    whole = run(q, cache, table, positions)
    for start, stop in ((0, 32), (32, 65), (65, 70)):
        part = run(q[:, start:stop], cache, table, positions[:, start:stop])
        np.testing.assert_allclose(part, whole[:, start:stop], atol=2e-6)


@everyday("triton_interpret")
@on_both
def test_decode_attention_of_the_last_tokens(implementation):
    q, cache, table, positions = case([69, 30], pages=5, tokens=33)
    o = ops.prefill_attention(q, cache, table, positions, implementation=implementation)
    few = ops.decode_attention(
        q[:, -4:], cache, table, positions[:, -4:], implementation=implementation
    )
    np.testing.assert_allclose(o[:, -4:], few, atol=2e-6)


@everyday("triton_interpret")
@on_both
def test_no_page_is_not_read(implementation):
    """A hole in the table, and at run time a page outside the cache, are as if nothing was."""
    q, cache, table, positions = case([70], pages=5, tokens=17)

    @jax.jit
    def run(table):
        return ops.prefill_attention(q, cache, table, positions, implementation=implementation)

    constants = {"sliding_window": None, "scale": 1.0, "num_splits": None}
    with jax.default_matmul_precision("highest"):
        expected = dense.decode_attention(q, cache, table.at[0, 1].set(-1), positions, **constants)
    for page in (-1, cache.v.shape[0], 2**30, -5):
        np.testing.assert_allclose(run(table.at[0, 1].set(page)), expected, atol=2e-6)
    np.testing.assert_array_equal(run(jnp.full_like(table, -1)), 0)


@everyday("True-bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compact", [False, True])
def test_half_precision_is_no_worse_than_xla(compact, dtype, implementation):
    """XLA on a score for every slot, which rounds the weights after it divided by their sum."""
    arguments = case([150, 100], tokens=40, capacity=160, compact=compact, dtype=dtype, poison=1)
    exact = formula(*arguments)
    usual = dense.decode_attention(*arguments, sliding_window=None, scale=1.0, num_splits=None)
    ours = ops.prefill_attention(*arguments, implementation=implementation)
    errors = [np.linalg.norm(np.asarray(o, np.float64) - exact) for o in (ours, usual)]
    assert errors[0] <= errors[1]


@everyday("triton_interpret")
@on_both
def test_a_sequence_does_not_depend_on_its_batch(implementation):
    """To the last bit in the kernel; XLA's products of a batch may differ from those of one."""
    q, cache, table, positions = case([70, 3, 79], pages=5, tokens=17)
    run = functools.partial(ops.prefill_attention, implementation=implementation)
    together = run(q, cache, table, positions)
    for b in range(3):
        one = slice(b, b + 1)
        alone = run(q[one], cache, table[one], positions[one])
        tolerance = 2e-6 if implementation == "xla" else 0
        np.testing.assert_allclose(alone[0], together[b], rtol=0, atol=tolerance)


@everyday("None-triton_interpret")
@on_both
@pytest.mark.parametrize("storage", [None, FLOAT8])
def test_jit_and_vmap(storage, implementation):
    """Over queries, caches and positions: as if each were alone."""
    cases = [
        case(last, capacity=48, tokens=17, storage=storage, poison=1.0)
        for last in ([20, 3], [7, 47], [-1, 30])
    ]

    def run(q, cache, positions):
        return ops.prefill_attention(q, cache, None, positions, implementation=implementation)

    singles = [(q, cache, positions) for q, cache, _, positions in cases]
    batched = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *x: jnp.stack(x), *singles))
    for o, single in zip(batched, singles, strict=True):
        np.testing.assert_allclose(o, run(*single), atol=2e-6)


@everyday()
@on_both
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ({"last": [20, 7], "tokens": 17, "capacity": 24}, None),
        ({"last": [39, 30], "tokens": 33, "pages": 3}, 9),
        ({"last": [39], "tokens": 17, "pages": 3, "compact": True}, None),
    ],
)
def test_derivatives_are_those_of_a_dense_softmax(sizes, window, implementation):
    """Forward and reverse, with NaN and infinity in the slots that nobody holds."""
    q, cache, table, positions = case(**sizes)
    finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), cache)

    def run(q, cache):
        return ops.prefill_attention(
            q, cache, table, positions, sliding_window=window, implementation=implementation
        )

    def run_dense(q, cache):
        return dense.decode_attention(
            q, cache, table, positions, sliding_window=window, scale=1.0, num_splits=None
        )

    def derivatives(f, q, cache, finite):
        o, pullback = jax.vjp(f, q, cache)
        weights = jnp.asarray(np.random.default_rng(0).normal(size=o.shape), o.dtype)
        tangents = jax.tree.map(jnp.ones_like, (q, finite))
        return jax.tree.leaves((pullback(weights), jax.jvp(f, (q, finite), tangents)[1]))

    with jax.default_matmul_precision("highest"):
        ours = derivatives(run, q, cache, finite)
    # On a CPU: cuBLAS has no products of float64 with float32 sums, which the formula asks for.
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        q, finite = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (q, finite))
        exact = derivatives(run_dense, q, finite, finite)
    for a, b in zip(ours, exact, strict=True):
        # Sums of float32: their error grows with what is summed.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@everyday()
def test_derivative_over_many_blocks():
    q, cache, table, positions = case([1150], tokens=300, num_kv_heads=1, capacity=1200, poison=0)
    constants = {"sliding_window": 600, "scale": 1.0}

    def loss(q, cache, attend, **static):
        return jnp.sum(jnp.sin(attend(q, cache, table, positions, **constants, **static)))

    grad = jax.grad(loss, argnums=(0, 1))
    ours = grad(q, cache, reference.prefill_attention)
    exact = grad(q, cache, dense.decode_attention, num_splits=None)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@everyday()
@pytest.mark.parametrize("paged", [False, True])
def test_no_score_matrix(paged):
    """Neither forward nor in the derivative: 4096 by 4096 float32 scores of 4 heads are 256 MiB."""
    tokens, heads, head_dim = 4096, 4, 64
    shape = (tokens // 64, 64) if paged else (1, tokens)
    q = jax.ShapeDtypeStruct((1, tokens, heads, head_dim), jnp.float32)
    array = jax.ShapeDtypeStruct((*shape, 1, head_dim), jnp.float32)
    table = jax.ShapeDtypeStruct((1, tokens // 64), jnp.int32) if paged else None
    positions = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def run(q, cache, table, positions):
        return ops.prefill_attention(q, cache, table, positions, implementation="xla")

    def loss(*arguments):
        return run(*arguments).sum()

    for f, limit in ((run, 16 * 2**20), (jax.grad(loss, argnums=(0, 1)), 64 * 2**20)):
        compiled = jax.jit(f).lower(q, KVCache(array, array), table, positions).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < limit


@everyday("launch0-True", "launch2-False")
@on_the_kernel
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "launch",
    [
        AttentionLaunch(16, 32, 1, 1, num_warps=4, num_stages=2),
        AttentionLaunch(64, 16, 1, 2, num_warps=4, num_stages=3),
        AttentionLaunch(64, 16, 1, 1, num_warps=8, num_stages=3),
        AttentionLaunch(128, 16, 1, 2, num_warps=8, num_stages=2),
    ],
)
def test_any_launch(launch, compact, implementation):
    if compact:
        launch = launch._replace(value_blocks=1)
    arguments = case([70, 3, -1], pages=5, tokens=33, compact=compact)
    o = triton.prefill_attention(
        *arguments,
        sliding_window=20,
        scale=1.0,
        launch=launch,
        interpret=implementation == "triton_interpret",
    )
    close(o, formula(*arguments, sliding_window=20), arguments[3])


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_launches_are_ones_that_fit(gpu):
    """Powers of two, and a tile and queries within the shared memory that there is."""
    for head_dim, compact, q_bytes in itertools.product((64, 256, 320, 512), (False, True), (2, 4)):
        key_widths = (head_dim, 128) if compact else (head_dim,)
        sizes = HeadSizes(key_widths, None if compact else head_dim, q_bytes, q_bytes)
        launch = choose_launch(gpu, sizes)
        for number in launch:
            assert number & (number - 1) == 0 or number == launch.num_stages
        of_keys = sum(map(pad, key_widths))
        width = of_keys + (0 if compact else pad(head_dim) // launch.value_blocks)
        tiles = (launch.num_stages - 1) * launch.block_keys * width
        queries = launch.block_rows * of_keys
        assert (tiles + queries) * q_bytes < gpu.shared_memory


def lengths(*tokens):
    token = np.arange(20)
    return np.array([np.where(token < n, token, -1) for n in tokens], np.int32)


@everyday("None-positions7-255-False", "6-positions0-None-True")
@pytest.mark.parametrize(
    ("positions", "poison", "by_cudnn"),
    [
        (lengths(20, 20), None, True),
        (lengths(20, 7), None, True),
        (lengths(0, 20), None, True),
        (lengths(20, 7)[:, ::-1], None, False),
        (lengths(20, 20) + 1, None, False),
        (np.zeros((2, 20), np.int32), None, False),
        (lengths(20, 7), 0, False),
        (lengths(20, 7), 255, False),
        (lengths(20, 7), 256, True),
    ],
)
@pytest.mark.parametrize("window", [None, 6])
def test_when_cudnn_is_chosen(positions, poison, by_cudnn, window, monkeypatch):
    """Here XLA stands in for it, on one tile of keys; NaN begins `poison` slots behind."""

    def attend(q, cache, *, sliding_window, scale):
        return jax.nn.dot_product_attention(
            q,
            cache.k[:, :256],
            cache.v[:, :256],
            scale=scale,
            is_causal=True,
            local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        )

    monkeypatch.setattr(cudnn, "_attend", attend)
    q, cache, _, _ = case([399, 399], tokens=20, capacity=400)
    if poison is not None:
        held = np.arange(400) < (positions >= 0).sum(axis=1)[:, None] + poison
        cache = jax.tree.map(lambda x: jnp.where(held[..., None, None], x, jnp.nan), cache)

    def kernel(q, cache, positions):
        return jnp.full_like(q, 7)

    o = cudnn.prefill_attention_or(
        kernel, q, cache, jnp.asarray(positions), sliding_window=window, scale=1.0
    )
    if by_cudnn:
        close(o, formula(q, cache, None, positions, sliding_window=window), positions)
    else:
        np.testing.assert_array_equal(o, 7.0)


@pytest.mark.parametrize(("gpu", "kernels"), [("NVIDIA H200", 1), ("NVIDIA L4", 0)])
def test_what_runs_where_cudnn_does_not(gpu, kernels, monkeypatch):
    """The kernel, or XLA where the shared memory does not hold it."""

    def otherwise(run, q, cache, positions, **constants):
        return run(q, cache, positions)

    monkeypatch.setattr(cudnn, "prefill_attention_or", otherwise)
    arguments = case([20, 3], capacity=32, head_dim=512, storage=FLOAT8)
    run = functools.partial(_by_cudnn, interpret=False, sliding_window=None, scale=1.0)
    with jax.sharding.use_abstract_mesh(described(gpu)):
        jaxpr = jax.make_jaxpr(run)(*arguments)
    assert str(jaxpr).count("pallas_call") == kernels


class TestBadInput:
    """Refusals that `decode_attention` does not have too, which are in its tests."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": jnp.zeros((2, 0, 4, 16))}, "q has shape .* may be 0"),
            ({"q": jnp.zeros((2, 17, 5, 16))}, "T of 1 or more and Nq a multiple of 2, the cache"),
            ({"q": jnp.zeros((2, 17, 4, 24))}, "q has 24 numbers a head"),
            ({"cache": None}, "cache is a NoneType"),
            ({"positions": jnp.full((2, 17), 80)}, r"positions has 80"),
            ({"page_table": jnp.full((2, 5), 13)}, r"page_table has 13"),
            ({"page_table": None}, "page_table is None and .* accepted .* 2 pages"),
            ({"sliding_window": 0}, "sliding_window is 0"),
            ({"scale": float("inf")}, "scale is inf"),
            ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ],
    )
    def test_refused(self, change, message):
        names = "q", "cache", "page_table", "positions"
        arguments = dict(zip(names, case([70, 30], pages=5, tokens=17), strict=True))
        with pytest.raises(ValueError, match=message):
            ops.prefill_attention(**(arguments | change))
