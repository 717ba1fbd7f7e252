"""The mixture of experts that 26B-A4B has beside its MLP."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax import ops
from g4attn_jax.config import Gemma4Config
from g4attn_jax.model.linear import GatedGroupedLinear, GroupedLinear, Linear, ModuleOptions
from g4attn_jax.ops.moe_combine.reference import weighted_sum
from g4attn_jax.ops.router import Routing


class Gemma4MoE(nnx.Module):
    """k of X experts for every token, each a gated MLP, weighed by a router.

        r = rms(x) * router_scale / sqrt(E)
        w = softmax(the k largest of r Wr) * per_expert_scale of those k
        y = sum over the k of w_i (gelu(h Wg_i) * h Wu_i) Wd_i

    The first two lines are `ops.router`. A layer takes the answers of single experts, `answers`,
    and leaves their sum to `ops.moe_combine`.

    x is the residual stream and h the same stream under a norm of its own. Letters: X experts, Fm
    their width, k experts of a token, M = B * T tokens.

    Attributes:
        router_scale: [E].
        router_proj: Wr, [E, X].
        per_expert_scale: [X].
        gate_up_proj: Wg and Wu, [X, E, 2, Fm].
        down_proj: Wd, [X, Fm, E].

    Source: `Gemma4TextRouter` and `Gemma4TextExperts` of Hugging Face transformers 5.23.
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
        self.implementation = options.implementation
        self.router_scale = options.norm_scale(embed)
        # The router's input has norm 1, not sqrt(E).
        init = nnx.initializers.normal(1.0)
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
        rows, weights, place = self.answers(x, h)
        return weighted_sum(rows, weights, place).astype(rows.dtype).reshape(h.shape)

    def answers(
        self, x: Float[Array, "B T E"], h: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "rows E"], Float[Array, "M k"], Int[Array, "M k"]]:
        """Answers of single experts, for `ops.moe_combine` to add; arguments as of a call.

        Returns:
            (rows, weights, place): the answers, sorted by expert, and of each token the factors of
            its k answers and the rows that they are.
        """
        with jax.named_scope("router"):
            routing = self.route(x)
        with jax.named_scope("experts"):
            h = h.reshape(-1, h.shape[-1])
            gated = self.gate_up_proj(h, routing.group_sizes, routing.row_tokens)
            rows = self.down_proj(gated, routing.group_sizes)
        return rows, routing.weights, routing.place

    def route(self, x: Float[Array, "*batch E"]) -> Routing:
        """Experts of every token of the residual stream, see `ops.router`."""
        return ops.router(
            x,
            self.router_scale[...],
            self.router_proj.weight[...],
            self.per_expert_scale[...],
            top_k=self.top_k,
            eps=self.eps,
            implementation=self.implementation,
        )
