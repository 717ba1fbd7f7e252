"""From tokens to vectors, and from vectors to what each layer is told of its token."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from g4attn_jax.config import Gemma4Config
from g4attn_jax.ops.head_norm.reference import rms_norm


def num_embedded_tokens(config: Gemma4Config) -> int:
    """Number of tokens that a decoder can read: the first so many of the vocabulary.

    A token from `vocab_size_per_layer_input` on has no per-layer embedding. The model can choose
    it, but not read it: `embed` makes NaN of it, and `Gemma4ForCausalLM` of Hugging Face
    transformers 5.24 raises an IndexError.
    """
    if config.hidden_size_per_layer_input:
        return min(config.vocab_size, config.vocab_size_per_layer_input)
    return config.vocab_size


def embed(table: Float[Array, "V *width"], tokens: Int[Array, "B T"]) -> Float[Array, "B T *width"]:
    """table[token] * sqrt(width), the root rounded to the table's dtype: 55.5, not 55.43.

    A token that the table does not have becomes NaN, where JAX would take the last row.

    Args:
        table: [V, E], or [Vp, L, P], where the root is that of P.
        tokens: integer [B, T].

    Source: `Gemma4TextScaledWordEmbedding` of Hugging Face transformers 5.23.
    """
    root = jnp.asarray(math.sqrt(table.shape[-1]), table.dtype)
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan) * root


def per_layer_inputs(
    x: Float[Array, "B T E"],
    of_tokens: Float[Array, "B T L P"],
    projection: Float[Array, "E L P"],
    scale: Float[Array, " P"],
    *,
    eps: float,
) -> Float[Array, "B T L P"]:
    """What every layer is told of every token (E2B and E4B), from two sources of equal weight.

        (rms(x W / sqrt(E)) * scale + of_tokens) / sqrt(2)

    in float32, rounded once to x's dtype.

    Args:
        x: [B, T, E], the scaled embeddings.
        of_tokens: [B, T, L, P], the scaled per-layer embeddings.
        projection: W, [E, L, P].
        scale: [P], of the norm.
        eps: of the norm.

    Source: `Gemma4TextModel.project_per_layer_inputs` of Hugging Face transformers 5.23.
    """
    projected = jnp.einsum(
        "bte,elp->btlp", x, projection.astype(x.dtype), preferred_element_type=jnp.float32
    )
    projected = rms_norm(projected / math.sqrt(x.shape[-1]), scale, eps=eps)
    return ((projected + of_tokens) / math.sqrt(2)).astype(x.dtype)
