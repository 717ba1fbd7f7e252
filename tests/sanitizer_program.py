"""Launches the kernels on every kind of shape; run under compute-sanitizer by test_gpu.py."""

import itertools

import jax

from g4attn_jax import CompactKVCache, KVCache, ProjectionMode
from g4attn_jax.cache import FLOAT8, float8_scale
from g4attn_jax.commands.cases import AttentionCase, NormCase, PrologueCase


def all_cases():
    for mode, tokens, d in itertools.product(ProjectionMode, (1, 5, 50, 700), (80, 512)):
        yield NormCase(mode, 12, 3, d, tokens)
        yield PrologueCase(mode, KVCache, 12, 3, d, d // 4, tokens)
        if mode is not ProjectionMode.QKV_FULL:
            yield PrologueCase(mode, CompactKVCache, 12, 3, d, d // 4, tokens)
    for form, tokens, d, window in itertools.product(
        (KVCache, CompactKVCache), (1, 6, 40), (80, 512), (None, 50)
    ):
        yield AttentionCase(form, 12, 3, d, d // 4, window, tokens, context=700)


def main():
    launched = 0
    for case in all_cases():
        arguments = case.arguments()
        jax.block_until_ready(case.run(arguments, "triton"))
        launched += 1
        if isinstance(case, PrologueCase):
            cache = case.arguments(FLOAT8)[6]._replace(scale=float8_scale(arguments[2]))
            jax.block_until_ready(case.run([*arguments[:6], cache], "triton"))
            launched += 1
    print("launched", launched)


if __name__ == "__main__":
    main()
