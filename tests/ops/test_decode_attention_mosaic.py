"""The kernel for several tokens on Hopper: in JAX's interpreter of Mosaic GPU, and on a GPU."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops
from g4attn_jax.cache import FLOAT8, CompactKVCache, KVCache
from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, entry_opcodes
from g4attn_jax.testing.oracle import cached_attention as formula
from tests.ops.test_decode_attention import case

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic GPU of JAX 0.10 has other names", allow_module_level=True)

from g4attn_jax.ops.decode_attention import mosaic, mosaic_kernel, mosaic_limits
from tests.everyday import everyday

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in matmul:RuntimeWarning"  # of NaN in unwritten slots
)
struct = jax.ShapeDtypeStruct
H200 = Gpu(9.0, 132, 227 * 1024)
on_the_kernel = pytest.mark.parametrize(
    "where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu("decode_attention"))]
)
in_the_interpreter = pytest.mark.parametrize("where", ["interpreter"])


@pytest.fixture
def attend(where):
    """`decode_attention` by the kernel: (q, cache, page_table, positions, num_splits)."""
    if where == "gpu":
        if jax.devices("cuda")[0].compute_capability != "9.0":
            pytest.skip("the kernel is for compute capability 9.0")
        return functools.partial(ops.decode_attention, implementation="mosaic_gpu")

    def interpreted(*arguments, num_splits=None, scale=1.0):
        return ops.decode_attention(
            *arguments, scale=scale, num_splits=num_splits, implementation="mosaic_gpu_interpret"
        )

    return interpreted


def step(last, tokens=6, group=8, **sizes):
    """Like `case`, of sizes that the kernel takes."""
    sizes = {"num_kv_heads": 1, "dtype": jnp.bfloat16, "rotary": 128, "page_size": 64} | sizes
    q, *others = case(last, tokens, group=group, head_dim=512, **sizes)
    return q * 512**-0.5, *others


def error(o, arguments):
    """Error of the output against the formula in float64, by norms."""
    exact = formula(*arguments)
    return np.linalg.norm(np.asarray(o, np.float64) - exact) / np.linalg.norm(exact)


@everyday("last0-3-8-True-sizes0-3", "last2-4-16-False-sizes1-1")
@in_the_interpreter  # on a GPU tests/gpu/tables.py has these sizes
@pytest.mark.parametrize(
    ("sizes", "num_splits"), [({"capacity": 128}, 3), ({"pages": 1, "page_size": 128}, 1)]
)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("last", "tokens", "group"),
    [([64, -1], 3, 8), ([127, 62], 8, 8), ([63, 1], 4, 16), ([127, 70], 9, 8), ([64, 3], 6, 16)],
)
def test_against_float64(last, tokens, group, compact, sizes, num_splits, attend):
    """Around the edges of tiles, empty, full; slots that no sequence holds are not finite."""
    arguments = step(last, tokens, group, compact=compact, **sizes)
    o = attend(*arguments, num_splits=num_splits)
    assert error(o, arguments) < 3e-3  # of weights and outputs in bfloat16
    np.testing.assert_array_equal(np.asarray(o)[np.asarray(arguments[3]) < 0], 0)


@everyday("True-bfloat16")
@on_the_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compact", [False, True])
def test_is_no_worse_than_xla(compact, dtype, attend):
    arguments = step([100], compact=compact, capacity=128, dtype=dtype, poison=1)
    theirs = ops.decode_attention(*arguments, implementation="xla")
    assert error(attend(*arguments), arguments) <= error(theirs, arguments)


@everyday()
@on_the_kernel
@pytest.mark.parametrize(("scale", "of_queries"), [(0.7, 1), (-0.7, 1), (1.0, 30)])
def test_scale_and_sharp_weights(scale, of_queries, attend):
    """Other scales, also below 0; scores so far apart that the largest has all the weight."""
    q, *others = step([150], capacity=192)
    arguments = q * of_queries, *others
    o = attend(*arguments, scale=scale)
    exact = formula(*arguments, scale=scale)
    assert np.linalg.norm(np.asarray(o, np.float64) - exact) < 3e-3 * np.linalg.norm(exact)


@everyday()
@on_the_kernel
@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_token_without_a_slot_is_nan(num_splits, attend):
    q, cache, table, positions = step([70, 3], capacity=128, poison=1.0)
    positions = positions.at[0, 1].set(-2).at[1, 2].set(-2)
    o = np.asarray(attend(q, cache, table, positions, num_splits=num_splits), np.float64)
    exact = formula(q, cache, table, positions)
    assert np.isnan(exact[0, 1]).all() and np.isnan(exact[1, 2]).all()
    np.testing.assert_allclose(o, exact, atol=3e-3 * np.nanmax(abs(exact)))


@everyday()
@on_the_kernel
def test_a_sequence_does_not_depend_on_its_batch(attend):
    """To the last bit, at one number of splits."""
    q, cache, table, positions = step([100, 3], pages=2, compact=True)
    attend = functools.partial(attend, num_splits=2)
    together = attend(q, cache, table, positions)
    for b in range(2):
        alone = attend(q[b : b + 1], cache, table[b : b + 1], positions[b : b + 1])
        np.testing.assert_array_equal(alone[0], together[b])


@everyday()
@on_the_kernel
@pytest.mark.parametrize(("compact", "page"), [(False, -1), (False, 5), (True, 2**30), (True, -5)])
def test_no_page_is_as_if_nothing_was(compact, page, attend):
    """A hole in the table, and at run time a page outside the cache."""
    q, cache, table, positions = step([100], pages=2, compact=compact)
    assert len(cache.v) == 5
    o = jax.jit(attend)(q, cache, table.at[0, 0].set(page), positions)
    exactly = jax.tree.map(lambda x: x.astype(jnp.float32), (q, cache))
    with jax.default_matmul_precision("highest"):
        expected = ops.decode_attention(
            *exactly, table.at[0, 0].set(-1), positions, implementation="xla"
        )
    o, expected = (np.asarray(x, np.float64) for x in (o, expected))
    assert np.linalg.norm(o - expected) < 3e-3 * np.linalg.norm(expected)


@everyday()
@on_the_kernel
def test_vmap(attend):
    """As if each were alone."""
    singles = [step(last, capacity=64) for last in ([20], [63])]
    batched = jax.vmap(lambda q, cache, positions: attend(q, cache, None, positions))(
        *jax.tree.map(lambda *x: jnp.stack(x), *[(q, c, p) for q, c, _, p in singles])
    )
    for o, single in zip(batched, singles, strict=True):
        np.testing.assert_array_equal(o, attend(*single))


@everyday()
@pytest.mark.parametrize("tokens", [6, 9])
@pytest.mark.parametrize("compact", [False, True])
def test_warpgroups_wait_for_each_other(compact, tokens, monkeypatch):
    """By the interpreter's race detector: no access that another's does not happen before."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    arguments = step([650], tokens, compact=compact, capacity=704)
    interpreter = functools.partial(mosaic.mg.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(mosaic.mg, "InterpretGPUParams", interpreter)
    o = mosaic.decode_attention(
        *arguments, sliding_window=None, scale=1.0, num_splits=1, interpret=True
    )
    assert error(o, arguments) < 3e-3
    assert not gpu_callbacks.get_races().races_found


def test_a_copy_that_tma_does_not_take_is_refused_when_traced():
    """A token of log_sum is 32 bytes of 8 heads; on a GPU a copy from the second is a fault."""
    sizes = SimpleNamespace(shape=SimpleNamespace(tokens=9, group=8), interpret=False)
    inputs = SimpleNamespace(q=struct((18, 8, 512), jnp.bfloat16))
    program = mosaic_kernel._Program(inputs, None, sizes, 0, 0, 0, 0)
    log_sum = SimpleNamespace(shape=(8, 8), dtype=jnp.float32)
    with pytest.raises(AssertionError):
        program.copies(None, 0, (), log_sum, 4, begin=1)


def verify_step(dtype=jnp.bfloat16, form=KVCache, tokens=6, group=8, head_dim=512, **other):
    """Shapes of arguments that the kernel takes, unless they are changed."""
    page_size, rotary = other.get("page_size", 64), other.get("rotary", 128)
    storage = other.get("storage", dtype)
    widths = (head_dim, rotary) if form is CompactKVCache else (head_dim, head_dim)
    scale = struct((2,), jnp.float32) if storage == FLOAT8 else None
    pages, table = (40, page_size), struct((5, 8), jnp.int32)
    if not other.get("paged", True):
        pages, table = (5, 8 * page_size), None
    cache = form(*(struct((*pages, 4, width), storage) for width in widths), scale)
    width = head_dim + rotary * (form is CompactKVCache)
    q = struct((5, tokens, 4 * group, width), dtype)
    return q, cache, table, struct((5, tokens), jnp.int32)


def refusal(monkeypatch, compute_capability=9.0, window=None, **sizes):
    gpu = H200._replace(compute_capability=compute_capability)
    monkeypatch.setattr(mosaic_limits, "gpu", lambda: gpu)
    return mosaic_limits.refusal(*verify_step(**sizes), sliding_window=window, interpret=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"form": CompactKVCache},
        {"dtype": jnp.float16},
        {"tokens": 3},
        {"tokens": 8},
        {"tokens": 9},
        {"tokens": 1, "group": 32},
        {"tokens": 2, "group": 64},
        {"tokens": 16, "form": CompactKVCache},
        {"tokens": 7, "group": 16},
        {"tokens": 2, "group": 16},
        {"tokens": 4, "group": 16},
        {"page_size": 256, "paged": False},
    ],
    ids=str,
)
def test_takes(sizes, monkeypatch):
    assert refusal(monkeypatch, **sizes) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_capability": 8.0}, "compute capability 8.0; accepted: 9.0"),
        ({"compute_capability": 10.0}, "compute capability 10.0; accepted: 9.0"),
        ({"window": 1024}, "sliding_window is 1024"),
        ({"dtype": jnp.float32}, "q is float32 and the cache float32"),
        ({"storage": FLOAT8}, "q is bfloat16 and the cache float8_e4m3fn"),
        ({"head_dim": 256}, "heads have 256 numbers and 0 rotated ones"),
        ({"form": CompactKVCache, "rotary": 64}, "64 rotated ones apart; accepted: 512 and 0 or"),
        ({"form": CompactKVCache, "rotary": 384}, "384 rotated ones apart; accepted: 512 and 0"),
        ({"tokens": 2}, "2 tokens have 8 query heads a KV head"),
        ({"tokens": 9, "group": 16}, "in all 17 to 128"),
        ({"tokens": 3, "group": 64}, "at most 64 of half of the tokens, rounded up"),
        ({"tokens": 6, "group": 4}, "accepted: 8, 16, 32 or 64 heads"),
        ({"tokens": 1, "group": 24}, "accepted: 8, 16, 32 or 64 heads"),
        ({"page_size": 48}, "pages have 48 slots; accepted: a multiple of 64"),
    ],
    ids=str,
)
def test_refuses(change, message, monkeypatch):
    assert message in refusal(monkeypatch, **change)


