"""The model that drafts tokens for a Gemma 4 decoder, out of the decoder's caches."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.cache import ReadableCache
from g4attn_jax.checks import check_array, check_type
from g4attn_jax.layout import LayerType
from g4attn_jax.model.layer import Gemma4DecoderLayer
from g4attn_jax.model.linear import Embedding, Linear, ModuleOptions
from g4attn_jax.model.step import ModelCache, Step
from g4attn_jax.rope import rope_cos_sin


class TokenOrdering(nnx.Variable):
    """Integers that training does not change, and so no `nnx.Param`."""


class Gemma4Assistant(nnx.Module):
    """Layers that read the target's caches, between projections from and to the target's width.

        x = [e ; h] Wpre                         e: the target's scaled embedding of a token
        x = layer(x)                             every one Q_ONLY, over the target's caches
        n = rms(x) * norm
        h' = n Wpost
        logits = n embed_tokens^T                for all tokens, or for those of the best centroids

    h is the target's final hidden state of the token before, of which the target predicted this
    one. Drafting goes on from the drafted token and h', at the same position: the assistant writes
    nothing, so there is nothing new to see. The logits are not capped.

    With ordered embeddings the vocabulary is C groups of V / C tokens, `token_ordering` lists them
    one after the other, and only tokens of the k groups whose centroids have the best scores
    n centroids have logits.

    Letters: B batch, T tokens, V vocabulary, E the assistant's width, A the target's.

    Attributes:
        pre_projection: Wpre, [2 A, E].
        layers: `Gemma4DecoderLayer`s.
        norm: [E].
        post_projection: Wpost, [E, A].
        embed_tokens: `Embedding` [V, E], the head.
        centroids: `Linear` [E, C], with ordered embeddings alone.
        token_ordering: int32 [V], with ordered embeddings alone.

    Source: `Gemma4AssistantForCausalLM` of Hugging Face transformers 5.23.
    """

    def __init__(
        self,
        config: AssistantConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
    ):
        """Builds the model with random weights, and with tokens in their own order.

        Args:
            config: of the assistant.
            rngs: stream `params` draws the weights.
            dtype: of activations; the target's caches must have it too.
            param_dtype: of the weights; cast to `dtype` in every call where they differ.
            implementation: of the kernels, see `Gemma4Attention`.

        Raises:
            ValueError: as `Gemma4Attention` raises.
            NotImplementedError: a kernel was demanded that cannot run here.
        """
        options = ModuleOptions(rngs, dtype, param_dtype, implementation)
        self.config = config
        self.dtype = options.dtype
        text, target_size = config.text, config.backbone_hidden_size
        embed, tokens = {"embed": text.hidden_size}, {"vocab": text.vocab_size}
        self.pre_projection = Linear({"target_embed": 2 * target_size}, embed, options)
        self.layers = nnx.List(
            Gemma4DecoderLayer(text, layer, options) for layer in range(text.num_hidden_layers)
        )
        self.norm = options.norm_scale(embed)
        self.post_projection = Linear(embed, {"target_embed": target_size}, options)
        self.embed_tokens = Embedding(tokens, embed, options)
        if config.use_ordered_embeddings:
            self.centroids = Linear(embed, {"centroids": config.num_centroids}, options)
            self.token_ordering = TokenOrdering(jnp.arange(text.vocab_size, dtype=jnp.int32))

    def plan(
        self,
        positions: Int[Array, "B T"],
        cache: ModelCache,
        page_tables: Mapping[str, Int[Array, "B pages"]] | None = None,
    ) -> Step:
        """Plans the drafts of a group, which all have one position.

        Args:
            positions: integer [B, T], of the newest token: 1 or more, as many as the tokens before
                it, which the cache must have. It stays while tokens are drafted. What the cache
                has from there on is not seen, so that rejected tokens may stay in it; a ring
                has what is seen whole after a step of up to `max_new_tokens`, any of them rejected.
                -1 marks padding. Only T = 1 is what transformers does; each of several is on its
                own.
            cache: the target's.
            page_tables: of each layer type whose layout is `Paged`.

        Raises:
            ValueError: a layer type has no cache, a page table is missing or surplus, or as
                `plan_step` raises.
        """
        check_type("cache", cache, ModelCache)
        self._check_layer_types("cache.layouts", cache.layouts)
        positions = positions if hasattr(positions, "shape") else np.asarray(positions)
        text = self.config.text
        specs = {
            layer_type: text.attention_spec(text.layer_types.index(layer_type))
            for layer_type in self._layer_types()
        }
        of_target = {
            layer_type: dataclasses.replace(
                spec, sliding_window=spec.sliding_window and text.sliding_window
            )
            for layer_type, spec in specs.items()
        }
        seen = Step.plan(of_target, _positions_before(positions), cache.layouts, page_tables)
        plans = {
            layer_type: _for_queries(plan, positions, specs[layer_type])
            for layer_type, plan in seen.plans.items()
        }
        return Step(positions, plans)

    def __call__(
        self,
        embeddings: Float[Array, "B T A"],
        hidden: Float[Array, "B T A"],
        step: Step,
        readable: Mapping[str, ReadableCache],
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T A"]]:
        """One draft of every sequence (T = 1).

        Args:
            embeddings: [B, T, A], of the newest token, which the target has not read yet, or of the
                one drafted last: `decoder.embed_tokens(token)` of the target.
            hidden: [B, T, A], the target's final hidden state of the token before the newest, as
                `Gemma4Decoder.hidden` returns it; from then on what this returned last.
            step: from `plan`.
            readable: the target's last cache of each layer type, see `Gemma4Decoder.readable`.

        Returns:
            (logits, hidden): float32 [B, T, V], minus infinity for tokens of other centroids than
            the best; and [B, T, A] in `dtype`, to draft on from.

        Raises:
            ValueError: an argument has the wrong shape or dtype, or a layer type has no cache.
        """
        self._check(embeddings, hidden, step, readable)
        inputs = jnp.concatenate([embeddings, hidden], axis=-1)
        with jax.named_scope("pre_projection"):
            x = self.pre_projection(inputs)
        h = self.layers[0].first_norm(x)
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for index, (layer, layer_type, norm) in enumerate(
            zip(self.layers, self.config.text.layer_types, next_norms, strict=True)
        ):
            with jax.named_scope(f"layer_{index}"):
                x, h, _ = layer(x, h, step.plans[layer_type], readable[layer_type], norm[...])
        with jax.named_scope("post_projection"):
            hidden = self.post_projection(h)
        return self.logits(h), hidden

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Float32 logits of final hidden states before `post_projection`."""
        with jax.named_scope("logits"):
            if self.config.use_ordered_embeddings:
                return self._logits_of_best_groups(hidden)
            return self.embed_tokens.logits(hidden)

    def _logits_of_best_groups(self, hidden):
        """Logits of tokens whose group is one of the best k, minus infinity for the others."""
        with jax.named_scope("centroids"):
            scores = self.centroids.float32(hidden)
            _, best = jax.lax.top_k(scores, self.config.centroid_intermediate_top_k)
        groups = self.token_ordering[...].reshape(self.config.num_centroids, -1)
        tokens = groups[best].reshape(*hidden.shape[:2], -1)
        logits = self.embed_tokens.logits(hidden, tokens)
        # transformers gives the others the least logit of the whole batch less 1. A sample would
        # then be one of them more often than not, and depend on the other sequences.
        others = jnp.full((*hidden.shape[:2], self.config.text.vocab_size), -jnp.inf)
        return jnp.put_along_axis(others, tokens, logits, axis=-1, inplace=False)

    def _layer_types(self):
        return sorted(set(self.config.text.layer_types))

    def _check(self, embeddings, hidden, step, readable):
        size = self.config.backbone_hidden_size
        check_array("embeddings", embeddings, ("B", "T", size), "floating")
        check_array("hidden", hidden, embeddings.shape, "floating")
        check_type("step", step, Step)
        check_array("step.positions", step.positions, embeddings.shape[:2], "integer")
        self._check_layer_types("readable", readable)

    def _check_layer_types(self, name, given):
        missing = [key for key in self._layer_types() if key not in given]
        if missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}; the assistant reads it")


def _positions_before(positions):
    """The last position that each query sees: its own has no key yet."""
    numpy = jnp if isinstance(positions, jax.core.Tracer) else np
    return numpy.where(positions > 0, positions - 1, numpy.minimum(positions, -1))


def _for_queries(plan, positions, spec):
    """The plan of keys, for queries that are rotated to their own positions and see one key more.

    Args:
        plan: of the positions before, for the target's layers.
        positions: integer [B, T], of the queries.
        spec: of the assistant's layers.
    """
    cos, sin = rope_cos_sin(
        jnp.asarray(positions),
        theta=spec.rope_theta,
        head_dim=spec.head_dim,
        rotary_dim=spec.rotary_dim,
    )
    return dataclasses.replace(plan, cos=cos, sin=sin, layer_type=LayerType.of(spec))
