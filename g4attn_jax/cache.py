"""KV caches of a layer: K and V, or for K = V layers V and the rotated band of K.

A cache is a plain pytree, passed in and returned. Its arrays are [num_pages, page_size, Nkv,
width]; slot s is row s of the first two axes taken as one. Which slot a token has is said by
`g4attn_jax.layout`; the two do not know each other.

Both forms have the same members, which say what is known of a form: what queries are multiplied
with, what a layer writes, which layers can have it. Nothing outside this file asks which form a
cache is.
"""

import math
from typing import NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from g4attn_jax.checks import check_choice, check_integer
from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


# Of `scale`: which is of keys, and which of values.
_OF_K, _OF_V = 0, 1


class CachePart(NamedTuple):
    """Array of a cache, and what attention makes of it; its true value is array * scale.

    Attributes:
        array: [num_pages, page_size, Nkv, width].
        scales: `scale` of the cache.
        scale_index: which of `scales` is that of the array.
        begin: first of the query's columns that the array is multiplied with.
    """

    array: Float[Array, "num_pages page_size Nkv width"]
    scales: Float[Array, "2"] | None
    scale_index: int
    begin: int = 0

    @property
    def scale(self) -> Float[Array, ""] | None:
        """Factor of the array; None is 1."""
        return None if self.scales is None else self.scales[self.scale_index]

    @property
    def width(self) -> int:
        """Numbers of a slot and KV head."""
        return self.array.shape[-1]

    @property
    def columns(self) -> slice:
        """Columns of the query that the array is multiplied with."""
        return slice(self.begin, self.begin + self.width)


class KVCache(NamedTuple):
    """Keys and values of one layer.

    Attributes:
        k: [num_pages, page_size, Nkv, D], normalised and rotated keys.
        v: [num_pages, page_size, Nkv, D], normalised values.
        scale: float32 [2] if k and v are float8: what is stored is k / scale[0] and v / scale[1].
    """

    k: Float[Array, "num_pages page_size Nkv D"]
    v: Float[Array, "num_pages page_size Nkv D"]
    scale: Float[Array, "2"] | None = None

    # Whether the values are keys too.
    values_are_keys = False
    # Whether queries are multiplied by the k_norm of the layer that wrote the cache.
    absorbs_k_norm = False
    # Layers that can write or read such a cache.
    modes = frozenset(ProjectionMode)

    @classmethod
    def widths(cls, spec: AttentionSpec) -> dict[str, int]:
        """Numbers per slot and KV head in each array."""
        return cls.array_widths(spec.head_dim, spec.rotary_dim)

    @staticmethod
    def array_widths(head_dim: int, rotary_dim: int) -> dict[str, int]:
        """Numbers per slot and KV head in each array, of heads of a size."""
        del rotary_dim
        return {"k": head_dim, "v": head_dim}

    @staticmethod
    def query_width(head_dim: int, rotary_dim: int) -> int:
        """Numbers of a head of `query`."""
        del rotary_dim
        return head_dim

    @property
    def key_parts(self) -> tuple[CachePart, ...]:
        """Arrays that queries are multiplied with, in the order of the query's columns."""
        return (CachePart(self.k, self.scale, _OF_K),)

    @property
    def value_part(self) -> CachePart:
        """Array that attention weights are multiplied with."""
        return CachePart(self.v, self.scale, _OF_V)

    @property
    def written(self) -> tuple[Array, Array]:
        """Arrays that a layer writes keys, or what is stored of them, and values to."""
        return self.k, self.v

    def with_written(self, k: Array, v: Array) -> Self:
        """Cache with other arrays for those of `written`."""
        return self._replace(k=k, v=v)

    @staticmethod
    def query(
        q: Float[Array, "*batch Nq D"], k_norm: Float[Array, " D"] | None, rotary_dim: int
    ) -> Float[Array, "*batch Nq D"]:
        """Query that `key_parts` are for: q itself."""
        return q

    @staticmethod
    def stored_keys(k: Float[Array, "*batch Nkv D"], rotary_dim: int) -> Float[Array, "..."]:
        """Dims of keys that are stored as keys: all."""
        del rotary_dim
        return k

    def write(
        self,
        slots: Int[Array, "*batch"],
        k: Float[Array, "*batch Nkv D"],
        v: Float[Array, "*batch Nkv D"],
    ) -> Self:
        """Cache with k and v in `slots`, rounded once; a slot it does not have is left out.

        Slots that it has must differ. Inside `jax.jit`, with the cache donated, it is in place.
        """
        return _written(self, slots, k, v)


