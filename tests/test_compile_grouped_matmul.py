"""Grouped matmul and the experts that use it, compiled for GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from g4attn_jax import Gemma4Config, ops
from g4attn_jax.model import Gemma4MoE, ModuleOptions
from g4attn_jax.testing import gpu_target
from g4attn_jax.testing.launches import FREE_OPCODES, count_launches, entry_opcodes
from tests.everyday import everyday

pytestmark = pytest.mark.skipif(
    gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable())
)

on_every_gpu = pytest.mark.parametrize("gpu", gpu_target.COMPUTE_CAPABILITIES)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_x64_and_vmap():
    """Still one launch each; indices stay int32."""
    x, w = struct(3, 64, 704), struct(128, 704, 2816)
    sizes = struct(3, 128, dtype=jnp.int32)
    with jax.enable_x64(True):
        compiled = gpu_target.compile_for(
            "9.0",
            lambda x, w, sizes: jax.vmap(
                lambda x, sizes: ops.grouped_matmul(x, w, sizes, implementation="triton")
            )(x, sizes),
            x,
            w,
            sizes,
        )
    assert count_launches(compiled.as_text(), "grouped_matmul") == 1
    assert set(entry_opcodes(compiled)) <= {*FREE_OPCODES, "custom-call"}


@everyday("1")
@pytest.mark.parametrize(
    ("tokens", "kernels", "launches"),
    [
        (1, {"router_scores", "router_top_k", "grouped_gated_matmul", "grouped_matmul"}, 5),
        (64, {"router_scores", "router_top_k", "grouped_gated_matmul", "grouped_matmul"}, 6),
        (2048, {"grouped_gated_matmul", "grouped_matmul"}, 16),
    ],
)
def test_experts(tokens, kernels, launches):
    """No array has a row for every expert, and routing is few launches."""
    config = Gemma4Config.preset("gemma-4-26b-a4b")
    graph, params = nnx.split(nnx.eval_shape(lambda: Gemma4MoE(config, ModuleOptions(nnx.Rngs(0)))))
    x = struct(tokens, 1, config.hidden_size)
    compiled = gpu_target.compile_for(
        "9.0", lambda params, x, h: nnx.merge(graph, params)(x, h), params, x, x
    )
    text = compiled.as_text()
    assert {name: count_launches(text, name) for name in kernels} == dict.fromkeys(kernels, 1)
    opcodes = entry_opcodes(compiled)
    assert sum(n for op, n in opcodes.items() if op not in FREE_OPCODES) <= launches
    rows = tokens * config.top_k_experts * config.hidden_size
    router = config.hidden_size * config.num_experts
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * (4 * rows + 4 * router)
