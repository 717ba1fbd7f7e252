"""The whole text model: tokens in, logits out, caches passed through."""

from collections.abc import Mapping
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache, KVCache, ReadableCache
from g4attn_jax.checks import check_array, check_type, known_values
from g4attn_jax.config import Gemma4Config
from g4attn_jax.layout import Contiguous, Layout, SegmentIds, select_tokens
from g4attn_jax.model.embedding import PerLayerInputs, num_embedded_tokens
from g4attn_jax.model.layer import Gemma4DecoderLayer
from g4attn_jax.model.linear import Embedding, ModuleOptions
from g4attn_jax.model.step import ModelCache, Step


class Gemma4Decoder(nnx.Module):
    """Embedding, layers, norm, and as the head the embedding again or a table of its own.

        x = embed_tokens[token] * sqrt(E)
        x = layer(x)                              for every layer
        h = rms(x) * norm
        logits = c tanh(h head^T / c)             c: final_logit_softcapping, 30

    The head is `embed_tokens`, or `lm_head` where the config says `tie_word_embeddings` False.

    A call is a pure function of parameters, tokens, step and cache; after `split_weights` also to
    JAX. Letters: B batch, T new tokens, V vocabulary, E embed, L layers, P width of the per-layer
    embeddings (PLE: E2B and E4B), Vp their vocabulary.

    Attributes:
        embed_tokens: `Embedding` [V, E].
        per_layer_inputs: `PerLayerInputs`, None without PLE.
        layers: L `Gemma4DecoderLayer`s.
        norm: [E].
        lm_head: `Embedding` [V, E], without `tie_word_embeddings` alone.

    Source: `Gemma4ForCausalLM` of Hugging Face transformers 5.23.
    """

    def __init__(
        self,
        config: Gemma4Config,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
    ):
        """Builds the model with random weights.

        Args:
            config: with all fields of the text model.
            rngs: stream `params` draws the weights.
            dtype: of activations, and of caches unless `init_cache` is told otherwise.
            param_dtype: of the weights; cast to `dtype` in every call where they differ.
            implementation: of the kernels, see `Gemma4Attention`.

        Raises:
            ValueError: the config lacks a field, or as `Gemma4Attention` raises.
            NotImplementedError: a kernel was demanded that cannot run here.
        """
        config.check_decoder()
        options = ModuleOptions(rngs, dtype, param_dtype, implementation)
        self.config = config
        self.dtype = options.dtype
        tokens, embed = {"vocab": config.vocab_size}, {"embed": config.hidden_size}
        self.embed_tokens = Embedding(tokens, embed, options)
        has_per_layer = bool(config.hidden_size_per_layer_input)
        self.per_layer_inputs = PerLayerInputs(config, options) if has_per_layer else None
        self.layers = nnx.List(
            Gemma4DecoderLayer(config, layer, options) for layer in range(config.num_hidden_layers)
        )
        self.norm = options.norm_scale(embed)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(tokens, embed, options)

    def init_cache(
        self,
        layouts: Mapping[str, Layout],
        forms: Mapping[str, type[Cache]] | None = None,
        *,
        dtype: jax.typing.DTypeLike | None = None,
    ) -> ModelCache:
        """Empty caches of every layer that is not Q_ONLY.

        Args:
            layouts: of each layer type, "sliding_attention" and "full_attention". Page tables
                belong to steps: what `Paged` has of them is left out.
            forms: of each layer type; `KVCache` where none is named. Full layers with K = V can
                have the `CompactKVCache`.
            dtype: of the storage, see `Gemma4Attention.init_cache`.

        Raises:
            ValueError: a layer type has no layout, the model has no layers of a type, or as
                `Gemma4Attention.init_cache` raises.
        """
        forms = {} if forms is None else forms
        self._check_layer_types("layouts", layouts)
        self._check_layer_types("forms", forms, all_needed=False)
        layers = []
        for index in self._producers():
            layer_type = self.config.layer_types[index]
            layers.append(
                self.layers[index].attention.init_cache(
                    layouts[layer_type], forms.get(layer_type, KVCache), dtype=dtype
                )
            )
        sizes = {key: layouts[key].sizes() for key in sorted(set(self.config.layer_types))}
        return ModelCache(tuple(layers), sizes)

    def plan(
        self,
        positions: Int[Array, "B T"],
        cache: ModelCache,
        page_tables: Mapping[str, Int[Array, "B pages"]] | None = None,
    ) -> Step:
        """Plans a step of T new tokens of every sequence.

        Args:
            positions: integer [B, T], where they are in their sequences. -1 marks padding: nothing
                is written, and its logits mean nothing.
            cache: from `init_cache` or an earlier step; only its sizes are looked at.
            page_tables: integer [B, pages], of each layer type whose layout is `Paged`.

        Raises:
            ValueError: a page table is missing or surplus, or as `plan_step` raises.
        """
        check_type("cache", cache, ModelCache)
        with jax.named_scope("plan"):
            return Step.plan(self._specs(), positions, cache.layouts, page_tables)

    def readable(self, cache: ModelCache) -> dict[str, ReadableCache]:
        """The last cache of each layer type, which KV-shared layers and an assistant read."""
        check_type("cache", cache, ModelCache)
        return self._readable(cache.layers)

    @overload
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        logits_at: Int[Array, "B n"] | None = None,
    ) -> Float[Array, "B n V"]: ...

    @overload
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        step: Step,
        cache: ModelCache,
        *,
        logits_at: Int[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B n V"], ModelCache]: ...

    def __call__(self, tokens, step=None, cache=None, *, segment_ids=None, logits_at=None):
        """Logits of whole sequences; or, with a cache, of one step of T new tokens of each.

            logits = decoder(tokens)                         can be differentiated
            step = decoder.plan(positions, cache)
            logits, cache = decoder(tokens, step, cache)     cannot

        Args:
            tokens: integer [B, T]. Without a cache each row is a sequence from its beginning, with
                `segment_ids` several. Those that are known, not traced by `jax.jit`, are checked; a
                traced one that the model cannot read makes its sequence NaN.
            step: from `plan`, for these tokens. With a cache alone.
            cache: from `init_cache` or an earlier step. Donate it to a jitted step to update it in
                place. None: there is none.
            segment_ids: integer [B, T], of sequences packed into one row, as for training: tokens
                see those of their own id alone. Tokens of one id stand side by side; 0 marks
                padding, whose logits mean nothing. Without a cache alone; XLA computes attention.
            logits_at: integer [B, n], the indices into T whose logits are wanted; None is all. A
                prompt wants one, a part of a prompt none ([B, 0]).

        Returns:
            Float32 [B, n, V]; with a cache (logits, cache), the latter updated.

        Raises:
            ValueError: an argument has the wrong shape or dtype, a token is none that the model can
                read, or the cache is another model's.
            NotImplementedError: segment_ids are given to a model whose implementation is a kernel.
        """
        if (step is None) != (cache is None):
            given, lacking = ("step", "cache") if cache is None else ("cache", "step")
            raise ValueError(f"{given} is given and {lacking} is not; accepted: both, or neither")
        if cache is None:
            return self.logits(self._whole_sequences(tokens, segment_ids, logits_at))
        if segment_ids is not None:
            raise ValueError("segment_ids is given with a cache; accepted: without one")
        h, cache = self.hidden(tokens, step, cache, logits_at=logits_at)
        return self.logits(h), cache

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        step: Step,
        cache: ModelCache,
        *,
        logits_at: Int[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B n E"], ModelCache]:
        """Final hidden states of a step: `__call__` with a cache and without the head.

        Returns:
            (hidden, cache): final hidden states after the norm, [B, n, E] in `dtype`, and the
            updated cache.
        """
        self._check_step(tokens, step, cache, logits_at)
        h, layers = self._hidden(tokens, step, list(cache.layers), logits_at)
        return h, cache._replace(layers=tuple(layers))

    def _whole_sequences(self, tokens, segment_ids, at):
        """Final hidden states of sequences that begin here, whose keys and values nobody keeps."""
        check_array("tokens", tokens, ("B", "T"), "integer")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is not None:
            check_array("segment_ids", segment_ids, tokens.shape, "integer")
            ids = jnp.asarray(segment_ids, jnp.int32)
            # Rotations depend on distances alone, so a sequence may begin anywhere in its row.
            positions, segment_ids = jnp.where(ids == 0, -1, positions), SegmentIds(ids, ids)
        self._check_known_tokens(tokens, positions)
        check_array("logits_at", at, (tokens.shape[0], "n"), "integer", none=True, empty=True)
        layouts = dict.fromkeys(self.config.layer_types, Contiguous(*tokens.shape))
        with jax.named_scope("plan"):
            step = Step.plan(self._specs(), positions, layouts, segment_ids=segment_ids)
        return self._hidden(tokens, step, [None] * len(self._producers()), at)[0]

    def _hidden(self, tokens, step, caches, logits_at):
        """Final hidden states, and the producers' caches; one that is None its layer makes."""
        x, per_layer = self._embed(jnp.asarray(tokens))
        h = self.layers[0].first_norm(x)
        producers = self._producers()
        written = []
        for index in producers:
            x, h, cache = self._layer(index, x, h, per_layer, step, caches[index])
            written.append(cache)
        if logits_at is not None:
            # KV-shared layers write nothing that other tokens read, so these tokens are enough.
            x, h = select_tokens(x, logits_at), select_tokens(h, logits_at)
            per_layer = None if per_layer is None else select_tokens(per_layer, logits_at)
            step = step.select(logits_at)
        if x.size:  # attention takes no step without tokens
            readable = self._readable(written)
            for index in range(producers.stop, self.config.num_hidden_layers):
                cache = readable[self.config.layer_types[index]]
                x, h, _ = self._layer(index, x, h, per_layer, step, cache)
        return h, written

    def _layer(self, index, x, h, per_layer, step, cache):
        """(x, h, cache) after a layer, h for the layer that comes next."""
        is_last = index == self.config.num_hidden_layers - 1
        next_norm = self.norm if is_last else self.layers[index + 1].input_norm
        with jax.named_scope(f"layer_{index}"):
            return self.layers[index](
                x,
                h,
                step.plans[self.config.layer_types[index]],
                cache,
                next_norm[...],
                per_layer_input=None if per_layer is None else per_layer[:, :, index],
            )

    def _readable(self, caches):
        """`readable` of the caches of all producers."""
        last = {self.config.layer_types[index]: index for index in self._producers()}
        return {
            layer_type: ReadableCache(caches[index], self.layers[index].attention.k_norm[...])
            for layer_type, index in last.items()
        }

    def _specs(self):
        """The `AttentionSpec` of a layer of each type."""
        types = self.config.layer_types
        return {key: self.config.attention_spec(types.index(key)) for key in sorted(set(types))}

    def logits(self, hidden: Float[Array, "B n E"]) -> Float[Array, "B n V"]:
        """Float32 logits of final hidden states."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with jax.named_scope("logits"):
            logits = head.logits(hidden)
            cap = self.config.final_logit_softcapping
            return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embed(self, tokens):
        """The residual stream [B, T, E], and per-layer inputs [B, T, L, P] or None."""
        with jax.named_scope("embed"):
            x = self.embed_tokens(tokens)
        return x, None if self.per_layer_inputs is None else self.per_layer_inputs(x, tokens)

    def _producers(self):
        """Layers that have a cache of their own."""
        return range(self.config.num_hidden_layers - self.config.num_kv_shared_layers)

    def _check_step(self, tokens, step, cache, at):
        check_array("tokens", tokens, ("B", "T"), "integer")
        check_type("step", step, Step)
        check_type("cache", cache, ModelCache)
        check_array("step.positions", step.positions, tokens.shape, "integer")
        self._check_known_tokens(tokens, step.positions)
        check_array("logits_at", at, (tokens.shape[0], "n"), "integer", none=True, empty=True)
        if len(cache.layers) != len(self._producers()):
            raise ValueError(
                f"cache has {len(cache.layers)} layers; accepted: the {len(self._producers())} of "
                "init_cache"
            )

    def _check_known_tokens(self, tokens, positions):
        """Refuses tokens without an embedding, unless they are traced or known to be padding."""
        tokens, accepted = known_values(tokens), num_embedded_tokens(self.config)
        if tokens is None:
            return
        wrong = (tokens < 0) | (tokens >= accepted)
        positions = known_values(positions) if wrong.any() else None
        if positions is not None:
            wrong &= positions >= 0
        if wrong.any():
            reason = ""
            if accepted < self.config.vocab_size:
                reason = f"; vocab_size_per_layer_input is {accepted}"
            raise ValueError(
                f"tokens has {tokens[wrong][0]}; accepted: tokens 0 to {accepted - 1}{reason}"
            )

    def _check_layer_types(self, name, given, *, all_needed=True):
        """Refuses a dict by layer type that lacks one of the model's, or has another."""
        types = sorted(set(self.config.layer_types))
        missing = [layer_type for layer_type in types if layer_type not in given]
        if all_needed and missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}; the model has such layers")
        surplus = [key for key in given if key not in types]
        if surplus:
            raise ValueError(f"{name} has {surplus[0]!r}; accepted: {', '.join(types)}")
