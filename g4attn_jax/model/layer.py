"""One layer of the decoder."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from g4attn_jax import ops
from g4attn_jax.attention import Gemma4Attention
from g4attn_jax.cache import Cache, ReadableCache
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.layout import StepPlan
from g4attn_jax.model.linear import Linear, ModuleOptions
from g4attn_jax.model.mlp import Gemma4MLP
from g4attn_jax.model.moe import Gemma4MoE
from g4attn_jax.ops.head_norm.reference import rms_norm
from g4attn_jax.ops.moe_combine import CombineNorms


class Gemma4DecoderLayer(nnx.Module):
    """Attention and MLP between norms, then the per-layer input, then a factor.

        h = rms(x) * input_norm
        x = x + rms(attention(h)) * post_attention_norm
        y = mlp(rms(x) * pre_feedforward_norm)
        y = rms(y) * post_feedforward_norm_1                                     with experts (MoE)
            + rms(moe(x, rms(x) * pre_feedforward_norm_2)) * post_feedforward_norm_2
        x = x + rms(y) * post_feedforward_norm
        x = x + rms((gelu(x Wg) * p) Wp) * post_per_layer_norm        with per-layer inputs p (PLE)
        x = x * layer_scalar

    A branch's last norm, its sum with x and the norms of that are one launch, `ops.add_rms_norm`
    (with experts `ops.moe_combine`), across layers too: h comes from the layer before, and the next
    one's is made here.

    Attributes:
        attention: `Gemma4Attention`.
        input_norm, post_attention_norm, pre_feedforward_norm, post_feedforward_norm: [E].
        mlp: `Gemma4MLP`, of double width in E2B's KV-shared layers.
        moe: `Gemma4MoE`, or None.
        post_feedforward_norm_1, pre_feedforward_norm_2, post_feedforward_norm_2: [E], MoE alone.
        per_layer_gate: Wg, [E, P], PLE alone.
        per_layer_projection: Wp, [P, E], PLE alone.
        post_per_layer_norm: [E], PLE alone.
        layer_scalar: [].

    Source: `Gemma4TextDecoderLayer` of Hugging Face transformers 5.23.
    """

    def __init__(self, config: Gemma4Config, layer: int, options: ModuleOptions):
        """Builds the layer with random weights.

        Args:
            config: of the whole model.
            layer: 0 to num_hidden_layers - 1.
            options: of the model.
        """
        embed = {"embed": config.hidden_size}
        self.eps = config.rms_norm_eps
        self.implementation = options.implementation
        self.attention = Gemma4Attention(config, layer, **vars(options))
        is_shared = self.attention.spec.mode is ProjectionMode.Q_ONLY
        width = config.intermediate_size * (2 if config.use_double_wide_mlp and is_shared else 1)
        self.mlp = Gemma4MLP(config.hidden_size, width, options)
        self.moe = Gemma4MoE(config, options) if config.enable_moe_block else None
        self.input_norm, self.post_attention_norm = (
            options.norm_scale(embed),
            options.norm_scale(embed),
        )
        self.pre_feedforward_norm = options.norm_scale(embed)
        self.post_feedforward_norm = options.norm_scale(embed)
        if self.moe is not None:
            self.post_feedforward_norm_1 = options.norm_scale(embed)
            self.pre_feedforward_norm_2 = options.norm_scale(embed)
            self.post_feedforward_norm_2 = options.norm_scale(embed)
        if config.hidden_size_per_layer_input:
            per_layer = {"per_layer": config.hidden_size_per_layer_input}
            self.per_layer_gate = Linear(embed, per_layer, options)
            self.per_layer_projection = Linear(per_layer, embed, options)
            self.post_per_layer_norm = options.norm_scale(embed)
        self.layer_scalar = options.norm_scale({})

    def __call__(
        self,
        x: Float[Array, "B T E"],
        h: Float[Array, "B T E"],
        plan: StepPlan,
        cache: Cache | ReadableCache | None,
        next_norm: Float[Array, " E"],
        *,
        per_layer_input: Float[Array, "B T P"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], Cache | ReadableCache]:
        """One step of the layer.

        Args:
            x: [B, T, E], the residual stream.
            h: [B, T, E], rms(x) * input_norm.
            plan: from `plan_step`, for the layer's type.
            cache: see `Gemma4Attention`; None: the layer makes one of these tokens.
            next_norm: [E], `input_norm` of the next layer, after the last one the model's norm.
            per_layer_input: [B, T, P] with PLE, else None.

        Returns:
            (x, h, cache): x and rms(x) * next_norm, [B, T, E] in the dtype x came in, and the
            updated cache.
        """
        y, cache = self.attention.partial_sums(h, plan, cache)
        norms = [self.pre_feedforward_norm[...]]
        if self.moe is not None:
            norms.append(self.pre_feedforward_norm_2[...])
        x, (h, *of_moe) = self._add(x, y, self.post_attention_norm, norms)
        with jax.named_scope("mlp"):
            y = self.mlp.partial_sums(h)
        last = [next_norm], self.layer_scalar[...]
        of_sum = last if per_layer_input is None else ([], None)
        if self.moe is None:
            x, norms = self._add(x, y, self.post_feedforward_norm, *of_sum)
        else:
            with jax.named_scope("moe"):
                answers = self.moe.answers(x, *of_moe)
            x, norms = self._combine(x, y, answers, *of_sum)
        if per_layer_input is not None:
            with jax.named_scope("per_layer_input"):
                y = self._from_per_layer_input(x, per_layer_input)
            x, norms = self._add(x, y, self.post_per_layer_norm, *last)
        return x, *norms, cache

    def first_norm(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """rms(x) * input_norm, for the first layer; the others' is made by the layer before."""
        with jax.named_scope("norms"):
            return rms_norm(x, self.input_norm[...], eps=self.eps)

    def _from_per_layer_input(self, x, per_layer_input):
        """Partial sums of (gelu(x Wg) * p) Wp."""
        gate = ops.add_partial_sums(self.per_layer_gate.partial_sums(x), jnp.float32)
        gated = jax.nn.gelu(gate, approximate=True) * per_layer_input
        return self.per_layer_projection.partial_sums(gated)

    def _combine(self, x, y, answers, next_norms, factor):
        """Adds the MLP and the experts to the residual stream; see `moe_combine`."""
        norms = CombineNorms(
            self.post_feedforward_norm_1[...],
            self.post_feedforward_norm_2[...],
            self.post_feedforward_norm[...],
        )
        with jax.named_scope("norms"):
            return ops.moe_combine(
                x,
                y,
                *answers,
                norms,
                next_norms,
                factor,
                eps=self.eps,
                implementation=self.implementation,
            )

    def _add(self, x, y, scale, next_norms=(), factor=None):
        """Adds a branch's normalised partial sums to the residual stream; see `add_rms_norm`."""
        with jax.named_scope("norms"):
            return ops.add_rms_norm(
                x,
                y,
                scale[...],
                next_norms,
                factor,
                eps=self.eps,
                implementation=self.implementation,
            )
