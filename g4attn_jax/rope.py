"""Rotary position embedding, ordinary and proportional."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_cos_sin(
    positions: Int[Array, "*batch"], *, theta: float, head_dim: int, rotary_dim: int
) -> tuple[Float[Array, "*batch R/2"], Float[Array, "*batch R/2"]]:
    """Cosine and sine of position * theta^(-2 i / D) for pairs i = 0 .. R/2 - 1, in float32.

    The exponent's denominator is the whole head dim D also where only R < D dims rotate: that is
    what Gemma 4 calls proportional RoPE. With R = D it is the ordinary one.

    Args:
        positions: [...], integer.
        theta: base of the frequencies.
        head_dim: D.
        rotary_dim: R, twice the number of rotating pairs, at most D.

    Returns:
        (cos, sin), each float32 [..., R/2].

    Source: Su et al., "RoFormer" (2021); `rope_type: proportional` of Hugging Face transformers.
    """
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    # float64 here, at trace time, so that the only rounding of a frequency is the last one.
    inv_freq = jnp.asarray(theta ** (-2 * pairs / head_dim), jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "*batch N D"],
    cos: Float[Array, "*batch R/2"],
    sin: Float[Array, "*batch R/2"],
) -> Float[Array, "*batch N D"]:
    """Rotates dims i and i + D/2 of every head by the angle of pair i, for i < R/2.

        out[i]       = x[i] cos_i - x[i + D/2] sin_i
        out[i + D/2] = x[i + D/2] cos_i + x[i] sin_i

    in float32, rounded once to x's dtype. The other D - R dims are unchanged.

    Args:
        x: [..., N, D], heads of queries or keys.
        cos: [..., R/2], from `rope_cos_sin`.
        sin: [..., R/2], from `rope_cos_sin`.
    """
    pairs = cos.shape[-1]
    low, high = jnp.split(x, 2, axis=-1)
    a, b = low[..., :pairs].astype(jnp.float32), high[..., :pairs].astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated_low = (a * cos - b * sin).astype(x.dtype)
    rotated_high = (b * cos + a * sin).astype(x.dtype)
    return jnp.concatenate(
        [rotated_low, low[..., pairs:], rotated_high, high[..., pairs:]], axis=-1
    )
