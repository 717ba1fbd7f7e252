import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS, triton
from g4attn_jax.ops.decode_attention.cases import CASES, NOT_FINITE, DecodeAttentionCase
from g4attn_jax.ops.decode_attention.triton import choose_launch
from g4attn_jax.ops.flash_attention.launch import LEAST, AttentionLaunch, HeadSizes, launch_refusal
from g4attn_jax.ops.flash_attention.operands import AttentionShape
from g4attn_jax.ops.flash_attention.triton_rows import slots
from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.prefill_attention.triton import choose_launch as choose_prefill_launch
from g4attn_jax.testing.case import tagged
from g4attn_jax.testing.oracle import cached_attention as formula
from tests.everyday import everyday, everyday_cases
from tests.ops.kernel import kernel_of

KERNEL = kernel_of("decode_attention")
on_both = pytest.mark.parametrize("implementation", ["xla", *KERNEL])
on_the_kernel = pytest.mark.parametrize("implementation", KERNEL)


def case(
    last,
    tokens=1,
    num_kv_heads=2,
    group=2,
    head_dim=16,
    compact=False,
    pages=None,
    capacity=None,
    dtype=jnp.float32,
    storage=None,
    poison=NOT_FINITE,
    rotary=8,
    page_size=16,
):
    """q, cache, page table and positions; slots of positions that no sequence has hold poison.

    Args:
        last: the newest position of each sequence, -1 for none.
        pages: pages of a sequence, of `page_size`; None is one of `capacity`.
    """
    of = DecodeAttentionCase(
        CompactKVCache if compact else KVCache,
        num_kv_heads * group,
        num_kv_heads,
        head_dim,
        tokens,
        tuple(last),
        capacity if pages is None else pages * page_size,
        rotary_dim=rotary,
        page_size=None if pages is None else page_size,
        storage=None if storage is None else jnp.dtype(storage).name,
        dtype=jnp.dtype(dtype).name,
    )
    q, *others = of.arguments(seed=len(last) + tokens + head_dim, poison=poison)
    return 0.5 * q.shape[-1] ** 0.5 * q, *others


TILE = 64


@everyday("triton_interpret")
@everyday_cases
@on_both
@pytest.mark.parametrize("case", tagged(CASES, "odd"), ids=str)
def test_against_float64(case, implementation):
    """Slots that no sequence holds are NaN or infinite, where the reference does not mind."""
    poison = NOT_FINITE
    if implementation == "xla" and case.page_size is None and jax.default_backend() == "gpu":
        poison = (1e4,)
    arguments = case.arguments(poison=poison)
    o = case.run(arguments, implementation)
    np.testing.assert_allclose(o, case.exact(arguments), atol=2e-6)
    np.testing.assert_array_equal(np.asarray(o)[case.positions < 0], 0)


@on_both
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_token_without_a_slot_is_nan(implementation, num_splits):
    q, cache, table, positions = case([70, 3], capacity=96, tokens=3, poison=1.0)
    positions = positions.at[0, 1].set(-2).at[1, 2].set(-2)
    o = ops.decode_attention(
        q, cache, table, positions, num_splits=num_splits, implementation=implementation
    )
    exact = formula(q, cache, table, positions)
    assert np.isnan(exact[0, 1]).all() and np.isnan(exact[1, 2]).all()
    np.testing.assert_allclose(o, exact, atol=2e-6)


@on_both
@pytest.mark.parametrize("compact", [False, True])
def test_scale_and_float8(compact, implementation):
    arguments = case(
        [70, 3], capacity=96, compact=compact, storage=FLOAT8, poison=1.0, dtype=jnp.float32
    )
    o = ops.decode_attention(*arguments, scale=0.7, implementation=implementation)
    np.testing.assert_allclose(o, formula(*arguments, scale=0.7), atol=2e-6)


@everyday("True-bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compact", [False, True])
def test_half_precision_is_no_worse_than_xla(compact, dtype, implementation):
    """0.69 to 0.88 of its error: XLA rounds the weights after it divided by their sum."""
    arguments = case([400, 300], capacity=512, compact=compact, dtype=dtype, head_dim=64, poison=1)
    exact = formula(*arguments)
    errors = []
    for which in (implementation, "xla"):
        o = ops.decode_attention(*arguments, implementation=which)
        errors.append(np.asarray(o, np.float64) - exact)
    ours, theirs = map(np.linalg.norm, errors)
    assert ours <= theirs