class CompactKVCache(NamedTuple):
    """Values and the rotated band of the keys, for layers where K = V up to scale and rotation.

    With n = rms(Wk x), V = n and K = rope(n * k_norm), of which R dims carry position. The others
    are n * k_norm, so V has them already, and k_norm goes to the query:

        q k^T = [q * k_norm, 0 in the band ; q in the band] [v ; k_rot]^T

    Attributes:
        v: [num_pages, page_size, Nkv, D], normalised values.
        k_rot: [num_pages, page_size, Nkv, R], dims 0 .. R/2 - 1 and D/2 .. D/2 + R/2 - 1 of the
            rotated keys.
        scale: float32 [2] if they are float8: what is stored is k_rot / scale[0] and v / scale[1].
    """

    v: Float[Array, "num_pages page_size Nkv D"]
    k_rot: Float[Array, "num_pages page_size Nkv R"]
    scale: Float[Array, "2"] | None = None

    values_are_keys = True
    absorbs_k_norm = True
    modes = frozenset({ProjectionMode.QK_ONLY, ProjectionMode.Q_ONLY})

    @classmethod
    def widths(cls, spec: AttentionSpec) -> dict[str, int]:
        """Numbers per slot and KV head in each array.

        Raises:
            ValueError: K and V of the layer are not one projection, or no dim rotates.
        """
        if spec.mode is not ProjectionMode.QK_ONLY:
            raise ValueError(
                f"CompactKVCache holds one projection as K and V; {spec.mode.name} layers have "
                "none such. Accepted: QK_ONLY layers, or KVCache"
            )
        if spec.rotary_dim == 0:
            raise ValueError("rotary_dim is 0; CompactKVCache accepts 2 or more")
        return cls.array_widths(spec.head_dim, spec.rotary_dim)

    @staticmethod
    def array_widths(head_dim: int, rotary_dim: int) -> dict[str, int]:
        """Numbers per slot and KV head in each array, of heads of a size."""
        return {"v": head_dim, "k_rot": rotary_dim}

    @staticmethod
    def query_width(head_dim: int, rotary_dim: int) -> int:
        """Numbers of a head of `query`."""
        return head_dim + rotary_dim

    @property
    def key_parts(self) -> tuple[CachePart, ...]:
        """Arrays that queries are multiplied with, in the order of the query's columns."""
        return (
            self.value_part,
            CachePart(self.k_rot, self.scale, _OF_K, begin=self.v.shape[-1]),
        )

    @property
    def value_part(self) -> CachePart:
        """Array that attention weights are multiplied with."""
        return CachePart(self.v, self.scale, _OF_V)

    @property
    def written(self) -> tuple[Array, Array]:
        """Arrays that a layer writes keys, or what is stored of them, and values to."""
        return self.k_rot, self.v

    def with_written(self, k: Array, v: Array) -> Self:
        """Cache with other arrays for those of `written`."""
        return self._replace(k_rot=k, v=v)

    @staticmethod
    def query(
        q: Float[Array, "*batch Nq D"], k_norm: Float[Array, " D"], rotary_dim: int
    ) -> Float[Array, "*batch Nq D+R"]:
        """Absorbed query that `key_parts` are for, of rotated q: D numbers for v, R for k_rot."""
        half, pairs = q.shape[-1] // 2, rotary_dim // 2
        rotates = jnp.arange(2 * half) % half < pairs
        absorbed = jnp.where(rotates, 0, q * k_norm.astype(q.dtype))
        return jnp.concatenate([absorbed, _band(q, rotary_dim)], axis=-1)

    @staticmethod
    def stored_keys(k: Float[Array, "*batch Nkv D"], rotary_dim: int) -> Float[Array, "..."]:
        """Dims of keys that are stored as keys: those that rotate."""
        return _band(k, rotary_dim)

    def write(
        self,
        slots: Int[Array, "*batch"],
        k: Float[Array, "*batch Nkv D"],
        v: Float[Array, "*batch Nkv D"],
    ) -> Self:
        """Cache with whole keys k, and v, in `slots`, as `KVCache.write`."""
        return _written(self, slots, k, v)


Cache = KVCache | CompactKVCache


class ReadableCache(NamedTuple):
    """A cache for layers other than the one that writes it.

    Attributes:
        cache: of the layer that writes it.
        k_norm: [D], that layer's, which queries are multiplied with in a compact form.
    """

    cache: Cache
    k_norm: Float[Array, " D"]


def check_form(form: type[Cache]) -> None:
    """Refuses what is no form of a cache.

    Raises:
        ValueError: saying what is accepted.
    """
    check_choice("form", form, get_args(Cache))


def array_names(cache: Cache) -> tuple[str, ...]:
    """Names of the arrays that have a row for every slot."""
    return tuple(name for name in cache._fields if name != "scale")


