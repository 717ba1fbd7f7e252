"""Launches kernels on every kind of shape; run under compute-sanitizer by test_sanitizer.py.

python -m tests.gpu.sanitizer_program NAME      one of PROGRAMS
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from g4attn_jax import CompactKVCache, KVCache, ProjectionMode, ops
from g4attn_jax.cache import FLOAT8
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS
from g4attn_jax.ops.decode_attention.cases import DecodeAttentionCase
from g4attn_jax.ops.moe_combine import cases as moe_combine
from g4attn_jax.ops.prefill_attention.cases import PrefillAttentionCase
from g4attn_jax.ops.q_keqv_rms_norm.cases import QKeqvRmsNormCase
from g4attn_jax.ops.qkv_norm_rope.cases import QkvNormRopeCase
from g4attn_jax.ops.qkv_norm_rope_write.cases import QkvNormRopeWriteCase
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
from g4attn_jax.ops.router import cases as router
from g4attn_jax.testing.case import modes_and_forms, tagged
from tests.pairwise import pairwise


def made_on_the_cpu(make):
    """Results of `make`, moved to the device: its many small programs are not for the sanitizer."""

    @functools.wraps(make)
    def wrapped(*arguments):
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.device_put(make(*arguments), jax.devices()[0])

    return wrapped


@made_on_the_cpu
def case_arguments(case):
    """Arguments of the case and, where it writes a cache, of one whose cache is float8."""
    arguments = case.arguments()
    if not isinstance(case, QkvNormRopeWriteCase):
        return [arguments]
    return [arguments, dataclasses.replace(case, storage=FLOAT8.name).arguments()]


@made_on_the_cpu
def attention_arguments(case):
    """A contiguous cache or a ring; float8; pages that are not there."""
    q, cache, table, positions = case.arguments()
    contiguous = jax.tree.map(lambda x: x.reshape(len(q), -1, *x.shape[2:]), cache)
    capacity = contiguous.v.shape[1]
    if case.sliding_window is not None:  # a ring, at the last positions of int32
        turns = (2**31 - 1 - int(positions.max())) // capacity
        far = jnp.where(positions >= 0, positions + turns * capacity, -1)
        contiguous_or_ring = q, contiguous, None, far
    else:
        contiguous_or_ring = q, contiguous, None, positions
    float8 = jax.tree.map(lambda x: x.astype(FLOAT8), cache)._replace(scale=jnp.ones(2))
    wrong = table.at[:, ::3].set(10**6).at[:, 1::3].set(-7)
    return contiguous_or_ring, (q, float8, table, positions), (q, cache, wrong, positions)


def launch_attention(case, implementation="triton"):
    """Other layouts and storage than the cases have, pages that are not there, and splits."""
    arguments = attention_arguments(case)
    # Under jit nobody sees that pages are wrong before the kernel does.
    run = jax.jit(lambda *arguments: case.run(arguments, implementation))
    outputs = list(itertools.starmap(run, arguments))
    if case.tokens <= MAX_DECODE_TOKENS:
        outputs.append(
            ops.decode_attention(
                *arguments[0],
                sliding_window=case.sliding_window,
                num_splits=20,  # more than there are tiles
                implementation=implementation,
            )
        )
    jax.block_until_ready(outputs)
    return len(outputs)


def launch_verification(case):
    """On Hopper by the kernel for several tokens: pages, none, those that are not there."""
    contiguous, _, wrong = attention_arguments(case)
    q, cache, table, positions = wrong
    paged = q, cache, jnp.maximum(table, 0) % cache.v.shape[0], positions
    is_hopper = jax.devices()[0].compute_capability == "9.0"
    implementation = "mosaic_gpu" if is_hopper and jax.__version_info__ >= (0, 11) else "triton"
    run = jax.jit(lambda *arguments: case.run(arguments, implementation))
    jax.block_until_ready([run(*arguments) for arguments in (contiguous, paged, wrong)])
    return 3


@made_on_the_cpu
def grouped_arguments(group_sizes, dtype):
    """x, both weights, sizes of groups and rows of x."""
    num_rows, groups = sum(group_sizes) + 3, len(group_sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (num_rows, 80), dtype)
    w = jax.random.normal(keys[1], (groups, 80, 72), dtype)
    gate_up = jax.random.normal(keys[2], (groups, 80, 2, 72), dtype)
    sizes = jnp.array(group_sizes, jnp.int32)
    return x, w, gate_up, sizes, jnp.arange(num_rows, dtype=jnp.int32)[::-1]


def launch_grouped(group_sizes, dtype, implementation="triton"):
    """Both grouped matmuls, with rows of no group and sizes that no block divides."""
    x, w, gate_up, sizes, rows = grouped_arguments(group_sizes, dtype)
    y = ops.grouped_matmul(x, w, sizes, implementation=implementation)
    gated = ops.grouped_gated_matmul(x, gate_up, sizes, rows, implementation=implementation)
    jax.block_until_ready((y, gated))
    return 2


@made_on_the_cpu
def decoder_arguments(tokens, dtype):
    """x, both weights, scales of three norms and a factor."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, 200), dtype)
    w = jax.random.normal(keys[1], (200, 200), dtype)
    gate_up = jax.random.normal(keys[2], (200, 2, 200), dtype)
    return x, w, gate_up, w[0], [w[1], w[2]], w[0, 0]


