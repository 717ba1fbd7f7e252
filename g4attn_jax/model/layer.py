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
from g4attn_jax.model.mlp import Gemma4MLP
from g4attn_jax.model.moe import Gemma4MoE
from g4attn_jax.ops.head_norm.reference import rms_norm


class Gemma4DecoderLayer(nnx.Module):
    """Attention and MLP between norms, then what the layer is told of the token, then a factor.

        h = rms(x) * input_norm
        x = x + rms(attention(h)) * post_attention_norm
        y = mlp(rms(x) * pre_feedforward_norm)
        y = rms(y) * post_feedforward_norm_1                                     with experts (MoE)
            + rms(moe(x, rms(x) * pre_feedforward_norm_2)) * post_feedforward_norm_2
        x = x + rms(y) * post_feedforward_norm
        x = x + rms((gelu(x Wg) * p) Wp) * post_per_layer_norm        with per-layer inputs p (PLE)
        x = x * layer_scalar

    A branch's last norm, its sum with x and the norms of that are one launch, `ops.add_rms_norm`,
    across layers too: h comes from the layer before, and the next one's is made here.

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

    def __init__(
        self,
        config: Gemma4Config,
        layer: int,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: ops.Implementation | None = None,
    ):
        """Builds the layer with random weights; arguments as of `Gemma4Attention`."""
        embed, per_layer = config.hidden_size, config.hidden_size_per_layer_input
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.eps = config.rms_norm_eps
        self.implementation = implementation
        self.attention = Gemma4Attention(
            config, layer, rngs=rngs, implementation=implementation, **dtypes
        )
        is_shared = self.attention.spec.mode is ProjectionMode.Q_ONLY
        width = config.intermediate_size * (2 if config.use_double_wide_mlp and is_shared else 1)
        self.mlp = Gemma4MLP(embed, width, rngs=rngs, implementation=implementation, **dtypes)
        self.moe = (
            Gemma4MoE(config, rngs=rngs, implementation=implementation, **dtypes)
            if config.enable_moe_block
            else None
        )

        def scale():
            return nnx.Param(jnp.ones(embed, param_dtype))

        self.input_norm, self.post_attention_norm = scale(), scale()
        self.pre_feedforward_norm, self.post_feedforward_norm = scale(), scale()
        if self.moe is not None:
            self.post_feedforward_norm_1 = scale()
            self.pre_feedforward_norm_2, self.post_feedforward_norm_2 = scale(), scale()
        if per_layer:
            init = nnx.initializers.lecun_uniform()
            self.per_layer_gate = nnx.Param(init(rngs.params(), (embed, per_layer), param_dtype))
            self.per_layer_projection = nnx.Param(
                init(rngs.params(), (per_layer, embed), param_dtype)
            )
            self.post_per_layer_norm = scale()
        self.layer_scalar = nnx.Param(jnp.ones((), param_dtype))

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
        y = self.mlp.partial_sums(h)
        if self.moe is not None:
            y = self._norm(ops.add_partial_sums(y, jnp.float32), self.post_feedforward_norm_1)
            y += self._norm(self.moe(x, *of_moe), self.post_feedforward_norm_2)
        last = [next_norm], self.layer_scalar[...]
        if per_layer_input is None:
            x, (h,) = self._add(x, y, self.post_feedforward_norm, *last)
        else:
            x, _ = self._add(x, y, self.post_feedforward_norm)
            y = self._tell(x, per_layer_input)
            x, (h,) = self._add(x, y, self.post_per_layer_norm, *last)
        return x, h, cache

    def _tell(self, x, per_layer_input):
        """In parts."""
        gate = ops.add_partial_sums(self._parts(x, self.per_layer_gate), jnp.float32)
        told = jax.nn.gelu(gate, approximate=True) * per_layer_input
        return self._parts(told.astype(x.dtype), self.per_layer_projection)

    def _parts(self, x, weight):
        return ops.linear_partial_sums(
            x, weight[...].astype(x.dtype), implementation=self.implementation
        )

    def _norm(self, x, scale):
        """In float32: not rounded before the sum."""
        return rms_norm(x.astype(jnp.float32), scale[...], eps=self.eps)

    def _add(self, x, y, scale, next_norms=(), factor=None):
        return ops.add_rms_norm(
            x,
            y,
            scale[...],
            next_norms,
            factor,
            eps=self.eps,
            implementation=self.implementation,
        )
