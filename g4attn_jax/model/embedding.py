"""Tokens that a model can read, and the per-layer inputs of tokens."""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax.config import Gemma4Config
from g4attn_jax.model.linear import Embedding, Linear, ModuleOptions
from g4attn_jax.ops.head_norm.reference import rms_norm


def num_embedded_tokens(config: Gemma4Config) -> int:
    """Number of tokens that a decoder can read: the first so many of the vocabulary.

    A token from `vocab_size_per_layer_input` on has no per-layer embedding. The model can choose
    it, but not read it: `Embedding` makes NaN of it, and `Gemma4ForCausalLM` of Hugging Face
    transformers 5.24 raises an IndexError.
    """
    if config.hidden_size_per_layer_input:
        return min(config.vocab_size, config.vocab_size_per_layer_input)
    return config.vocab_size


class PerLayerInputs(nnx.Module):
    """A vector for every token and layer (PLE: E2B and E4B), from two sources of equal weight.

        p = (rms(x W / sqrt(E)) * norm + embed_tokens[token] * sqrt(P)) / sqrt(2)

    in float32, rounded once.

    Attributes:
        embed_tokens: [Vp, L, P].
        projection: W, [E, L, P].
        norm: [P].

    Source: `Gemma4TextModel.project_per_layer_inputs` of Hugging Face transformers 5.23.
    """

    def __init__(self, config: Gemma4Config, options: ModuleOptions):
        """Builds the module with random weights.

        Args:
            config: of the whole model.
            options: of the model.
        """
        tokens = {"vocab": config.vocab_size_per_layer_input}
        width = {"per_layer": config.hidden_size_per_layer_input}
        outputs = {"layers": config.num_hidden_layers, **width}
        self.eps = config.rms_norm_eps
        # Added in float32, so not rounded before.
        self.embed_tokens = Embedding(tokens, outputs, options.in_float32())
        self.projection = Linear({"embed": config.hidden_size}, outputs, options)
        self.norm = options.norm_scale(width)

    def __call__(
        self, x: Float[Array, "B T E"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T L P"]:
        """Per-layer inputs of every token.

        Args:
            x: [B, T, E], the scaled embeddings.
            tokens: integer [B, T].

        Returns:
            [B, T, L, P] in x's dtype.
        """
        with jax.named_scope("per_layer_inputs"):
            of_tokens = self.embed_tokens(tokens)
            projected = self.projection.float32(x) / math.sqrt(x.shape[-1])
            projected = rms_norm(projected, self.norm[...], eps=self.eps)
            return ((projected + of_tokens) / math.sqrt(2)).astype(x.dtype)
