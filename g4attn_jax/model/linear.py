"""Weights: how they are stored, named, cast and multiplied.

Every weight names its axes, see `logical_axes`.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from g4attn_jax import ops
from g4attn_jax.checks import check_dtype
from g4attn_jax.ops.op import check_implementation

Axes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class ModuleOptions:
    """Choices that all modules of a model share.

    Attributes:
        rngs: stream `params` draws the weights.
        dtype: of activations.
        param_dtype: of the weights; cast to `dtype` in every call where they differ.
        implementation: of the kernels: None, or a name that is demanded of every op that has it.

    Raises:
        ValueError: a dtype is not bfloat16, float16 or float32, or there is no such implementation.
        NotImplementedError: a kernel was demanded that cannot run here.
    """

    rngs: nnx.Rngs
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    param_dtype: jax.typing.DTypeLike = jnp.bfloat16
    implementation: str | None = None

    def __post_init__(self):
        check_implementation(self.implementation)
        for name in ("dtype", "param_dtype"):
            check_dtype(name, getattr(self, name))
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

    def in_float32(self) -> "ModuleOptions":
        """Options of a module whose activations are float32 whatever the model's are."""
        return dataclasses.replace(self, dtype=jnp.float32)

    def norm_scale(self, axes: Axes) -> nnx.Param:
        """A learned scale, of a norm for example, that is 1 throughout."""
        return nnx.Param(jnp.ones(tuple(axes.values()), self.param_dtype))


class Weight(nnx.Module):
    """A weight; subclasses multiply it.

    Attributes:
        weight: the parameter.
        axes: names of its axes.
        dtype: of products.
        implementation: of the kernels.
    """

    def __init__(self, axes: Axes, options: ModuleOptions, init: nnx.Initializer):
        """Draws the weight.

        Args:
            axes: names and sizes, in order.
            options: of the model.
            init: draws from a key, a shape and a dtype.
        """
        self.axes = tuple(axes)
        self.dtype, self.implementation = options.dtype, options.implementation
        shape = tuple(axes.values())
        self.weight = nnx.Param(init(options.rngs.params(), shape, options.param_dtype))

    def operand(self) -> Float[Array, "..."]:
        """The weight as products take it: in `dtype`."""
        return self.weight[...].astype(self.dtype)


class Linear(Weight):
    """y = x W, over one or several axes of x.

        Linear({"embed": E}, {"kv_heads": K, "head_dim": D}, options)

    has a weight [E, K, D] and makes [..., K, D] of [..., E].

    Attributes:
        weight: W, [*inputs, *outputs].
    """

    def __init__(
        self,
        inputs: Axes,
        outputs: Axes,
        options: ModuleOptions,
        *,
        init: nnx.Initializer | None = None,
    ):
        """Builds the module with a random weight.

        Args:
            inputs: axes of x that are summed over.
            outputs: axes of y in their place.
            options: of the model.
            init: draws the weight; None keeps the variance of x.
        """
        init = _keeping_variance(len(inputs), len(outputs)) if init is None else init
        super().__init__({**inputs, **outputs}, options, init)
        self.num_inputs = len(inputs)

    def __call__(self, x: Float[Array, "*batch_inputs"]) -> Float[Array, "*batch_outputs"]:
        """x W in `dtype`, see `ops.linear`.

        Args:
            x: [..., *inputs]; cast to `dtype`.

        Returns:
            [..., *outputs].
        """
        y = ops.linear(self._rows(x), self._matrix(), implementation=self.implementation)
        return y.reshape(*y.shape[:-1], *self.weight.shape[self.num_inputs :])

    def partial_sums(
        self, x: Float[Array, "*batch_inputs"]
    ) -> Float[Array, "partial_sums *batch N"]:
        """Partial sums of x W, for their reader to add; see `ops.linear_partial_sums`.

        Args:
            x: [..., *inputs]; cast to `dtype`.

        Returns:
            [partial sums, ..., N], N being all outputs.
        """
        return ops.linear_partial_sums(
            self._rows(x), self._matrix(), implementation=self.implementation
        )

    def float32(self, x: Float[Array, "*batch_inputs"]) -> Float[Array, "*batch_outputs"]:
        """x W, its float32 sums not rounded.

        Args:
            x: [..., *inputs]; cast to `dtype`.

        Returns:
            Float32 [..., *outputs].
        """
        partial_sums = ops.linear_partial_sums(
            self._rows(x), self._matrix(), dtype=jnp.float32, implementation=self.implementation
        )
        y = ops.add_partial_sums(partial_sums, jnp.float32)
        return y.reshape(*y.shape[:-1], *self.weight.shape[self.num_inputs :])

    def _matrix(self):
        w = self.operand()
        return w.reshape(math.prod(w.shape[: self.num_inputs]), -1)

    def _rows(self, x):
        size = math.prod(self.weight.shape[: self.num_inputs])
        return x.astype(self.dtype).reshape(*x.shape[: x.ndim - self.num_inputs], size)


