"""The gated MLP."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from g4attn_jax import ops
from g4attn_jax.model.linear import GatedLinear, Linear, ModuleOptions


class Gemma4MLP(nnx.Module):
    """y = (gelu(x Wg) * x Wu) Wd, with the tanh form of gelu.

    Attributes:
        gate_up_proj: Wg and Wu, [E, 2, F].
        down_proj: Wd, [F, E].

    Source: Shazeer, "GLU Variants Improve Transformer" (2020); `Gemma4TextMLP` of Hugging Face
    transformers 5.23.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, options: ModuleOptions):
        """Builds the MLP with random weights.

        Args:
            hidden_size: E.
            intermediate_size: F.
            options: of the model.
        """
        embed, width = {"embed": hidden_size}, {"mlp": intermediate_size}
        self.dtype = options.dtype
        self.gate_up_proj = GatedLinear(embed, width, options)
        self.down_proj = Linear(width, embed, options)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The MLP of every token.

        Args:
            x: [B, T, E]; cast to `dtype`.
        """
        return ops.add_partial_sums(self.partial_sums(x), self.dtype)

    def partial_sums(self, x: Float[Array, "B T E"]) -> Float[Array, "partial_sums B T E"]:
        """Partial sums of the MLP of every token, see `ops.linear_partial_sums`."""
        with jax.named_scope("gate_up"):
            gated = self.gate_up_proj(x)
        with jax.named_scope("down"):
            return self.down_proj.partial_sums(gated)
