"""One attention layer of a Gemma 4 model, as a Flax NNX module."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax import cache as caches
from g4attn_jax import ops
from g4attn_jax.cache import Cache, KVCache, ReadableCache
from g4attn_jax.checks import check_array
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.layout import (
    Contiguous,
    LayerType,
    Layout,
    StepPlan,
    check_layout,
    plan_step,
)
from g4attn_jax.model.linear import Linear, ModuleOptions, assign
from g4attn_jax.ops import checks
from g4attn_jax.ops.decode_attention import MAX_DECODE_TOKENS


class Gemma4Attention(nnx.Module):
    """Attention of one layer: projection, norm, RoPE, cache, softmax, output projection.

        q = rope(rms(Wq x) * q_norm)    k = rope(rms(Wk x) * k_norm)    v = rms(Wv x)
        y = Wo softmax(q k^T + mask) v

    The attention scale is 1. What is projected follows from the config (`ProjectionMode`): K = V
    layers project one row for both, KV-shared layers project Q alone and read the cache of layer
    `spec.kv_layer`. Letters: B batch, T new tokens, S capacity, E embed, Nq and Nkv query and KV
    heads, G = Nq / Nkv, P K and V projections, D head dim.

    Attributes:
        spec: `AttentionSpec` of the layer.
        qkv_proj: `Linear`, packed [E, Nkv, G + P, D]: for each KV head its query heads, then K,
            then V. Query head g * G + r is row r of KV head g.
        q_norm: [D].
        k_norm: [D]; None for Q_ONLY.
        o_proj: `Linear`, [Nq, D, E].

    Source: `Gemma4TextAttention` of Hugging Face transformers 5.23.
    """

    def __init__(
        self,
        config: Gemma4Config,
        layer: int,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
    ):
        """Builds the layer with random weights.

        Args:
            config: of the whole model.
            layer: 0 to num_hidden_layers - 1.
            rngs: stream `params` draws the weights.
            dtype: of activations, and of caches unless `init_cache` is told otherwise.
            param_dtype: of the weights; cast to `dtype` in every call where they differ.
            implementation: of the kernels: None, or a name that is demanded of every op that has a
                kernel of that name; other ops choose for themselves.

        Raises:
            ValueError: the model has no such layer, a dtype is not bfloat16, float16 or float32, or
                there is no such implementation.
            NotImplementedError: a kernel was demanded that cannot run here.
        """
        options = ModuleOptions(rngs, dtype, param_dtype, implementation)
        spec = config.attention_spec(layer)
        self.spec = spec
        self.layer = layer
        self.hidden_size = config.hidden_size
        self.dtype, self.implementation = options.dtype, options.implementation
        embed, head_dim = {"embed": config.hidden_size}, {"head_dim": spec.head_dim}
        rows = {
            "kv_heads": spec.num_kv_heads,
            "heads_per_group": spec.group_size + spec.mode.num_kv_projections,
        }
        self.qkv_proj = Linear(embed, rows | head_dim, options)
        self.o_proj = Linear({"heads": spec.num_q_heads} | head_dim, embed, options)
        self.q_norm = options.norm_scale(head_dim)
        projects_k = spec.mode is not ProjectionMode.Q_ONLY
        self.k_norm = options.norm_scale(head_dim) if projects_k else None

    def init_cache(
        self,
        layout: Layout,
        form: type[Cache] = KVCache,
        *,
        dtype: jax.typing.DTypeLike | None = None,
    ) -> Cache:
        """An empty cache.

        Args:
            layout: `Contiguous(batch, capacity)`, `Ring` or `Paged`.
            form: `KVCache`, or for QK_ONLY layers `CompactKVCache`.
            dtype: of the storage: the layer's, which None is, or float8_e4m3fn, with a scale that
                lets nothing overflow as long as `k_norm` stays what it is.

        Raises:
            ValueError: the layer is Q_ONLY and has no cache of its own, or cannot have one of this
                layout, form or dtype.
        """
        check_layout(layout)
        layout.check_layer(self.spec)
        if self.spec.mode is ProjectionMode.Q_ONLY:
            kv_layer = self.spec.kv_layer
            producer = "the target's last layer" if kv_layer is None else f"layer {kv_layer}"
            raise ValueError(
                f"layer {self.layer} is Q_ONLY: it reads the cache of {producer}; make it with "
                "that layer's init_cache"
            )
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        if dtype not in (self.dtype, caches.FLOAT8):
            raise ValueError(f"dtype is {dtype}; accepted: {self.dtype} or {caches.FLOAT8}")
        return caches.zeros(
            form,
            self.spec,
            num_pages=layout.num_pages,
            page_size=layout.page_size,
            dtype=dtype,
            scale=caches.float8_scale(self.k_norm[...]) if dtype == caches.FLOAT8 else None,
        )

    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"] | StepPlan,
        cache: Cache | ReadableCache | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache | ReadableCache]:
        """Attends from T new tokens per sequence to them and to what the cache holds.

        A token at position p sees positions 0 .. p, in a sliding layer the last `sliding_window`
        of them. They must have been written: by this call, or by earlier ones into `cache`.

        Args:
            x: [B, T, E], the hidden states.
            positions: integer [B, T], in a contiguous cache; -1 marks padding: nothing is written,
                the output is 0. Or, for any layout, the `StepPlan` that `plan_step` made for all
                layers of this type.
            cache: from `init_cache` or an earlier call, of either form. None is an empty one with
                room for these T tokens (a prompt alone, or training): then the call can be
                differentiated, with a cache it cannot. A Q_ONLY layer must be given the
                `ReadableCache` of what layer `spec.kv_layer` returned in this step and its
                `k_norm`; a `KVCache` may come by itself.

        Returns:
            (y, cache): y [B, T, E] in the layer's dtype, and the updated cache; a Q_ONLY layer
            returns the given one as it is. Donate the cache to a jitted step to update it in place.

        Raises:
            ValueError: an argument has the wrong shape or dtype, or as `plan_step` raises.
        """
        partial_sums, cache = self.partial_sums(x, positions, cache)
        return ops.add_partial_sums(partial_sums, self.dtype), cache

    def partial_sums(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"] | StepPlan,
        cache: Cache | ReadableCache | None = None,
    ) -> tuple[Float[Array, "partial_sums B T E"], Cache | ReadableCache]:
        """`__call__` with partial sums of y, see `ops.linear_partial_sums`.

        These are three steps, `project`, `attend` and `o_proj.partial_sums`: a layer can be cut
        between them, to run the projections together with what is before and after.
        """
        qkv = self.project(x)
        _check_not_empty("x", jnp.shape(x), qkv.shape[-5:-3], positions, cache)
        o, cache = self.attend(qkv, positions, cache)
        with jax.named_scope("o_proj"):
            return self.o_proj.partial_sums(o), cache

    def project(
        self, x: Float[Array, "B T E"]
    ) -> Float[Array, "B T Nkv rows D"] | Float[Array, "partial_sums B T Nkv rows D"]:
        """Packed projection of new tokens: rows are G query heads, then K, then V.

        Args:
            x: [B, T, E], the hidden states.

        Returns:
            [B, T, Nkv, G + P, D] in the layer's dtype, or where `ops.linear_partial_sums` makes
            more than one partial sum all of them, float32 [partial sums, B, T, Nkv, G + P, D].

        Raises:
            ValueError: x has the wrong shape or dtype.
        """
        x = jnp.asarray(x)
        check_array("x", x, ("B", "T", self.hidden_size), "floating", empty=True)
        with jax.named_scope("qkv_proj"):
            qkv = self.qkv_proj.partial_sums(x)
        qkv = qkv.reshape(*qkv.shape[:-1], *self.qkv_proj.weight.shape[1:])
        return qkv[0] if len(qkv) == 1 else qkv

    def attend(
        self,
        qkv: Float[Array, "B T Nkv rows D"] | Float[Array, "partial_sums B T Nkv rows D"],
        positions: Int[Array, "B T"] | StepPlan,
        cache: Cache | ReadableCache | None = None,
    ) -> tuple[Float[Array, "B T Nq D"], Cache | ReadableCache]:
        """Norms, RoPE, cache and softmax, from the projection to the heads' results.

        Args:
            qkv: as `project` returns it: [B, T, Nkv, G + P, D], or partial sums of it,
                [partial sums, B, T, Nkv, G + P, D].
            positions: as in `__call__`.
            cache: as in `__call__`.

        Returns:
            (o, cache): o [B, T, Nq, D] in the layer's dtype, for `o_proj`, and the cache as
            `__call__` returns it.

        Raises:
            ValueError: an argument has the wrong shape or dtype, or as `plan_step` raises.
        """
        qkv = jnp.asarray(qkv)
        shape, dtype = ("B", "T", *self.qkv_proj.weight.shape[1:]), self.dtype
        if qkv.ndim > len(shape):
            shape, dtype = ("partial sums", *shape), "floating"
        check_array("qkv", qkv, shape, dtype, empty=True)
        given, tokens = cache, qkv.shape[-5:-3]
        _check_not_empty("qkv", qkv.shape, tokens, positions, cache)
        cache, k_norm = self._with_k_norm(cache)
        if cache is not None:
            checks.check_cache(
                cache,
                mode=self.spec.mode,
                dtype=self.dtype,
                num_kv_heads=self.spec.num_kv_heads,
                head_dim=self.spec.head_dim,
                rotary_dim=self.spec.rotary_dim,
            )
        plan = self._planned(tokens, positions, cache)
        with jax.named_scope("qkv_norm_rope"):
            q, cache = self._prologue(qkv, k_norm, plan, cache, self.implementation)
        with jax.named_scope("attention"):
            o = self._attend(q, cache, plan, self.implementation)
        return o, given if isinstance(given, ReadableCache) else cache

    def load_hf(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the weights of a Hugging Face `Gemma4TextAttention`, cast to the param dtype.

        Args:
            state_dict: `q_proj.weight` [Nq D, E], `o_proj.weight` [E, Nq D], `q_norm.weight` [D];
                unless Q_ONLY `k_proj.weight` [Nkv D, E] and `k_norm.weight` [D]; for QKV_FULL
                `v_proj.weight` [Nkv D, E]. NumPy or JAX arrays, or anything with DLPack, such as
                PyTorch tensors.

        Raises:
            ValueError: a tensor is missing, surplus, misshapen or not floating point; the message
                names it, and no weight has been changed.
        """
        spec, embed = self.spec, self.hidden_size
        q_width, kv_width = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        shapes = {
            "q_proj.weight": (q_width, embed),
            "o_proj.weight": (embed, q_width),
            "q_norm.weight": (spec.head_dim,),
        }
        kv_projections = ("k_proj.weight", "v_proj.weight")[: spec.mode.num_kv_projections]
        shapes |= dict.fromkeys(kv_projections, (kv_width, embed))
        if kv_projections:
            shapes["k_norm.weight"] = (spec.head_dim,)
        where = f"layer {self.layer} ({spec.mode.name})"
        missing, surplus = shapes.keys() - state_dict.keys(), state_dict.keys() - shapes.keys()
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(sorted(missing))} of {where}")
        if surplus:
            names = ", ".join(sorted(map(str, surplus)))
            raise ValueError(f"state_dict has {names}; {where} has no such")
        tensors = {name: _as_array(name, state_dict[name], shape) for name, shape in shapes.items()}

        rows = [tensors["q_proj.weight"].reshape(spec.num_kv_heads, -1, spec.head_dim, embed)]
        rows += [
            tensors[n].reshape(spec.num_kv_heads, 1, spec.head_dim, embed) for n in kv_projections
        ]
        # Tensors read through DLPack lie where PyTorch has them.
        assign(self.qkv_proj.weight, jnp.concatenate(rows, axis=1).transpose(3, 0, 1, 2))
        assign(self.o_proj.weight, tensors["o_proj.weight"].T.reshape(-1, spec.head_dim, embed))
        assign(self.q_norm, tensors["q_norm.weight"])
        if kv_projections:
            assign(self.k_norm, tensors["k_norm.weight"])

    def _prologue(self, qkv, k_norm, plan, cache, implementation):
        """Queries, and the cache with the new keys and values."""
        heads = qkv, self.q_norm[...], k_norm, plan.cos, plan.sin
        constants = {
            "mode": self.spec.mode,
            "eps": self.spec.eps,
            "dtype": self.dtype if qkv.ndim == 6 else None,
            "implementation": implementation,
        }
        if cache is None:
            q, k, v = ops.qkv_norm_rope(*heads, **constants)
            return q, self.init_cache(plan.layout).write(plan.slots, k, v)
        return ops.qkv_norm_rope_write(*heads, plan.slots, cache, **constants)

    def _attend(self, q, cache, plan, implementation):
        arguments = q, cache, plan.layout.pages(), plan.placed
        constants = {
            "sliding_window": self.spec.sliding_window,
            "implementation": implementation,
        }
        if plan.segment_ids is not None:
            return ops.prefill_attention(*arguments, segment_ids=plan.segment_ids, **constants)
        is_step = q.shape[1] <= MAX_DECODE_TOKENS
        attend = ops.decode_attention if is_step else ops.prefill_attention
        return attend(*arguments, **constants)

    def _planned(self, tokens, positions, cache):
        """The plan of a step of [B, T] tokens, made here unless it was given."""
        if isinstance(positions, StepPlan):
            self._check_plan(positions, tokens, cache)
            return positions
        if not isinstance(positions, jax.Array):
            positions = np.asarray(positions)
        check_array("positions", positions, tokens, "integer")
        plan = plan_step(self.spec, positions, self._contiguous(tokens, cache))
        self._check_plan(plan, tokens, cache)
        return plan

    def _check_plan(self, plan, tokens, cache):
        """Refuses a plan of other tokens, of another layer type or of another cache."""
        check_array("plan.positions", plan.positions, tokens, "integer")
        if plan.layer_type != LayerType.of(self.spec):
            raise ValueError(
                f"the plan is for layers of {plan.layer_type}; layer {self.layer} is of "
                f"{LayerType.of(self.spec)}"
            )
        if cache is not None:
            pages = plan.layout.num_pages, plan.layout.page_size
            if cache.v.shape[:2] != pages:
                raise ValueError(
                    f"cache.v has shape {cache.v.shape}; with this layout it must be "
                    f"[{pages[0]}, {pages[1]}, {self.spec.num_kv_heads}, {self.spec.head_dim}]"
                )

    def _contiguous(self, tokens, cache):
        if cache is not None:
            return Contiguous(tokens[0], cache.v.shape[1])
        return Contiguous(*tokens)

    def _with_k_norm(self, cache):
        """(cache, norm scale of its keys), of this layer or of the one whose cache it reads."""
        if self.k_norm is None:
            return cache if isinstance(cache, ReadableCache) else (cache, None)
        if isinstance(cache, ReadableCache):
            raise ValueError(
                f"cache is a ReadableCache; layer {self.layer} is {self.spec.mode.name} and "
                "accepts a cache of its own"
            )
        return cache, self.k_norm[...]


def _check_not_empty(name, shape, tokens, positions, cache):
    """Refuses an array of no tokens where its cache and plan are made of them."""
    if cache is None and not isinstance(positions, StepPlan) and 0 in tokens:
        raise ValueError(f"{name} has shape {shape}; without a cache B and T must not be 0")


def _as_array(name, tensor, shape):
    try:
        if isinstance(tensor, np.ndarray):
            array = jnp.asarray(tensor)
        else:
            # PyTorch hands out no tensor that gradients flow through.
            array = jnp.from_dlpack(tensor.detach() if hasattr(tensor, "detach") else tensor)
    except (TypeError, ValueError, BufferError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{name} is a {type(tensor).__name__} that cannot be read ({error}); accepted: a NumPy "
            "or JAX array, or a contiguous tensor with DLPack"
        ) from error
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; accepted: {shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}; accepted: a floating-point dtype")
    return array