@everyday()
@on_the_kernel
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ({"capacity": 512}, None),
        ({"pages": 32}, None),
        ({"pages": 32}, 100),
        ({"capacity": 128}, 100),
        ({"capacity": 24}, 20),  # a ring of less than a tile
    ],
    ids=str,
)
def test_splits_agree(sizes, window, implementation):
    arguments = case([500, 3, 77], **sizes)
    exact = formula(*arguments, sliding_window=window)
    for splits in (1, 2, 3, 8, 64):
        o = ops.decode_attention(
            *arguments, sliding_window=window, num_splits=splits, implementation=implementation
        )
        np.testing.assert_allclose(o, exact, atol=2e-6)


@everyday("63-ring", "1-paged")
@on_the_kernel
@pytest.mark.parametrize(
    "sizes",
    [{"capacity": 256}, {"capacity": 96}, {"pages": 12}],
    ids=["contiguous", "ring", "paged"],
)
@pytest.mark.parametrize("oldest", [0, 1, TILE - 1, TILE, TILE + 1])
def test_windows_begin_anywhere_in_a_tile(oldest, sizes, implementation):
    """And what lies beside them is NaN."""
    window = 70
    q, cache, table, positions = case([oldest + window - 1], **sizes)
    place = np.arange(oldest, oldest + window) % sizes.get("capacity", 12 * 16)
    page = 0 if table is None else np.asarray(table)[0, place // 16]
    seen = np.zeros(cache.v.shape[:2], bool)
    seen[page, place if table is None else place % 16] = True
    cache = jax.tree.map(lambda a: jnp.where(seen[..., None, None], a, jnp.nan), cache)
    o = ops.decode_attention(
        q, cache, table, positions, sliding_window=window, implementation=implementation
    )
    exact = formula(q, cache, table, positions, sliding_window=window)
    assert np.isfinite(exact).all()
    np.testing.assert_allclose(o, exact, atol=2e-6)


@everyday("3-{'pages': 8}")
@on_the_kernel
@pytest.mark.parametrize(
    "sizes",
    [
        {"capacity": 128},
        {"pages": 8},
        # Programs of 64 rows have a tile even if there is none for their split.
        {"capacity": 128, "tokens": 16, "group": 4, "dtype": jnp.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_splits", [1, 3, 256])
def test_the_last_positions_of_int32(num_splits, sizes, implementation):
    """Tiles go past them; here without the 2^31 tokens before."""
    q, cache, table, positions = case([383], **{"tokens": 3} | sizes)
    near, far = (
        jax.jit(
            lambda positions: ops.decode_attention(
                q,
                cache,
                table,
                positions,
                sliding_window=50,
                num_splits=num_splits,
                implementation=implementation,
            )
        )(positions + shift)
        for shift in (0, 2**31 - 384)
    )
    assert np.isfinite(near).all()
    np.testing.assert_allclose(far, near, atol=2e-6)


@pytest.mark.parametrize("page_size", [16, 24, 64])
@pytest.mark.parametrize("page", [None, 1])
def test_no_slot_is_outside_the_cache(page, page_size):
    """Positions past the largest of int32 too, which a tile may have, have slots inside."""
    sizes = AttentionShape(
        tokens=1,
        num_kv_heads=1,
        group=1,
        head_dim=16,
        num_pages=2,
        page_size=page_size,
        columns=1,
    )
    # The last two have wrapped around; tiles of pages begin at multiples of their size.
    firsts = (0, 64, 2**31 - 64, -(2**31), 64 - 2**31)
    for first in firsts if page is not None else (*firsts, 40, 2**31 - 1, 7 - 2**31):
        slot, _ = slots(sizes, 1, page, jnp.int32(first), 64, jnp.ones(64, bool), aligned=False)
        assert ((page_size <= slot) & (slot < 2 * page_size)).all()


@everyday("{'pages': 5}-launch0-False", "{'capacity': 80}-launch1-True")
@on_the_kernel
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "launch",
    [
        AttentionLaunch(16, 16, 3, 2, num_warps=4, num_stages=2),
        AttentionLaunch(64, 32, 2, 2, num_warps=4, num_stages=3),
        AttentionLaunch(64, 64, 1, 1, num_warps=8, num_stages=2),
        AttentionLaunch(64, 16, 8, 1, num_warps=8, num_stages=2),  # more splits than tiles
        AttentionLaunch(16, 64, 2, 1, num_warps=4, num_stages=3),
    ],
)
@pytest.mark.parametrize("sizes", [{"pages": 5}, {"capacity": 80}, {"capacity": 48}], ids=str)
def test_any_launch(sizes, launch, compact, implementation):
    if compact:
        launch = launch._replace(value_blocks=1)
    arguments = case([70, 3, -1], tokens=6, group=4, compact=compact, **sizes)
    o = triton.decode_attention(
        *arguments,
        sliding_window=20,
        scale=1.0,
        num_splits=None,
        launch=launch,
        interpret=implementation == "triton_interpret",
    )
    np.testing.assert_allclose(o, formula(*arguments, sliding_window=20), atol=2e-6)


@everyday("7")
@on_both
@pytest.mark.parametrize("tokens", range(1, MAX_DECODE_TOKENS + 1))
def test_every_number_of_tokens(tokens, implementation):
    arguments = case([40, tokens - 1], pages=3, tokens=tokens)
    o = ops.decode_attention(*arguments, sliding_window=30, implementation=implementation)
    np.testing.assert_allclose(o, formula(*arguments, sliding_window=30), atol=2e-6)


@on_the_kernel
def test_a_sequence_does_not_depend_on_its_batch(implementation):
    """To the last bit, at one number of splits."""
    q, cache, table, positions = case([70, 3, 79], pages=5, tokens=3)
    together = ops.decode_attention(
        q, cache, table, positions, num_splits=3, implementation=implementation
    )
    for b in range(3):
        alone = ops.decode_attention(
            q[b : b + 1],
            cache,
            table[b : b + 1],
            positions[b : b + 1],
            num_splits=3,
            implementation=implementation,
        )
        np.testing.assert_array_equal(alone[0], together[b])


@on_the_kernel
def test_no_page_is_not_read(implementation):
    """A hole in the table, and at run time a page outside the cache, are as if nothing was."""
    q, cache, table, positions = case([70], pages=5)
    for page in (-1, cache.v.shape[0], 2**30, -5):
        holed = table.at[0, 1].set(page)
        o = jax.jit(
            lambda t: ops.decode_attention(q, cache, t, positions, implementation=implementation)
        )(holed)
        with jax.default_matmul_precision("highest"):
            expected = ops.decode_attention(
                q, cache, table.at[0, 1].set(-1), positions, implementation="xla"
            )
        assert np.isfinite(o).all()
        np.testing.assert_allclose(o, expected, atol=2e-6)


@everyday("True-None-triton_interpret")
@on_both
@pytest.mark.parametrize("storage", [None, FLOAT8])
@pytest.mark.parametrize("compact", [False, True])
def test_vmap(compact, storage, implementation):
    """Over queries, caches and positions: as if each were alone."""
    cases = [
        case(last, capacity=48, compact=compact, storage=storage, poison=1.0)
        for last in ([20, 3], [7, 47], [-1, 30])
    ]

    def run(q, cache, positions):
        return ops.decode_attention(q, cache, None, positions, implementation=implementation)

    singles = [(q, cache, positions) for q, cache, _, positions in cases]
    batched = jax.vmap(run)(*jax.tree.map(lambda *x: jnp.stack(x), *singles))
    for o, single in zip(batched, singles, strict=True):
        np.testing.assert_allclose(o, run(*single), atol=2e-6)


@on_both
def test_gradients_are_the_formulas(implementation):
    q, cache, table, positions = case([20, 7], capacity=24, tokens=2, poison=0.0)
    weights = np.random.default_rng(0).normal(size=(2, 2, 4, 16))

    def loss(q, k, v):
        o = ops.decode_attention(q, KVCache(k, v), table, positions, implementation=implementation)
        return jnp.sum(o * weights)

    exact = [np.asarray(a, np.float64) for a in (q, cache.k, cache.v)]
    with jax.default_matmul_precision("highest"):
        gradients = jax.grad(loss, argnums=(0, 1, 2))(q, cache.k, cache.v)
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(i).normal(size=exact[i].shape)
        ahead, behind = (
            np.sum(
                weights
                * formula(
                    *_moved(exact, i, sign * 1e-6 * direction), positions=positions, page_table=None
                )
            )
            for sign in (1, -1)
        )
        slope = (ahead - behind) / 2e-6
        assert np.sum(np.asarray(gradient) * direction) == pytest.approx(slope, rel=1e-4)


def _moved(arrays, i, change):
    q, k, v = (a + change if j == i else a for j, a in enumerate(arrays))
    return q, KVCache(k, v)


H200, A100, B200 = Gpu(9.0, 132, 232_448), Gpu(8.0, 108, 166_912), Gpu(10.0, 148, 232_448)
GPUS = H200, A100, B200, Gpu(8.6, 84, 101_376)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_launches_are_ones_that_fit(gpu):
    """Powers of two, and a tile being read, one on its way and the queries in shared memory."""
    for head_dim, rows, compact, batch in itertools.product(
        (64, 256, 320, 512), (1, 16, 48, 256), (False, True), (1, 8, 64)
    ):
        launch = choose_launch(
            gpu,
            HeadSizes((head_dim, 128), None, 2, 2)
            if compact
            else HeadSizes((head_dim,), head_dim, 2, 2),
            batch=batch,
            num_kv_heads=4,
            rows=rows,
            max_keys=8192,
        )
        for number in (launch.block_rows, launch.block_keys, launch.value_blocks):
            assert number & (number - 1) == 0
        assert 1 <= launch.num_splits <= 8192 // launch.block_keys
        padded = pad(head_dim)
        width = padded + (128 if compact else padded // launch.value_blocks)
        tiles = 2 * launch.block_keys * width * (launch.num_stages - 1)
        assert tiles + 2 * launch.block_rows * (padded + 128 * compact) < gpu.shared_memory


def test_one_program_for_every_multiprocessor():
    """At the sizes of the models, and no more than keys to share."""

    def splits(batch, num_kv_heads, max_keys, gpu=H200):
        return choose_launch(
            gpu,
            HeadSizes((512,), 512, 2, 2),
            batch=batch,
            num_kv_heads=num_kv_heads,
            rows=8,
            max_keys=max_keys,
        ).num_splits

    assert splits(8, 4, 8192) == 4
    assert splits(32, 4, 8192) == splits(64, 16, 1024) == 1
    assert splits(8, 1, 32768) == 16
    assert splits(1, 4, 32768) in (32, 33)
    assert splits(1, 1, 16) == 1
    assert 20 <= splits(1, 4, 32768, A100) <= 27
    assert splits(1, 1, 2**20) <= 256


def test_tiles_of_narrow_heads():
    """Small where an H200 holds all programs so, more than two a multiprocessor."""

    def keys(batch):
        return choose_launch(
            H200,
            HeadSizes((256,), 256, 2, 2),
            batch=batch,
            num_kv_heads=16,
            rows=2,
            max_keys=1024,
        ).block_keys

    assert [keys(batch) for batch in (1, 8, 24, 32, 48)] == [32, 32, 32, 16, 64]


@pytest.mark.parametrize("op", [ops.decode_attention, ops.prefill_attention])
def test_heads_that_a_gpu_does_not_hold_go_to_xla(op):
    """float32 queries of 512 over float8 take more than 99 KiB; the interpreter has no limit."""
    arguments = case([20, 3], capacity=32, head_dim=512, storage=FLOAT8)
    if jax.default_backend() == "cpu":
        assert "more shared memory than the 101376 bytes" in launch_refusal(*arguments[:2])
    exact = formula(*arguments)
    for implementation in (None, "triton_interpret"):
        o = op(*arguments, implementation=implementation)
        np.testing.assert_allclose(o, exact, atol=1e-5)


def described(name):
    return jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice(name, 58, "gpu")
    )


@pytest.mark.parametrize("op", [ops.decode_attention, ops.prefill_attention])
def test_a_kernel_that_the_gpu_does_not_hold_is_refused(op):
    arguments = case([20, 3], capacity=32, head_dim=512, storage=FLOAT8)
    run = functools.partial(op, implementation="triton")
    with jax.sharding.use_abstract_mesh(described("NVIDIA H200")):
        jax.eval_shape(run, *arguments)
    with jax.sharding.use_abstract_mesh(described("NVIDIA L4")):
        with pytest.raises(NotImplementedError, match="shared memory than the 101376 bytes"):
            jax.eval_shape(run, *arguments)


@pytest.mark.parametrize("op", [ops.decode_attention, ops.prefill_attention])
def test_a_symbolic_head_dim_is_exported(op):
    """With what the chosen launch needs of it unknown, to XLA."""
    [d] = jax.export.symbolic_shape("d")
    cache = jax.ShapeDtypeStruct((2, 32, 2, d), jnp.float32)
    q, positions = jax.ShapeDtypeStruct((2, 1, 4, d), jnp.float32), jnp.array([[20], [3]])
    exported = jax.export.export(jax.jit(lambda q, cache: op(q, cache, None, positions)))(
        q, KVCache(cache, cache)
    )
    arguments = case([20, 3], capacity=32)
    o = exported.call(*arguments[:2])
    np.testing.assert_allclose(o, formula(*arguments), atol=2e-6)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_no_launch_needs_less_memory_than_the_least(gpu):
    """So that one which fits is chosen wherever there is one."""
    for head_dim, compact, q_bytes, cache_bytes in itertools.product(
        (16, 320, 512, 1024), (False, True), (2, 4), (1, 2, 4)
    ):
        widths, value = ((head_dim, 128), None) if compact else ((head_dim,), head_dim)
        sizes = HeadSizes(widths, value, q_bytes, cache_bytes)
        chosen = [choose_prefill_launch(gpu, sizes)]
        for rows in (1, 48):
            chosen.append(
                choose_launch(gpu, sizes, batch=8, num_kv_heads=4, rows=rows, max_keys=8192)
            )
        for launch in chosen:
            assert sizes.fits(gpu, launch) == sizes.fits(gpu, LEAST)


ZEROS = jnp.zeros((13, 16, 2, 16))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": jnp.zeros((2, 17, 4, 16))}, r"q has shape"),
            ({"q": jnp.zeros((2, 1, 5, 16))}, "Nq a multiple of 2, the cache's KV heads"),
            ({"q": jnp.zeros((2, 1, 4, 24))}, "q has 24 numbers a head"),
            ({"q": jnp.zeros((2, 4, 16))}, r"q has shape \(2, 4, 16\)"),
            ({"cache": None}, "cache is a NoneType"),
            ({"cache": KVCache(*jnp.zeros((2, 10, 16, 2, 16), int))}, "cache.k .* dtype int32"),
            (
                {"positions": np.zeros((2, 1), np.int64)},
                "positions has dtype int64",
            ),
            ({"positions": jnp.zeros(2, jnp.int32)}, r"positions has shape \(2,\)"),
            ({"positions": jnp.full((2, 1), 80)}, r"positions has 80"),
            ({"positions": jnp.full((2, 1), -3)}, "positions has -3"),
            ({"page_table": jnp.full((2, 5), 13)}, r"page_table has 13"),
            ({"page_table": jnp.full((2, 5), -2)}, "page_table has -2"),
            ({"page_table": jnp.zeros((3, 5), jnp.int32)}, r"page_table has shape \(3, 5\)"),
            ({"page_table": None}, "page_table is None and .* accepted .* 2 pages"),
            ({"cache": KVCache(ZEROS, ZEROS[..., :8])}, r"cache\.k has shape .*; accepted: \("),
            ({"cache": KVCache(ZEROS[:, :8], ZEROS[:, :8])}, "page_size is 8"),
            ({"sliding_window": 0}, "sliding_window is 0"),
            ({"sliding_window": 2**31}, "sliding_window is 2147483648"),
            ({"num_splits": 0}, "num_splits is 0"),
            ({"num_splits": 257}, "num_splits is 257"),
            ({"scale": float("nan")}, "scale is nan"),
            ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ],
    )
    def test_refused(self, change, message):
        names = "q", "cache", "page_table", "positions"
        arguments = dict(zip(names, case([70, 3], pages=5), strict=True))
        with pytest.raises(ValueError, match=message):
            ops.decode_attention(**(arguments | change))
