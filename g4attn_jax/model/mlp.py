"""The gated MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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
    ):
        """Builds the MLP with random weights.

        Args:
            hidden_size: E.
            intermediate_size: F.
            rngs: stream `params` draws the weights.
            dtype: of activations.
            param_dtype: of the weights.
        """
        self.dtype = jnp.dtype(dtype)
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
            x: [B, T, E], in `dtype`.
        """
        gate_up = jnp.einsum("bte,ecf->btcf", x, self.gate_up_proj[...].astype(self.dtype))
        return gelu_gate(gate_up) @ self.down_proj[...].astype(self.dtype)


def gelu_gate(gate_up: Float[Array, "*batch 2 F"]) -> Float[Array, "*batch F"]:
    """gelu(gate) * up in float32, rounded once to the dtype of `gate_up`."""
    gate, up = jnp.unstack(gate_up.astype(jnp.float32), axis=-2)
    return (jax.nn.gelu(gate, approximate=True) * up).astype(gate_up.dtype)
