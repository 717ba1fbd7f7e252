"""On a GPU: launches that start early wait for what they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax import ops

# What XLA makes of each: its fusions, its sort, cuBLAS, loops, and kernels of ours.
CONSUMERS = {
    "elementwise": lambda y: jnp.tanh(y) + 1,
    "reduction": lambda y: y.max(axis=1),
    "transpose": lambda y: y.T + 0,
    "sort": lambda y: jnp.sort(y, axis=1),
    "top_k": lambda y: jax.lax.top_k(y, 8),
    "cumulative sum": lambda y: jnp.cumsum(y, axis=0),
    "gather": lambda y: y[:, ::-3],
    "scatter": lambda y: jnp.zeros((128, y.shape[1]), y.dtype).at[jnp.arange(64) * 2].set(y),
    "matmul": lambda y: y @ y.T,
    "loop": lambda y: jax.lax.fori_loop(0, 3, lambda _, z: z * 0.5 + y, y),
    "copy": lambda y: jnp.copy(y),
    "add_rms_norm": lambda y: ops.add_rms_norm(y, y, y[0]),
    "linear": lambda y: ops.linear(y, jnp.tile(y, (320, 1))[: y.shape[1]]),
}


@pytest.mark.gpu("linear", "add_rms_norm")
@pytest.mark.parametrize("name", CONSUMERS)
def test_what_follows_a_kernel_sees_all_of_it(name):
    """A long launch lets the next one start; what that makes is as if it had come much later.

    What a consumer would read too early is another seed's result, which differs by 1 or so. XLA may
    round otherwise where it compiles the consumer alone, by one bfloat16 in 256.
    """
    consume = CONSUMERS[name]
    w = jax.random.normal(jax.random.key(0), (4096, 8192), jnp.bfloat16) / 64
    produce = jax.jit(lambda x, w: ops.linear(x, w, implementation="triton"))
    both = jax.jit(lambda x, w: consume(ops.linear(x, w, implementation="triton")))
    for seed in range(8):
        x = jax.random.normal(jax.random.key(seed), (64, 4096), jnp.bfloat16)
        alone = jax.block_until_ready(produce(x, w))
        expected = jax.tree.leaves(jax.device_get(jax.jit(consume)(alone)))
        for ours, exact in zip(jax.tree.leaves(both(x, w)), expected, strict=True):
            np.testing.assert_allclose(
                np.asarray(ours, np.float32), np.asarray(exact, np.float32), rtol=1e-2, atol=1e-2
            )