def launch_decoder(tokens, dtype, implementation="triton"):
    """Matmuls of few tokens and the residual sum, of sizes that no block divides."""
    x, w, gate_up, *norms = decoder_arguments(tokens, dtype)
    run = {"implementation": implementation}
    partial_sums = ops.linear_partial_sums(x, w, **run)
    outputs = [ops.linear(x, w, **run), ops.geglu(x, gate_up, **run)]
    outputs.append(ops.logits(x, w, **run))
    outputs += ops.add_rms_norm(x, partial_sums, *norms, **run)
    jax.block_until_ready(outputs)
    return 5


def launch_case(case):
    """A norm or the prologue, which writes two caches."""
    count = 0
    for arguments in case_arguments(case):
        jax.block_until_ready(case.run(arguments, "triton"))
        count += 1
    return count


def launch_once(case):
    """A case that writes no cache."""
    jax.block_until_ready(case.run(made_on_the_cpu(case.arguments)(), "triton"))
    return 1


HALF_AND_FLOAT32 = (jnp.bfloat16, jnp.float32)
GROUP_SIZES = ([1, 0, 2], [50, 0, 70, 1], [700, 0])
SIZES = ((1, 80), (5, 512), (50, 80), (700, 512))  # tokens, D
FORMS = (KVCache, CompactKVCache)


def products():
    return sum(itertools.starmap(launch_decoder, itertools.product((1, 17, 32), HALF_AND_FLOAT32)))


def grouped():
    return sum(itertools.starmap(launch_grouped, itertools.product(GROUP_SIZES, HALF_AND_FLOAT32)))


def experts():
    """Of sizes that no block divides."""
    cases = tagged([*router.CASES, *moe_combine.CASES], "odd")
    return sum(map(launch_once, cases))


def norms():
    cases = [QKeqvRmsNormCase(12, 3, d, tokens) for tokens, d in SIZES]
    for mode, (tokens, d) in itertools.product(ProjectionMode, SIZES):
        cases.append(QkvRmsNormCase(mode, 12, 3, d, tokens))
    return sum(map(launch_case, cases))


def prologue():
    cases = [
        QkvNormRopeWriteCase(mode, form, 12, 3, d, d // 4, tokens, partial_sums=partial_sums)
        for (mode, form), (tokens, d), partial_sums in itertools.product(
            modes_and_forms(FORMS), SIZES, (None, 3)
        )
    ]
    without_cache = [
        QkvNormRopeCase(mode, 12, 3, d, d // 4, tokens)
        for mode, (tokens, d) in itertools.product(ProjectionMode, SIZES)
    ]
    return sum(map(launch_case, cases)) + sum(map(launch_once, without_cache))


def case(form, nq, nkv, d, tokens, context, page_size=16, **sizes):
    """Attention of three sequences: one that is full, one of a third, an empty one."""
    of = DecodeAttentionCase if tokens <= MAX_DECODE_TOKENS else PrefillAttentionCase
    last = context - 1, max(tokens, context // 3), -1
    return of(form, nq, nkv, d, tokens, last, context, page_size=page_size, **sizes)


def attention(*tokens):
    rows = pairwise(FORMS, tokens, (80, 512), (None, 50))
    return sum(
        launch_attention(case(form, 12, 3, d, t, 300, rotary_dim=d // 4, sliding_window=window))
        for form, t, d, window in rows
    )


def verification():
    """6 tokens in one block, 9 in two that both have the middle one."""
    return sum(
        launch_verification(case(form, 16, 2, 512, tokens, 192, page_size=64))
        for form, tokens in itertools.product(FORMS, (6, 9))
    )


class Program(NamedTuple):
    """Program for a process of its own."""

    run: Callable[[], int]
    launches: int
    ops: tuple[str, ...]


PROGRAMS = {
    "products": Program(products, 30, ("linear", "add_rms_norm")),
    "grouped": Program(grouped, 12, ("grouped_matmul", "grouped_gated_matmul")),
    "experts": Program(experts, 10, ("router", "moe_combine")),
    "norms": Program(norms, 16, ("qkv_rms_norm", "q_keqv_rms_norm")),
    "prologue": Program(prologue, 92, ("qkv_norm_rope_write", "qkv_norm_rope")),
    "decode": Program(functools.partial(attention, 1, 6), 24, ("decode_attention",)),
    "verification": Program(verification, 12, ("decode_attention",)),
    "prefill": Program(functools.partial(attention, 40), 15, ("prefill_attention",)),
}

if __name__ == "__main__":
    print("launched", PROGRAMS[sys.argv[1]].run())