def test_a_demand_is_refused_by_name():
    arguments = step([20], tokens=1, pages=1)
    with pytest.raises(NotImplementedError, match="implementation 'mosaic_gpu' does not run"):
        ops.decode_attention(*arguments, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"accepted: None, .*'mosaic_gpu'"):
        ops.decode_attention(*arguments, implementation="mosaic")


def test_an_older_jax_is_refused(monkeypatch):
    arguments = step([20], pages=1)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"accepted: 0\.11 or later"):
        ops.decode_attention(*arguments, implementation="mosaic_gpu")


@everyday("mosaic_gpu-CompactKVCache-True-4-16-1")
@pytest.mark.skipif(gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable()))
@pytest.mark.parametrize(
    ("form", "paged", "tokens", "group", "num_splits"),
    [
        (KVCache, True, 6, 8, 3),
        (KVCache, False, 3, 8, 1),
        (CompactKVCache, False, 8, 8, 3),
        (CompactKVCache, True, 4, 16, 1),
        (KVCache, True, 16, 8, 3),
        (CompactKVCache, False, 5, 16, 3),
        (CompactKVCache, False, 2, 64, 3),
    ],
)
@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
def test_compiles_to_one_launch(form, paged, tokens, group, num_splits, implementation):
    """It fits in the shared memory, and nothing is gathered, copied or transposed for it."""
    run = functools.partial(
        ops.decode_attention, num_splits=num_splits, implementation=implementation
    )
    arguments = verify_step(form=form, paged=paged, tokens=tokens, group=group)
    compiled = gpu_target.compile_for("9.0", run, *arguments)
    opcodes = entry_opcodes(compiled)
    assert set(opcodes) - FREE_OPCODES == {"custom-call"}
    assert opcodes["custom-call"] == (1 if num_splits == 1 else 2)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 1
