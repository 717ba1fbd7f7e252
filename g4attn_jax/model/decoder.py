"""The whole text model: tokens in, logits out, caches passed through."""

import dataclasses
from collections.abc import Mapping
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax.cache import Cache, KVCache
from g4attn_jax.config import Gemma4Config
from g4attn_jax.layout import Contiguous, Layout, SegmentIds, plan_step
from g4attn_jax.model.embedding import PerLayerInputs, num_embedded_tokens
from g4attn_jax.model.layer import Gemma4DecoderLayer
from g4attn_jax.model.linear import Embedding, ModuleOptions


class Gemma4Decoder(nnx.Module):
    """Embedding, layers, norm, and as the head the embedding again or a table of its own.

        x = embed_tokens[token] * sqrt(E)
        x = layer(x)                              for every layer
        h = rms(x) * norm
        logits = c tanh(h head^T / c)             c: final_logit_softcapping, 30

    The head is `embed_tokens`, or `lm_head` where the config says `tie_word_embeddings` False.

    A call is a pure function of parameters, tokens, positions and caches; after `nnx.split` also to
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
            dtype: of activations, and of caches unless `init_caches` is told otherwise.
            param_dtype: of the weights; cast to `dtype` in every call where they differ.
            implementation: of the kernels, see `Gemma4Attention`.

        Raises:
            ValueError: the config lacks a field, or as `Gemma4Attention` raises.
            NotImplementedError: "triton" was demanded and there is no supported GPU.
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
        self.norm = options.scale(embed)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(tokens, embed, options)

    def init_caches(
        self,
        layouts: Mapping[str, Layout],
        forms: Mapping[str, type[Cache]] | None = None,
        *,
        dtype: jax.typing.DTypeLike | None = None,
    ) -> dict[int, Cache]:
        """Empty caches, one for every layer that is not Q_ONLY, by its index.

        Args:
            layouts: of each layer type, "sliding_attention" and "full_attention".
            forms: of each layer type; `KVCache` where none is named. Full layers with K = V can
                have the `CompactKVCache`.
            dtype: of the storage, see `Gemma4Attention.init_cache`.

        Raises:
            ValueError: a layer type has no layout, there is no such layer type, or as
                `Gemma4Attention.init_cache` raises.
        """
        forms = {} if forms is None else forms
        self._check_layer_types("layouts", layouts)
        self._check_layer_types("forms", forms, all_needed=False)
        caches = {}
        for index in self._producers():
            layer_type = self.config.layer_types[index]
            caches[index] = self.layers[index].attention.init_cache(
                layouts[layer_type], forms.get(layer_type, KVCache), dtype=dtype
            )
        return caches

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
        positions: Int[Array, "B T"],
        caches: Mapping[int, Cache],
        layouts: Mapping[str, Layout],
        *,
        logits_at: Int[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B n V"], dict[int, Cache]]: ...

    def __call__(
        self, tokens, positions=None, caches=None, layouts=None, *, segment_ids=None, logits_at=None
    ):
        """Logits of whole sequences; or, with caches, of one step of T new tokens of each.

            logits = decoder(tokens)                                        can be differentiated
            logits, caches = decoder(tokens, positions, caches, layouts)    cannot

        Args:
            tokens: integer [B, T]. Without caches each row is a sequence from its beginning, with
                `segment_ids` several. Those that are known, not traced by `jax.jit`, are checked; a
                traced one that the model cannot read makes its sequence NaN.
            positions: integer [B, T], where they are in their sequences. -1 marks padding: nothing
                is written, and its logits mean nothing. With caches alone.
            caches: from `init_caches` or an earlier step. Donate them to a jitted step to update
                them in place. None: there are none.
            layouts: that the caches were made with, or with another page table.
            segment_ids: integer [B, T], of sequences packed into one row, as for training: tokens
                see those of their own id alone. Tokens of one id stand side by side; 0 marks
                padding, whose logits mean nothing. Without caches alone; XLA computes attention.
            logits_at: integer [B, n], the indices into T whose logits are wanted; None is all. A
                prompt wants one, a part of a prompt none ([B, 0]).

        Returns:
            Float32 [B, n, V]; with caches (logits, caches), the latter updated.

        Raises:
            ValueError: an argument has the wrong shape or dtype, a token is none that the model can
                read, a cache or layout is missing, or as `plan_step` raises.
            NotImplementedError: segment_ids are given to a model whose implementation is a kernel.
        """
        if caches is None:
            return self.logits(
                self._whole_sequences(tokens, positions, layouts, segment_ids, logits_at)
            )
        if segment_ids is not None:
            raise ValueError("segment_ids are given with caches; accepted: without caches")
        h, caches = self.hidden(tokens, positions, caches, layouts, logits_at=logits_at)
        return self.logits(h), caches

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        caches: Mapping[int, Cache],
        layouts: Mapping[str, Layout],
        *,
        logits_at: Int[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B n E"], dict[int, Cache]]:
        """`__call__` with caches and without the head.

        Returns:
            (hidden, caches): final hidden states after the norm, [B, n, E] in `dtype`, and the
            updated caches.
        """
        self._check_step(tokens, positions, caches, logits_at)
        self._check_layer_types("layouts", layouts)
        plans = self._plans(positions, layouts)
        return self._hidden(tokens, plans, dict(caches), logits_at)

    def _whole_sequences(self, tokens, positions, layouts, segment_ids, at):
        """Final hidden states of sequences that begin here, whose keys and values nobody keeps."""
        for name, given in (("positions", positions), ("layouts", layouts)):
            if given is not None:
                raise ValueError(f"{name} is given and caches is not; accepted: both, or neither")
        _check_integers("tokens", tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is not None:
            _check_integers("segment_ids", segment_ids, tokens.shape)
            ids = jnp.asarray(segment_ids, jnp.int32)
            # Rotations depend on distances alone, so a sequence may begin anywhere in its row.
            positions, segment_ids = jnp.where(ids == 0, -1, positions), SegmentIds(ids, ids)
        self._check_known_tokens(tokens, positions)
        self._check_at(tokens, at)
        layouts = dict.fromkeys(self.config.layer_types, Contiguous(*tokens.shape))
        plans = self._plans(positions, layouts, segment_ids)
        return self._hidden(tokens, plans, dict.fromkeys(self._producers()), at)[0]

    def _plans(self, positions, layouts, segment_ids=None):
        """What the layers of each type share in this step."""
        return {
            layer_type: plan_step(
                self.config.attention_spec(self.config.layer_types.index(layer_type)),
                positions,
                layouts[layer_type],
                segment_ids,
            )
            for layer_type in sorted(set(self.config.layer_types))
        }

    def _hidden(self, tokens, plans, caches, logits_at):
        """Final hidden states, and the caches; one that is None its layer makes."""
        x, per_layer = self._embed(jnp.asarray(tokens))
        h = self.layers[0].first_norm(x)
        shared_from = self._producers().stop
        x, h, caches = self._run(self.layers[:shared_from], x, h, per_layer, plans, caches)
        if logits_at is not None:
            # KV-shared layers write nothing that other tokens read, so these tokens are enough.
            x, h = _select(x, logits_at), _select(h, logits_at)
            per_layer = None if per_layer is None else _select(per_layer, logits_at)
            plans = {key: _select_plan(plan, logits_at) for key, plan in plans.items()}
        if x.size:  # attention takes no step without tokens
            _, h, caches = self._run(self.layers[shared_from:], x, h, per_layer, plans, caches)
        return h, caches

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

    def _run(self, layers, x, h, per_layer, plans, caches):
        """Some of the layers, over all caches."""
        norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for layer in layers:
            attention = layer.attention
            kv_layer = attention.spec.kv_layer
            is_shared = kv_layer != attention.layer
            x, h, cache = layer(
                x,
                h,
                plans[self.config.layer_types[attention.layer]],
                caches[kv_layer],
                norms[attention.layer][...],
                k_norm=self.layers[kv_layer].attention.k_norm[...] if is_shared else None,
                per_layer_input=None if per_layer is None else per_layer[:, :, attention.layer],
            )
            caches = caches | {kv_layer: cache}
        return x, h, caches

    def _producers(self):
        """Layers that have a cache of their own."""
        return range(self.config.num_hidden_layers - self.config.num_kv_shared_layers)

    def _check_step(self, tokens, positions, caches, at):
        _check_integers("tokens", tokens)
        if not hasattr(positions, "shape") or positions.ndim != 2:
            raise ValueError(f"positions is {positions!r}; accepted: an integer array [B, T]")
        if tokens.shape != positions.shape:
            raise ValueError(
                f"positions has shape {positions.shape}; with tokens of shape {tokens.shape} it "
                f"must be {tokens.shape}"
            )
        self._check_known_tokens(tokens, positions)
        self._check_at(tokens, at)
        if caches.keys() != set(self._producers()):
            raise ValueError(
                f"caches has layers {sorted(caches)}; accepted: those of init_caches, "
                f"{self._producers().start} to {self._producers().stop - 1}"
            )

    def _check_at(self, tokens, at):
        if at is None:
            return
        if at.ndim != 2 or at.shape[0] != tokens.shape[0]:
            raise ValueError(f"logits_at has shape {at.shape}; accepted: [{tokens.shape[0]}, n]")
        if not jnp.issubdtype(at.dtype, jnp.integer):
            raise ValueError(f"logits_at has dtype {at.dtype}; accepted: an integer")

    def _check_known_tokens(self, tokens, positions):
        """Refuses tokens without an embedding, unless they are traced or known to be padding."""
        if not _is_known(tokens):
            return
        tokens, accepted = np.asarray(tokens), num_embedded_tokens(self.config)
        wrong = (tokens < 0) | (tokens >= accepted)
        if wrong.any() and _is_known(positions):
            wrong &= np.asarray(positions) >= 0
        if wrong.any():
            reason = ""
            if accepted < self.config.vocab_size:
                reason = f"; vocab_size_per_layer_input is {accepted}"
            raise ValueError(
                f"tokens has {tokens[wrong][0]}; accepted: tokens 0 to {accepted - 1}{reason}"
            )

    def _check_layer_types(self, name, given, *, all_needed=True):
        """Refuses a dict by layer type that lacks one or has what is none."""
        types = sorted(set(self.config.layer_types))
        missing = [layer_type for layer_type in types if layer_type not in given]
        if all_needed and missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}; the model has such layers")
        surplus = [key for key in given if key not in ("sliding_attention", "full_attention")]
        if surplus:
            raise ValueError(f"{name} has {surplus[0]!r}; accepted: {', '.join(types)}")


def _is_known(array):
    """Whether the numbers of an array are to be had here: neither traced nor of other hosts."""
    is_traced = isinstance(array, jax.core.Tracer)
    return not is_traced and getattr(array, "is_fully_addressable", True)


def _select(array, at):
    """Tokens `at` [B, n] of an array [B, T, ...]."""
    return jnp.take_along_axis(array, at.reshape(*at.shape, *[1] * (array.ndim - 2)), axis=1)


def _select_plan(plan, at):
    """The plan of tokens `at` [B, n] alone, for layers that write nothing."""
    fields = {
        name: _select(getattr(plan, name), at) for name in ("positions", "cos", "sin", "slots")
    }
    if plan.segment_ids is not None:
        query = _select(plan.segment_ids.query, at)
        fields["segment_ids"] = plan.segment_ids._replace(query=query)
    return dataclasses.replace(plan, **fields)


def _check_integers(name, array, shape=None):
    """Refuses what is no integer array [B, T], of a shape that is known if one is given."""
    if not hasattr(array, "shape") or array.ndim != 2:
        raise ValueError(f"{name} is {array!r}; accepted: an integer array [B, T]")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; accepted: an integer")
    if 0 in array.shape or shape not in (None, array.shape):
        accepted = "[B, T], neither 0" if shape is None else shape
        raise ValueError(f"{name} has shape {array.shape}; accepted: {accepted}")
