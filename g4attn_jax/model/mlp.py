"""The gated MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from g4attn_jax import ops


class Gemma4MLP(nnx.Module):
    """y = (gelu(x Wg) * x Wu) Wd, with the tanh form of gelu.

    Attributes:
        gate_up_proj: Wg and Wu, [E, 2, F]: one matmul for both.
        down_proj: Wd, [F, E].

    Source: Shazeer, "GLU Variants Improve Transformer" (2020); `Gemma4TextMLP` of Hugging Face
    transformers 5.23.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        implementation: ops.Implementation | None = None,
    ):
        """Builds the MLP with random weights.

        Args:
            hidden_size: E.
            intermediate_size: F.
            rngs: stream `params` draws the weights.
            dtype: of activations.
            param_dtype: of the weights.
            implementation: see `ops.linear`.
        """
        self.dtype = jnp.dtype(dtype)
        self.implementation = implementation
        gate_up_init = nnx.initializers.lecun_uniform(in_axis=0, out_axis=(1, 2))
        gate_up_shape = (hidden_size, 2, intermediate_size)
        down_shape = (intermediate_size, hidden_size)
        self.gate_up_proj = nnx.Param(gate_up_init(rngs.params(), gate_up_shape, param_dtype))
        self.down_proj = nnx.Param(
            nnx.initializers.lecun_uniform()(rngs.params(), down_shape, param_dtype)
        )

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The MLP of every token.

        Args:
            x: [B, T, E]; cast to `dtype`.
        """
        return ops.add_partial_sums(self.partial_sums(x), self.dtype)

    def partial_sums(self, x: Float[Array, "B T E"]) -> Float[Array, "parts B T E"]:
        """The same in parts that add up to it, see `ops.linear_partial_sums`."""
        x = x.astype(self.dtype)
        gate_up, down = (w[...].astype(self.dtype) for w in (self.gate_up_proj, self.down_proj))
        gated = ops.geglu(x, gate_up, implementation=self.implementation)
        return ops.linear_partial_sums(gated, down, implementation=self.implementation)
