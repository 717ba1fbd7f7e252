"""Formula of RMSNorm, for one kind of head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"] | None = None,
    *,
    eps: float,
    scale_offset: float = 0.0,
) -> Float[Array, "*batch D"]:
    """x * rsqrt(mean(x^2) + eps) * (scale_offset + scale), in float32, rounded once to x's dtype.

    Without a scale the last factor is 1. Source: Zhang and Sennrich, "Root Mean Square Layer
    Normalization" (2019); the order of roundings is that of Gemma 4's `Gemma4RMSNorm` in Hugging
    Face transformers.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * (scale_offset + scale.astype(jnp.float32))
    return y.astype(x.dtype)
