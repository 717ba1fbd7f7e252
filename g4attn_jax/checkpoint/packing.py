"""How one parameter of ours is made of tensors of a checkpoint, and back.

A table maps names of parameters to `Packed`; each checkpoint format has one, and loading and saving
both follow it. Its letters are those of the modules: E embed, F MLP width, D head dim, K KV heads,
G query heads per KV head, N query heads, X experts, C gate and up, V vocabulary, L layers, P width
of per-layer embeddings.
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
    """A parameter, the tensors it is made of, and the order of axes in each.

        Packed("ECF", {"gate.weight": "CF,E", "up.weight": "CF,E"}, along="C", split=(1, 1))

    is a parameter [E, 2, F] whose first half along C is `gate.weight`, stored as [1 * F, E].

    Attributes:
        letters: one per axis of the parameter.
        tensors: from a tensor's name to its axes, separated by commas: each is a letter, several
            that are stored as one axis, or "1", an axis of size 1 that the parameter lacks.
        along: the letter of the axis that several tensors share.
        split: how much of that axis each tensor has, in the order of `tensors`.
    """

    letters: str
    tensors: Mapping[str, str]
    along: str = ""
    split: tuple[int, ...] = ()

    def under(self, prefix: str) -> Self:
        """The same with a prefix before the names of the tensors."""
        tensors = {prefix + name: axes for name, axes in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """The shape of every tensor of a parameter of this shape."""
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
        """The parameter: computed where the tensors are, never an alias of one of them.

        Args:
            tensors: in the order of `self.tensors`, of shapes `self.shapes(shape)`.
            shape: of the parameter.
            dtype: of the parameter.
            sharding: of the parameter; None leaves it where the tensors are.
        """
        # Names are left out of what is compiled: all layers of one shape share a program.
        compiled = _compiled_pack(self.letters, self.along, tuple(self.tensors.values()), sharding)
        sizes = tuple(tuple(part.items()) for part in self._sizes(shape))
        return compiled(tuple(tensors), sizes, jnp.dtype(dtype))

    def unpack(self, parameter: Float[Array, "..."]) -> dict[str, Float[Array, "..."]]:
        """The inverse of `pack`."""
        parts = _unpack(
            parameter, self.letters, self.along, self.split, tuple(self.tensors.values())
        )
        return dict(zip(self.tensors, parts, strict=True))

    def _sizes(self, shape):
        """For each tensor, from letters to sizes."""
        whole = dict(zip(self.letters, shape, strict=True))
        if not self.along:
            return [whole]
        return [whole | {self.along: size} for size in self.split]


def _stored_shape(axes, sizes):
    groups = axes.split(",") if axes else []
    return tuple(math.prod(sizes[c] for c in group if c != "1") for group in groups)


def _stored_letters(axes):
    return axes.replace(",", "").replace("1", "")


@functools.cache
def _compiled_pack(letters, along, layouts, sharding):
    def pack(tensors, sizes, dtype):
        parts = []
        for tensor, axes, part in zip(tensors, layouts, map(dict, sizes), strict=True):
            order = _stored_letters(axes)
            part = tensor.reshape([part[c] for c in order])
            parts.append(part.transpose([order.index(c) for c in letters]).astype(dtype))
        whole = jnp.concatenate(parts, axis=letters.index(along)) if along else parts[0]
        # jit hands out its own argument where nothing is left to compute, and on a CPU that
        # argument can be the mapped file.
        return jnp.copy(whole)

    return jax.jit(pack, static_argnums=(1, 2), out_shardings=sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _unpack(parameter, letters, along, split, layouts):
    parts = [parameter]
    if along:
        ends = [sum(split[: i + 1]) for i in range(len(split) - 1)]
        parts = jnp.split(parameter, ends, axis=letters.index(along))
    tensors = []
    for part, axes in zip(parts, layouts, strict=True):
        sizes = dict(zip(letters, part.shape, strict=True))
        order = [letters.index(c) for c in _stored_letters(axes)]
        tensors.append(part.transpose(order).reshape(_stored_shape(axes, sizes)))
    return tensors
