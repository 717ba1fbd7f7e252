"""Launches the kernel on every kind of shape; run under compute-sanitizer by test_gpu.py."""

import itertools

import jax
import jax.numpy as jnp

from g4attn_jax import ProjectionMode, ops


def main():
    launched = 0
    for mode, tokens, d in itertools.product(ProjectionMode, (1, 5, 50, 700), (80, 512)):
        qkv = jax.random.normal(
            jax.random.key(0), (tokens, 3, 4 + mode.num_kv_projections, d), jnp.bfloat16
        )
        scales = [jnp.ones(d)] * (1 if mode is ProjectionMode.Q_ONLY else 2)
        outputs = ops.qkv_rms_norm(qkv, *scales, mode=mode, implementation="triton")
        jax.block_until_ready(outputs)
        launched += 1
    print("launched", launched)


if __name__ == "__main__":
    main()
