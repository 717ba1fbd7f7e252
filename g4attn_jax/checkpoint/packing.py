"""Parameters of ours packed from tensors of a checkpoint, and unpacked into them.

A table maps names of parameters to `Packed`; each checkpoint format has one, and loading and saving
both follow it. Axes have the names of `model.linear`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Packed:
    """The tensors that a parameter is made of, and the order of axes in each.

        Packed(
            {"gate.weight": "gate_up mlp, embed", "up.weight": "gate_up mlp, embed"},
            along="gate_up",
            split=(1, 1),
            axes=("embed", "gate_up", "mlp"),
        )

    is a parameter [E, 2, F]. Its first half along `gate_up` is `gate.weight`, stored as [1 * F, E].

    Attributes:
        tensors: from a tensor's name to its axes, separated by commas: each is a name, several
            names that are stored as one axis, or "1", an axis of size 1 that the parameter lacks.
        along: the axis that several tensors share.
        split: how much of that axis each tensor has, in the order of `tensors`.
        axes: of the parameter, in order. None: those of its only tensor, as for scales of norms.
    """

    tensors: Mapping[str, str]
    along: str = ""
    split: tuple[int, ...] = ()
    axes: tuple[str, ...] | None = None

    def under(self, prefix: str) -> Self:
        """The parameter with a prefix before the names of its tensors."""
        tensors = {prefix + name: axes for name, axes in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Shapes of the tensors of a parameter of this shape, by name."""
        return {
            name: _stored_shape(axes, sizes)
            for (name, axes), sizes in zip(self.tensors.items(), self._sizes(shape), strict=True)
        }

    def pack(
        self,
        tensors: Sequence[Float[Array, "..."]],
        shape: Shape,
        dtype: jax.typing.DTypeLike,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Float[Array, "..."]:
        """Makes the parameter, where the tensors are; it is never an alias of one of them.

        Args:
            tensors: in the order of `self.tensors`, of shapes `self.shapes(shape)`.
            shape: of the parameter.
            dtype: of the parameter.
            sharding: of the parameter; None leaves it where the tensors are.
        """
        # Names are left out of what is compiled: all layers of one shape share a program.
        compiled = _compiled_pack(self._axes(), self.along, tuple(self.tensors.values()), sharding)
        sizes = tuple(tuple(part.items()) for part in self._sizes(shape))
        return compiled(tuple(tensors), sizes, jnp.dtype(dtype))

    def unpack(self, parameter: Float[Array, "..."]) -> dict[str, Float[Array, "..."]]:
        """Makes the tensors of a parameter, by name: the inverse of `pack`."""
        parts = _unpack(
            parameter, self._axes(), self.along, self.split, tuple(self.tensors.values())
        )
        return dict(zip(self.tensors, parts, strict=True))

    def _axes(self):
        if self.axes is not None:
            return self.axes
        (axes,) = self.tensors.values()
        return _stored_axes(axes)

    def _sizes(self, shape):
        """Sizes of each tensor's axes by their names."""
        whole = dict(zip(self._axes(), shape, strict=True))
        if not self.along:
            return [whole]
        return [whole | {self.along: size} for size in self.split]


def _stored_shape(axes, sizes):
    groups = axes.split(", ")
    return tuple(
        math.prod(sizes[name] for name in group.split(" ") if name != "1") for group in groups
    )


def _stored_axes(axes):
    """Names of all axes that are stored, in order."""
    return tuple(name for name in axes.replace(",", "").split(" ") if name != "1")


@functools.cache
def _compiled_pack(axes, along, stored, sharding):
    def pack(tensors, sizes, dtype):
        parts = []
        for tensor, order, part in zip(
            tensors, map(_stored_axes, stored), map(dict, sizes), strict=True
        ):
            part = tensor.reshape([part[name] for name in order])
            parts.append(part.transpose([order.index(name) for name in axes]).astype(dtype))
        whole = jnp.concatenate(parts, axis=axes.index(along)) if along else parts[0]
        # jit hands out its own argument where nothing is left to compute, and on a CPU that
        # argument can be the mapped file.
        return jnp.copy(whole)

    return jax.jit(pack, static_argnums=(1, 2), out_shardings=sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _unpack(parameter, axes, along, split, stored):
    parts = [parameter]
    if along:
        ends = [sum(split[: i + 1]) for i in range(len(split) - 1)]
        parts = jnp.split(parameter, ends, axis=axes.index(along))
    tensors = []
    for part, of_tensor in zip(parts, stored, strict=True):
        sizes = dict(zip(axes, part.shape, strict=True))
        order = [axes.index(name) for name in _stored_axes(of_tensor)]
        tensors.append(part.transpose(order).reshape(_stored_shape(of_tensor, sizes)))
    return tensors
