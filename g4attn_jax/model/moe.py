"""The mixture of experts that 26B-A4B has beside its MLP."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax.config import Gemma4Config
from g4attn_jax.model.linear import GatedGroupedLinear, GroupedLinear, Linear, ModuleOptions
from g4attn_jax.ops.head_norm.reference import rms_norm

# Rows, 8 for each token, up to which comparing all pairs takes fewer launches than a sort and its
# inverse.
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

    def __init__(self, config: Gemma4Config, options: ModuleOptions):
        """Builds the experts and their router with random weights.

        Args:
            config: of the whole model.
            options: of the model.
        """
        embed, experts = {"embed": config.hidden_size}, {"experts": config.num_experts}
        width = {"expert_mlp": config.moe_intermediate_size}
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.router_scale = options.norm_scale(embed)
        # The router's input has norm 1, not sqrt(E).
        init = nnx.initializers.normal(1.0)
        # What is rounded here does not change a number, it changes the expert.
        self.router_proj = Linear(embed, experts, options.in_float32(), init=init)
        self.per_expert_scale = options.norm_scale(experts)
        self.gate_up_proj = GatedGroupedLinear(experts, embed, width, options)
        self.down_proj = GroupedLinear(experts, width, embed, options)

    def __call__(self, x: Float[Array, "B T E"], h: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The experts' answer for every token.

        Args:
            x: [B, T, E], the residual stream, which chooses the experts.
            h: [B, T, E], its norm, which they work on; cast to `dtype`.
        """
        with jax.named_scope("router"):
            weights, experts = self.route(x.reshape(-1, x.shape[-1]))
        with jax.named_scope("experts"):
            return self._mixture(h.reshape(-1, h.shape[-1]), weights, experts).reshape(h.shape)

    def route(self, x: Float[Array, "M E"]) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
        """(weights, experts) of every token: float32 and int32 [M, k], the best expert first."""
        x = rms_norm(x.astype(jnp.float32), self.router_scale[...], eps=self.eps)
        # XLA would round both to TF32 for a GPU's tensor cores.
        scores = self.router_proj.float32(
            x / math.sqrt(x.shape[-1]), precision=jax.lax.Precision.HIGHEST
        )
        scores, experts = jax.lax.top_k(scores, self.top_k)
        scale = self.per_expert_scale[...].astype(jnp.float32)[experts]
        return jax.nn.softmax(scores, axis=-1) * scale, experts

    def _mixture(self, h, weights, experts):
        """Weighted sums [M, E] of the experts' answers to h [M, E]."""
        # Rows sorted by expert: those of one expert are one matmul. Row i is token order[i] // k's.
        order, place = _sort(experts.ravel())
        of_expert = experts.reshape(-1, 1) == jnp.arange(self.per_expert_scale.shape[0])
        group_sizes = jnp.sum(of_expert, axis=0, dtype=jnp.int32)
        gated = self.gate_up_proj(h, group_sizes, order // self.top_k)
        rows = self.down_proj(gated, group_sizes)
        # Back in the order of tokens by reading, as scattered sums are in no certain order.
        y = rows[place].reshape(*experts.shape, -1).astype(jnp.float32)
        return jnp.sum(weights[..., None] * y, axis=1).astype(rows.dtype)


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
