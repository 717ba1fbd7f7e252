"""The mixture of experts that 26B-A4B has beside its MLP."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax import ops
from g4attn_jax.config import Gemma4Config
from g4attn_jax.ops.head_norm.reference import rms_norm

# Rows up to which comparing all pairs is fewer launches than a sort and its inverse: 32 tokens.
_MAX_COMPARED = 256


class Gemma4MoE(nnx.Module):
    """k of X experts for every token, each a gated MLP, weighed by a router.

        r = rms(x) * router_scale / sqrt(E)
        w = softmax(the k largest of r Wr) * per_expert_scale of those k
        y = sum over the k of w_i (gelu(h Wg_i) * h Wu_i) Wd_i

    x is the residual stream and h the same stream under a norm of its own. Letters: X experts, Fm
    their width, k experts of a token, M = B * T tokens.

    Attributes:
        router_scale: [E].
        router_proj: Wr, [E, X].
        per_expert_scale: [X].
        gate_up_proj: Wg and Wu, [X, E, 2, Fm].
        down_proj: Wd, [X, Fm, E].

    Source: `Gemma4TextRouter` and `Gemma4TextExperts` of Hugging Face transformers 5.23. There the
    k largest of a softmax over all experts are divided by their sum: the softmax of these k alone.
    """

    def __init__(
        self,
        config: Gemma4Config,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: ops.Implementation | None = None,
    ):
        """Builds the experts and their router with random weights.

        Args:
            config: of the whole model.
            rngs: stream `params` draws the weights.
            dtype: of activations.
            param_dtype: of the weights.
            implementation: see `ops.grouped_matmul`.
        """
        embed, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.dtype = jnp.dtype(dtype)
        self.implementation = implementation
        # The router's input has norm 1, not sqrt(E).
        router_init = nnx.initializers.normal(1.0)
        gate_up_init = nnx.initializers.lecun_uniform(in_axis=1, out_axis=(2, 3), batch_axis=0)
        down_init = nnx.initializers.lecun_uniform(in_axis=1, out_axis=2, batch_axis=0)
        gate_up_shape, down_shape = (experts, embed, 2, width), (experts, width, embed)
        self.router_scale = nnx.Param(jnp.ones(embed, param_dtype))
        self.router_proj = nnx.Param(router_init(rngs.params(), (embed, experts), param_dtype))
        self.per_expert_scale = nnx.Param(jnp.ones(experts, param_dtype))
        self.gate_up_proj = nnx.Param(gate_up_init(rngs.params(), gate_up_shape, param_dtype))
        self.down_proj = nnx.Param(down_init(rngs.params(), down_shape, param_dtype))

    def __call__(self, x: Float[Array, "B T E"], h: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The experts' answer for every token.

        Args:
            x: [B, T, E], the residual stream, which chooses the experts.
            h: [B, T, E], its norm, which they work on; cast to `dtype`.
        """
        weights, experts = self.route(x.reshape(-1, x.shape[-1]))
        # Rows sorted by expert: those of one expert are one matmul. Row i is token order[i] // k's.
        order, place = _sort(experts.ravel())
        of_expert = experts.reshape(-1, 1) == jnp.arange(self.per_expert_scale.shape[0])
        group_sizes = jnp.sum(of_expert, axis=0, dtype=jnp.int32)
        gated = ops.grouped_gated_matmul(
            h.reshape(-1, h.shape[-1]).astype(self.dtype),
            self.gate_up_proj[...].astype(self.dtype),
            group_sizes,
            order // self.top_k,
            implementation=self.implementation,
        )
        rows = ops.grouped_matmul(
            gated,
            self.down_proj[...].astype(self.dtype),
            group_sizes,
            implementation=self.implementation,
        )
        # Back in the order of tokens by reading, as scattered sums are in no certain order.
        rows = rows[place].reshape(*experts.shape, -1).astype(jnp.float32)
        y = jnp.sum(weights[..., None] * rows, axis=1)
        return y.astype(self.dtype).reshape(h.shape)

    def route(self, x: Float[Array, "M E"]) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
        """(weights, experts) of every token: float32 and int32 [M, k], the best expert first."""
        # All in float32: what is rounded here does not change a number, it changes the expert.
        x = rms_norm(x.astype(jnp.float32), self.router_scale[...], eps=self.eps)
        # XLA would round both to TF32 for a GPU's tensor cores.
        x, proj = x / math.sqrt(x.shape[-1]), self.router_proj[...].astype(jnp.float32)
        scores = jnp.matmul(x, proj, precision=jax.lax.Precision.HIGHEST)
        scores, experts = jax.lax.top_k(scores, self.top_k)
        scale = self.per_expert_scale[...].astype(jnp.float32)[experts]
        return jax.nn.softmax(scores, axis=-1) * scale, experts


def _sort(experts):
    """(order, place) of rows sorted by expert, stable: row i is order[i], and row j is at place[j].

    Args:
        experts: int32 [rows].
    """
    index = jnp.arange(experts.size, dtype=jnp.int32)
    if not isinstance(experts.size, int) or experts.size > _MAX_COMPARED:
        order = jnp.argsort(experts).astype(jnp.int32)
        return order, jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    key = experts * experts.size + index  # no two are equal
    place = jnp.sum(key[:, None] < key, axis=0, dtype=jnp.int32)
    is_there = place[:, None] == index
    return jnp.sum(jnp.where(is_there, index[:, None], 0), axis=0, dtype=jnp.int32), place
