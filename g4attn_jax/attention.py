"""One attention layer of a Gemma 4 model, as a Flax NNX module."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax import ops
from g4attn_jax.cache import KVCache
from g4attn_jax.config import Gemma4Config, ProjectionMode
from g4attn_jax.ops import checks
from g4attn_jax.ops.implementation import check_implementation
from g4attn_jax.rope import apply_rope, rope_cos_sin


class Gemma4Attention(nnx.Module):
    """Attention of one layer: projection, norm, RoPE, cache, softmax, output projection.

        q = rope(rms(Wq x) * q_scale)    k = rope(rms(Wk x) * k_scale)    v = rms(Wv x)
        y = Wo softmax(q k^T + mask) v

    The attention scale is 1. What is projected follows from the config (`ProjectionMode`): K = V
    layers project one row for both, KV-shared layers project Q alone and read the cache of layer
    `spec.kv_layer`. Letters: B batch, T new tokens, S capacity, E embed, Nq and Nkv query and KV
    heads, G = Nq / Nkv, P K and V projections, D head dim.

    Attributes:
        spec: `AttentionSpec` of the layer.
        qkv_proj: packed weight [E, Nkv, G + P, D]: for each KV head its query heads, then K, then
            V. Query head g * G + r is row r of KV head g.
        q_scale: [D].
        k_scale: [D]; None for Q_ONLY.
        o_proj: [Nq, D, E].

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
        implementation: ops.Implementation | None = None,
    ):
        """Builds the layer with random weights.

        Args:
            config: of the whole model.
            layer: 0 to num_hidden_layers - 1.
            rngs: stream `params` draws the weights.
            dtype: of activations and cache.
            param_dtype: of the weights; cast to `dtype` in every call where they differ.
            implementation: of the norm, see `ops.qkv_rms_norm`.

        Raises:
            ValueError: the model has no such layer, a dtype is not bfloat16, float16 or float32, or
                there is no such implementation.
            NotImplementedError: "triton" was demanded and there is no supported GPU.
        """
        check_implementation(implementation)
        checks.check_dtype("dtype", dtype)
        checks.check_dtype("param_dtype", param_dtype)
        spec = config.attention_spec(layer)
        self.spec = spec
        self.layer = layer
        self.hidden_size = config.hidden_size
        self.dtype = jnp.dtype(dtype)
        self.implementation = implementation
        rows = spec.group_size + spec.mode.num_kv_projections
        qkv_init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        o_init = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        qkv_shape = (config.hidden_size, spec.num_kv_heads, rows, spec.head_dim)
        o_shape = (spec.num_q_heads, spec.head_dim, config.hidden_size)
        self.qkv_proj = nnx.Param(qkv_init(rngs.params(), qkv_shape, param_dtype))
        self.o_proj = nnx.Param(o_init(rngs.params(), o_shape, param_dtype))
        self.q_scale = nnx.Param(jnp.ones(spec.head_dim, param_dtype))
        projects_k = spec.mode is not ProjectionMode.Q_ONLY
        self.k_scale = nnx.Param(jnp.ones(spec.head_dim, param_dtype)) if projects_k else None

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, in the layer's dtype.

        Raises:
            ValueError: the layer is Q_ONLY and has no cache of its own, or a size is below 1.
        """
        for name, size in (("batch", batch), ("capacity", capacity)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; accepted: an integer of 1 or more")
        if self.spec.mode is ProjectionMode.Q_ONLY:
            raise ValueError(
                f"layer {self.layer} is Q_ONLY: it reads the cache of layer {self.spec.kv_layer}; "
                "make it with that layer's init_cache"
            )
        shape = (batch, capacity, self.spec.num_kv_heads, self.spec.head_dim)
        return KVCache.zeros(shape, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T E"], KVCache]:
        """Attends from T new tokens per sequence to them and to what the cache holds.

        A token at position p sees the slots 0 .. p, in a sliding layer the last `sliding_window`
        of them. They must have been written: by this call, or by earlier ones into `cache`.

        Args:
            x: [B, T, E], the hidden states.
            positions: integer [B, T]. -1 marks padding: nothing is written, the output is 0.
                Sequences may be at different positions.
            cache: from `init_cache` or an earlier call. None is an empty one with room for these T
                tokens (a prompt alone, or training). A Q_ONLY layer must be given the cache that
                layer `spec.kv_layer` returned in this step.

        Returns:
            (y, cache): y [B, T, E] in the layer's dtype, and the updated cache; a Q_ONLY layer
            returns the given one as it is. Donate the cache to a jitted step to update it in place.

        Raises:
            ValueError: an argument has the wrong shape or dtype, or a position does not fit the
                cache or is there twice in a sequence. Under `jit` positions are unknown: there a
                token past the capacity writes nothing and its output is NaN; of two tokens at one
                position either may stay.
        """
        if not isinstance(positions, jax.core.Tracer):
            positions = np.asarray(positions)  # as given: JAX would wrap what int32 does not hold
        x = jnp.asarray(x)
        self._check_inputs(x, positions)
        if cache is None:
            if x.size == 0:
                raise ValueError(f"x has shape {x.shape}; without a cache B and T must not be 0")
            cache = self.init_cache(*positions.shape)
        self._check_cache(cache, positions)

        x, positions = x.astype(self.dtype), _as_int32(positions)
        qkv = jnp.einsum("bte,eknd->btknd", x, self.qkv_proj[...].astype(self.dtype))
        q, k, v = ops.qkv_rms_norm(
            qkv,
            self.q_scale[...],
            None if self.k_scale is None else self.k_scale[...],
            mode=self.spec.mode,
            eps=self.spec.eps,
            implementation=self.implementation,
        )
        cos, sin = rope_cos_sin(
            positions,
            theta=self.spec.rope_theta,
            head_dim=self.spec.head_dim,
            rotary_dim=self.spec.rotary_dim,
        )
        q = apply_rope(q, cos, sin)
        if k is not None:
            cache = cache.write(positions, apply_rope(k, cos, sin), v)
        o = _attend(q, cache, positions, self.spec.sliding_window)
        y = jnp.einsum("btnd,nde->bte", o, self.o_proj[...].astype(self.dtype))
        # Refused by _check_cache where positions are known; loud where they are not.
        return jnp.where((positions < cache.capacity)[..., None], y, jnp.nan), cache

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
        _assign(self.qkv_proj, jnp.concatenate(rows, axis=1).transpose(3, 0, 1, 2))
        _assign(self.o_proj, tensors["o_proj.weight"].T.reshape(-1, spec.head_dim, embed))
        _assign(self.q_scale, tensors["q_norm.weight"])
        if kv_projections:
            _assign(self.k_scale, tensors["k_norm.weight"])

    def _check_inputs(self, x, positions):
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has shape {x.shape}; accepted: [B, T, {self.hidden_size}]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x has dtype {x.dtype}; accepted: a floating-point dtype")
        if positions.shape != x.shape[:2]:
            raise ValueError(
                f"positions has shape {positions.shape}; with x of shape {x.shape} it must be "
                f"{x.shape[:2]}"
            )
        if not jnp.issubdtype(positions.dtype, jnp.signedinteger):
            raise ValueError(f"positions has dtype {positions.dtype}; accepted: a signed integer")

    def _check_cache(self, cache, positions):
        if not isinstance(cache, KVCache):
            raise ValueError(f"cache is a {type(cache).__name__}; accepted: KVCache or None")
        heads = (self.spec.num_kv_heads, self.spec.head_dim)
        for name, array in cache._asdict().items():
            if not isinstance(array, jax.Array) or array.dtype != self.dtype:
                given = getattr(array, "dtype", None)
                raise ValueError(
                    f"cache.{name} is a {type(array).__name__} of dtype {given}; accepted: a JAX "
                    f"array of the layer's dtype, {self.dtype}"
                )
            shape = array.shape
            if len(shape) != 4 or shape[0] != positions.shape[0] or shape[2:] != heads:
                raise ValueError(
                    f"cache.{name} has shape {shape}; layer {self.layer} with {positions.shape[0]} "
                    f"sequences needs [{positions.shape[0]}, S, {heads[0]}, {heads[1]}]"
                )
        if cache.k.shape != cache.v.shape:
            raise ValueError(f"cache.v has shape {cache.v.shape}; cache.k has {cache.k.shape}")
        if isinstance(positions, jax.core.Tracer) or positions.size == 0:
            return
        lowest, highest = int(np.min(positions)), int(np.max(positions))
        if lowest < -1 or highest >= cache.capacity:
            raise ValueError(
                f"positions has {lowest if lowest < -1 else highest}; accepted: -1 (padding) and "
                f"0 to {cache.capacity - 1}, the cache's capacity being {cache.capacity}"
            )
        in_order = np.sort(positions, axis=1)
        repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
        if repeated.any():
            raise ValueError(
                f"positions has {in_order[:, 1:][repeated][0]} twice in a sequence; accepted: "
                "every position once, -1 (padding) excepted"
            )


# Up to this many tokens a sequence a step decodes (16 is the most that speculative decoding
# verifies at once) and is bound by reading the cache; above, it is a prefill, bound by arithmetic.
_MAX_DECODE_TOKENS = 16


def _attend(q, cache, positions, sliding_window):
    """softmax(q k^T + mask) v, float32 inside; padding (a negative position) gives zeros."""
    slot = jnp.arange(cache.capacity)
    visible = slot <= positions[..., None]
    if sliding_window is not None:
        visible &= slot > positions[..., None] - sliding_window
    k, v = cache
    if q.shape[1] <= _MAX_DECODE_TOKENS:
        o = _decode_attention(q, k, v, visible)
    else:
        o = jax.nn.dot_product_attention(
            q, k, v, mask=visible[:, None], scale=1.0, implementation="xla"
        )
    return jnp.where((positions >= 0)[..., None, None], o, 0)


def _decode_attention(q, k, v, visible):
    """Attention of few tokens, reading the cache as it lies.

    With a batch axis for KV heads, XLA transposes the whole cache for its matrix products, in
    every step. Here a cache row is one vector of all KV heads, and a query is zero outside its own:
    more multiplications, no copy.
    """
    batch, tokens, num_q_heads, head_dim = q.shape
    capacity, num_kv_heads = k.shape[1:3]
    rows, width = tokens * num_q_heads, num_kv_heads * head_dim
    own = jax.nn.one_hot(jnp.arange(num_q_heads) * num_kv_heads // num_q_heads, num_kv_heads)
    own = own[:, :, None] > 0  # [Nq, Nkv, 1]
    q = jnp.where(own, q[..., None, :], 0).reshape(batch, rows, width)
    k, v = k.reshape(batch, capacity, width), v.reshape(batch, capacity, width)
    scores = jnp.einsum("brw,bsw->brs", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, tokens, num_q_heads, capacity)
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, rows, capacity)
    o = jnp.einsum("brs,bsw->brw", weights, v)
    o = o.reshape(batch, tokens, num_q_heads, num_kv_heads, head_dim)
    return jnp.where(own, o, 0).sum(axis=-2)


def _as_int32(positions):
    """Saturated, not wrapped: a position that int32 does not hold stays past any capacity."""
    if positions.dtype.itemsize > 4:
        limits = jnp.iinfo(jnp.int32)
        positions = positions.clip(limits.min, limits.max)
    return jnp.asarray(positions, jnp.int32)


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


def _assign(param, value):
    # To where the parameter is: tensors read through DLPack lie where PyTorch has them.
    param[...] = jax.device_put(value.astype(param.dtype), param[...].sharding)
