"""Tensors of a checkpoint made parameters of a model, whatever the format."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
from flax import nnx

from g4attn_jax.checkpoint.errors import CheckpointError, listed
from g4attn_jax.checkpoint.packing import Packed, Shape
from g4attn_jax.checkpoint.report import LoadReport
from g4attn_jax.model.logical_axes import weight_axes

Model = TypeVar("Model", bound=nnx.Module)
Progress = Callable[[int, int], None]


class Tensor(Protocol):
    """A tensor that can be looked at before it is read."""

    shape: Shape
    dtype: Any
    is_float: bool

    def read(self) -> Any:
        """The tensor, as something `jax.device_put` takes."""


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters of a model by their paths, such as "layers.0.attention.qkv_proj.weight"."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}


def table_of(model: nnx.Module, table: Mapping[str, Packed]) -> dict[str, Packed]:
    """The part of a format's table that this model has, with the axes of its weights.

    Raises:
        CheckpointError: the model has a parameter that the format does not know.
    """
    names = parameters(model)
    if unknown := names.keys() - table.keys():
        raise CheckpointError(f"the format has no place for {listed(unknown)} of the model")
    axes = weight_axes(model)
    return {name: dataclasses.replace(table[name], axes=axes.get(name)) for name in names}


def load(
    model: Model,
    table: Mapping[str, Packed],
    tensors: Mapping[str, Tensor],
    skipped: Mapping[str, int],
    progress: Progress | None,
) -> tuple[Model, LoadReport]:
    """A model with the parameters that the tensors make up.

    Everything is checked before the first tensor is read. Then each parameter is read, packed on
    the device and waited for before the next, so that beside the model the tensors of one are held.

    Args:
        model: gives structure, shapes, dtypes and shardings; its parameters may be abstract.
        table: of the format, for at least the parameters of the model.
        tensors: of the checkpoint, without those that are skipped.
        skipped: numbers of tensors that are not loaded, for the report.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: a tensor is missing, surplus, misshapen or not of a floating-point dtype
            that can be read. The message names it.
    """
    check(model, table, tensors)
    table = table_of(model, table)
    targets = {name: variable.get_value() for name, variable in parameters(model).items()}
    total, done, values = sum(map(_num_bytes, targets.values())), 0, {}
    for name, target in targets.items():
        values[name] = _read(table[name], tensors, target)
        done += _num_bytes(target)
        if progress is not None:
            progress(done, total)
    report = LoadReport(len(tensors), len(values), total, dict(skipped))
    return _with_parameters(model, values), report


def check(model: nnx.Module, table: Mapping[str, Packed], tensors: Mapping[str, Tensor]) -> None:
    """Compares names, shapes and dtypes of tensors with what a model needs; reads none.

    Raises:
        CheckpointError: as of `load`.
    """
    table = table_of(model, table)
    shapes = {
        tensor: shape
        for name, variable in parameters(model).items()
        for tensor, shape in table[name].shapes(variable.get_value().shape).items()
    }
    if missing := shapes.keys() - tensors.keys():
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}")
    if surplus := tensors.keys() - shapes.keys():
        raise CheckpointError(f"the checkpoint has {listed(surplus)}; this model has no such")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}; this model needs {shape}"
            )
        if not tensor.is_float:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}; accepted: bfloat16, float16 and float32"
            )


def _read(packed, tensors, target):
    # An array that just lies on the default device was not placed there by anyone.
    placed = getattr(target, "committed", True)
    parts = jax.block_until_ready([jax.device_put(tensors[n].read()) for n in packed.tensors])
    value = packed.pack(parts, target.shape, target.dtype, target.sharding if placed else None)
    return jax.block_until_ready(value)


def _num_bytes(target):
    return target.size * target.dtype.itemsize


def _with_parameters(model, values):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    flat = [
        (path, variable.replace(values[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(params)
    ]
    # Else the variables in `rest` would be those of the model given; arrays are not copied.
    return nnx.merge(graph, nnx.from_flat_state(flat), rest, copy=True)