def zeros(
    form: type[Cache],
    spec: AttentionSpec,
    *,
    num_pages: int,
    page_size: int,
    dtype: jax.typing.DTypeLike,
    scale: Float[Array, "2"] | None = None,
) -> Cache:
    """Empty cache of a layer; float8_e4m3fn needs a scale, see `float8_scale`.

    Raises:
        ValueError: the layer cannot have a cache of this form, or scale is missing or surplus.
    """
    check_form(form)
    if (scale is None) != (jnp.dtype(dtype) != FLOAT8):
        raise ValueError(
            f"dtype is {jnp.dtype(dtype)} and scale is {'missing' if scale is None else 'given'}; "
            f"accepted: a scale with {FLOAT8}, None with others"
        )
    return form(
        **{
            name: jnp.zeros((num_pages, page_size, spec.num_kv_heads, width), dtype)
            for name, width in form.widths(spec).items()
        },
        scale=scale,
    )


def float8_scale(k_norm: Float[Array, " D"]) -> Float[Array, "2"]:
    """Scales of K and V with which no key or value overflows float8_e4m3fn.

    A normalised head has the norm sqrt(D) at most, so no dim of V exceeds it, and none of K,
    rotated or not, sqrt(D) max |k_norm|. These become 448, the largest float8_e4m3fn.
    """
    largest = jnp.stack([jnp.max(jnp.abs(k_norm.astype(jnp.float32))), jnp.float32(1)])
    largest = jnp.maximum(largest, 1e-20)  # a K of zeros is to be 0 / scale, not 0 / 0
    return largest * math.sqrt(k_norm.shape[-1]) / float(jnp.finfo(FLOAT8).max)


def float8_refusal(cache: Cache) -> str | None:
    """Reason for which a kernel cannot address a cache, or None.

    Pallas' offsets are int32 numbers of elements in arrays of up to 2^32 bytes.
    """
    for name, array in zip(cache._fields, cache, strict=True):
        if array is not None and array.dtype == FLOAT8 and 2**31 < array.size <= 2**32:
            return (
                f"cache.{name} has {array.size} elements of float8; kernels accept up to 2^31, or "
                "more than 2^32"
            )
    return None


def bytes_per_token(
    spec: AttentionSpec, form: type[Cache] = KVCache, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> int:
    """Bytes that one token takes in one layer's cache of the given form; 0 for a Q_ONLY layer.

    Raises:
        ValueError: the layer cannot have a cache of this form.
    """
    check_form(form)
    if spec.mode is ProjectionMode.Q_ONLY:
        return 0
    return sum(form.widths(spec).values()) * spec.num_kv_heads * jnp.dtype(dtype).itemsize


def model_bytes(
    config: Gemma4Config,
    tokens: int,
    *,
    compact: bool = False,
    ring_capacity: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> int:
    """Bytes that one sequence of `tokens` takes in the caches of a whole model.

    Args:
        config: of the model.
        tokens: the sequence's length.
        compact: whether QK_ONLY layers have the compact form.
        ring_capacity: slots of a sliding layer's ring (`Ring.capacity`); None if sliding layers
            keep every token as full ones do.
        dtype: of the storage.

    Raises:
        ValueError: tokens or ring_capacity is negative.
    """
    check_integer("tokens", tokens, 0)
    check_integer("ring_capacity", ring_capacity, 0, none=True)
    total = 0
    for layer in range(config.num_hidden_layers):
        spec = config.attention_spec(layer)
        form = CompactKVCache if compact and spec.mode is ProjectionMode.QK_ONLY else KVCache
        ring = spec.sliding_window is not None and ring_capacity is not None
        total += bytes_per_token(spec, form, dtype) * (ring_capacity if ring else tokens)
    return total


def _written(cache, slots, k, v):
    """`write` of either form: each array with its rows, divided by its scale."""
    k_array, v_array = cache.written
    k = cache.stored_keys(k, k_array.shape[-1])
    return cache.with_written(
        _write(k_array, slots, k, cache.scale, _OF_K), _write(v_array, slots, v, cache.scale, _OF_V)
    )


def _band(x, rotary_dim):
    """Dims of x that rotate: [..., R]."""
    half, pairs = x.shape[-1] // 2, rotary_dim // 2
    return jnp.concatenate([x[..., :pairs], x[..., half : half + pairs]], axis=-1)


def _write(array, slots, rows, scales, scale_index):
    """`array` [num_pages, page_size, Nkv, width] with rows [..., Nkv, width] in `slots` [...]."""
    if scales is not None:
        rows = rows / scales[scale_index]
    flat = array.reshape(-1, *array.shape[2:])
    # A negative index would count from the end; those past the end are dropped. They differ too.
    past = flat.shape[0] + jnp.arange(slots.size, dtype=slots.dtype).reshape(slots.shape)
    slots = jnp.where((slots >= 0) & (slots < flat.shape[0]), slots, past)
    flat = flat.at[slots].set(rows.astype(array.dtype), mode="drop", unique_indices=True)
    return flat.reshape(array.shape)