class GatedLinear(Weight):
    """y = gelu(x Wg) * (x Wu), with the tanh form of gelu.

    Attributes:
        weight: Wg and Wu, [E, 2, F]: one matmul for both.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(self, inputs: Axes, outputs: Axes, options: ModuleOptions):
        """Builds the module with a random weight; arguments as of `Linear`, one axis each."""
        axes = {**inputs, "gate_up": 2, **outputs}
        super().__init__(axes, options, _keeping_variance(1, 2))

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch F"]:
        """The product of value and gate, see `ops.geglu`.

        Args:
            x: [..., E]; cast to `dtype`.
        """
        return ops.geglu(x.astype(self.dtype), self.operand(), implementation=self.implementation)


class GroupedLinear(Weight):
    """y = x W[expert of the row], for rows that are sorted by expert.

    Attributes:
        weight: W, [X, K, N].
    """

    def __init__(self, groups: Axes, inputs: Axes, outputs: Axes, options: ModuleOptions):
        """Builds the module with a random weight.

        Args:
            groups: the axis of experts.
            inputs, outputs, options: as of `Linear`, for one expert.
        """
        init = _keeping_variance(len(inputs), len(outputs), num_groups=1)
        super().__init__({**groups, **inputs, **outputs}, options, init)

    def __call__(
        self, x: Float[Array, "rows K"], group_sizes: Int[Array, " X"]
    ) -> Float[Array, "rows N"]:
        """x W, see `ops.grouped_matmul`.

        Args:
            x: [rows, K]; cast to `dtype`.
            group_sizes: int32 [X], rows of each expert.
        """
        return ops.grouped_matmul(
            x.astype(self.dtype), self.operand(), group_sizes, implementation=self.implementation
        )


class GatedGroupedLinear(GroupedLinear):
    """y = gelu(x Wg) * (x Wu) of the expert of each row, read from where the row's token is.

    Attributes:
        weight: Wg and Wu, [X, E, 2, F].
    """

    def __init__(self, groups: Axes, inputs: Axes, outputs: Axes, options: ModuleOptions):
        """Builds the module with a random weight; arguments as of `GroupedLinear`."""
        super().__init__(groups, inputs, {"gate_up": 2, **outputs}, options)

    def __call__(
        self,
        x: Float[Array, "M E"],
        group_sizes: Int[Array, " X"],
        row_tokens: Int[Array, " rows"],
    ) -> Float[Array, "rows F"]:
        """The product of value and gate, see `ops.grouped_gated_matmul`.

        Args:
            x: [M, E]; cast to `dtype`.
            group_sizes: int32 [X], rows of each expert.
            row_tokens: int32 [rows], the token of each row.
        """
        return ops.grouped_gated_matmul(
            x.astype(self.dtype),
            self.operand(),
            group_sizes,
            row_tokens,
            implementation=self.implementation,
        )


class Embedding(Weight):
    """A table with a row for every token: tokens in, vectors out; or hidden states in, logits out.

    Attributes:
        weight: [V, *width].
    """

    def __init__(self, tokens: Axes, width: Axes, options: ModuleOptions):
        """Builds the module with a random table.

        Args:
            tokens: the axis of tokens.
            width: the axes of a row.
            options: of the model.
        """
        # So that scaled embeddings and logits are of the order of 1.
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=-1)
        super().__init__({**tokens, **width}, options, init)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T *width"]:
        """weight[token] * sqrt(width), the root rounded to the table's dtype: 55.5, not 55.43.

        A token that the table does not have becomes NaN, where JAX would take the last row.

        Args:
            tokens: integer [B, T].

        Returns:
            [B, T, *width] in `dtype`. With several axes the root is that of the last one's size.

        Source: `Gemma4TextScaledWordEmbedding` of Hugging Face transformers 5.23.
        """
        table = self.weight[...]
        root = jnp.asarray(math.sqrt(table.shape[-1]), table.dtype)
        rows = table.at[tokens].get(mode="fill", fill_value=jnp.nan) * root
        return rows.astype(self.dtype)

    def logits(
        self, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T n"] | None = None
    ) -> Float[Array, "B T n"]:
        """Products of hidden states and rows of the table, their float32 sums not rounded.

        Args:
            hidden: [B, T, E].
            tokens: integer [B, T, n], whose logits are wanted; None is all.

        Returns:
            Float32 [B, T, n], without tokens [B, T, V].
        """
        if tokens is None:
            hidden = hidden.astype(self.dtype)
            return ops.logits(hidden, self.operand(), implementation=self.implementation)
        # A row of each token, not a copy of the table: k V / C rows of V.
        return jnp.einsum(
            "bte,btne->btn",
            hidden,
            self.weight[...][tokens].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


def assign(param: nnx.Param, value: Float[Array, "..."]) -> None:
    """Stores a value in a parameter: cast to its dtype, and moved to where the parameter is."""
    param[...] = jax.device_put(value.astype(param.dtype), param[...].sharding)


def _keeping_variance(num_inputs, num_outputs, num_groups=0):
    """Uniform numbers whose variance is one over the number of inputs."""
    inputs = tuple(range(num_groups, num_groups + num_inputs))
    outputs = tuple(range(num_groups + num_inputs, num_groups + num_inputs + num_outputs))
    return nnx.initializers.lecun_uniform(
        in_axis=inputs, out_axis=outputs, batch_axis=tuple(range(num_groups))
    )
