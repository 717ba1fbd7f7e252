"""Decoders with some of the kernels, and XLA for the rest: the variants of `decode_step`."""

import enum

from flax import nnx

from g4attn_jax import Gemma4Attention, Gemma4Decoder, ProjectionMode, ops
from g4attn_jax.rope import apply_rope


class Variant(enum.Enum):
    """Kernels of a decoder: each variant has those of the one before it too.

    Tables name them by letters; b to d are the steps that SGLang PR 25461 took.
    """

    XLA = "a: XLA only"
    AROUND = "a2: + the kernels around attention: matmuls of few tokens, sums with their norms"
    K_EQ_V_NORM = "b: + shared-rrms K = V norm"
    QKV_NORM = "c: + Q in the same launch"
    PROLOGUE = "d: + RoPE and cache write: the one-launch prologue"
    ATTENTION = "e: + decode attention"
    COMPACT = "f: + compact K = V cache"

    @property
    def letter(self) -> str:
        """Name in tables."""
        return self.value.split(":")[0]

    def has(self, other: "Variant") -> bool:
        """Whether it has the kernels that `other` adds."""
        order = list(Variant)
        return order.index(self) >= order.index(other)


class AblatedAttention(Gemma4Attention):
    """Attention of a layer, with its weights, by the kernels of a variant."""

    def __init__(self, layer: Gemma4Attention, variant: Variant):
        self.variant = variant
        self.spec, self.layer, self.hidden_size = layer.spec, layer.layer, layer.hidden_size
        self.dtype = layer.dtype
        self.implementation = None if variant.has(Variant.AROUND) else "xla"
        self.qkv_proj, self.o_proj = layer.qkv_proj, layer.o_proj
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm

    def _prologue(self, qkv, k_norm, plan, cache, implementation):
        mode, eps = self.spec.mode, self.spec.eps
        has_k_eq_v = self.variant.has(Variant.K_EQ_V_NORM) and mode is ProjectionMode.QK_ONLY
        has_qkv = self.variant.has(Variant.QKV_NORM)
        if self.variant.has(Variant.PROLOGUE):
            return super()._prologue(qkv, k_norm, plan, cache, None)
        if not (has_k_eq_v or has_qkv):
            return super()._prologue(qkv, k_norm, plan, cache, "xla")
        q, k, v = ops.qkv_rms_norm(
            qkv,
            self.q_norm[...],
            None if mode is ProjectionMode.Q_ONLY else k_norm,
            mode=mode,
            eps=eps,
            implementation=None if has_qkv else "xla",
        )
        if not has_qkv:
            k, v = self._k_eq_v_norm(qkv, k_norm)
        q = cache.query(apply_rope(q, plan.cos, plan.sin), k_norm, self.spec.rotary_dim)
        if k is not None:
            cache = cache.write(plan.slots, apply_rope(k, plan.cos, plan.sin), v)
        return q, cache

    def _attend(self, q, cache, plan, implementation):
        has_kernel = self.variant.has(Variant.ATTENTION)
        return super()._attend(q, cache, plan, None if has_kernel else "xla")

    def _k_eq_v_norm(self, qkv, k_norm):
        """K and V of one row, in one launch for them."""
        from g4attn_jax.ops.head_norm.triton import Heads, head_norm

        *batch, num_kv_heads, rows, head_dim = qkv.shape
        x = qkv.reshape(-1, head_dim)
        heads = Heads(x, first=rows - 1, count=1, scales=(k_norm, None))
        groups = x.shape[0] // rows
        outputs = head_norm([heads], groups=groups, eps=self.spec.eps)
        return [y.reshape(*batch, num_kv_heads, head_dim) for y in outputs]


def ablate(decoder: Gemma4Decoder, variant: Variant) -> Gemma4Decoder:
    """Changes a decoder in place to the kernels of a variant; its weights keep their names."""
    if not variant.has(Variant.AROUND):
        for _, module in nnx.iter_modules(decoder):
            if hasattr(module, "implementation"):
                module.implementation = "xla"
    for layer in decoder.layers:
        layer.attention = AblatedAttention(layer.attention, variant)
    return decoder
