"""Ops, their kernels, and which of them runs.

An op has a reference in `jnp`, which XLA compiles for any platform, and kernels, the preferred one
first. A kernel says in words why it cannot take some arguments. Names choose an implementation:

    None                the first kernel without a refusal, for CUDA; XLA elsewhere
    "xla"               the reference
    a kernel's name     that kernel, or its refusal as an error
    NAME_interpret      that kernel in its interpreter, on any machine

One name goes through a whole model: it demands the kernel of that name of every op that has one,
and other ops choose as for None. A name that no op has is refused.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from g4attn_jax.checks import check_choice
from g4attn_jax.ops.gpu import MIN_COMPUTE_CAPABILITY, gpu_refusal

# One of `implementations()`.
Implementation = str

XLA = "xla"
_INTERPRET = "_interpret"


class KernelRefusal(NotImplementedError):
    """Refusal of a demanded implementation.

    Attributes:
        reason: without the name and what is accepted instead.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def _refuses_nothing(*arrays, **static):
    return None


def _is_always_faster(*arrays, **static):
    return True


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Kernel of an op.

    Attributes:
        name: by which an implementation demands it.
        function: `function(*arrays, interpret=..., **static)`, as "module:name" of what is imported
            when a program that may run the kernel is traced.
        refusal: `refusal(*arrays, interpret=..., **static)`: the reason for which the kernel cannot
            take these arguments, interpreted or on the GPUs of `gpu.targets()`, or None.
        is_faster: `is_faster(*arrays, **static)`: whether it is to run where none is demanded.
        min_compute_capability: of the GPU.
        min_jax: of JAX.
        has_interpreter: whether it runs on any machine.
    """

    name: str
    function: str | Callable[..., Any]
    refusal: Callable[..., str | None] = _refuses_nothing
    is_faster: Callable[..., bool] = _is_always_faster
    min_compute_capability: float = MIN_COMPUTE_CAPABILITY
    min_jax: tuple[int, int] = (0, 10)
    has_interpreter: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Implementations that demand it."""
        return (self.name, self.name + _INTERPRET) if self.has_interpreter else (self.name,)

    def machine_refusal(self, *, interpret: bool, none_is_refused: bool = True) -> str | None:
        """Reason for which neither JAX nor the GPUs here can run it, or None.

        Args:
            interpret: whether it is interpreted.
            none_is_refused: whether it is a reason that there is no GPU.
        """
        if jax.__version_info__ < self.min_jax:
            return (
                f"JAX is {jax.__version__}; accepted: {'.'.join(map(str, self.min_jax))} or later"
            )
        if not interpret:
            minimum = self.min_compute_capability
            reason = gpu_refusal(minimum, none_is_refused=none_is_refused)
            if reason is not None:
                return f"it needs an NVIDIA GPU of compute capability {minimum} or higher; {reason}"
        return None

    def import_refusal(self) -> str | None:
        """Reason for which what it is written in cannot be imported, or None."""
        if not isinstance(self.function, str):
            return None
        error = _import_error(self.function.split(":")[0])
        return error and f"this JAX lacks what the kernel is written in ({error})"

    def refusal_here(
        self,
        arrays: Sequence[Any],
        static: Mapping[str, Any],
        *,
        interpret: bool = False,
        none_is_refused: bool = True,
    ) -> str | None:
        """Reason for which it cannot run some arguments here, whatever it is, or None.

        Args:
            arrays: of the op.
            static: of the op.
            interpret: whether it is interpreted.
            none_is_refused: whether it is a reason that there is no GPU.
        """
        if _are_symbolic(arrays):
            return "it needs shapes known at trace time, not the symbolic ones of jax.export"
        return (
            self.machine_refusal(interpret=interpret, none_is_refused=none_is_refused)
            or self.refusal(*arrays, interpret=interpret, **static)
            or self.import_refusal()
        )

    def run(self, *arrays, interpret: bool, **static) -> Any:
        """Runs the op by this kernel."""
        return self._function()(*arrays, interpret=interpret, **static)

    def _function(self):
        if not isinstance(self.function, str):
            return self.function
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


@functools.cache
def _import_error(module):
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def reference_derivative(reference: Callable[..., Any], primals, tangents) -> Any:
    """Tangent of an op that differentiates as its reference does.

    It is recomputed in the backward pass: nothing but the op's own arguments is kept for it.
    """

    def tangent_out(primals, tangents):
        return jax.jvp(reference, primals, tangents)[1]

    return jax.checkpoint(tangent_out)(primals, tangents)


def no_derivative(refusal: str) -> Callable[..., Any]:
    """Derivative of an op for inference alone: NotImplementedError(`refusal`)."""

    def refuse(reference, primals, tangents):
        raise NotImplementedError(refusal)

    return refuse


_OPS: dict[str, "Op"] = {}


class _Choice(NamedTuple):
    """Choice of how an op runs: by a kernel, or where it is None by the reference."""

    kernel: Kernel | None
    interpret: bool = False
    is_demanded: bool = False


class Op:
    """Function of arrays with a reference, kernels and a derivative.

    Under `jax.grad` and `jax.jvp` it differentiates by its own rule, a `custom_jvp` rather than a
    `custom_vjp` because the latter refuses forward-mode differentiation; JAX transposes the
    tangent, which is linear, by itself.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        kernels: Sequence[Kernel],
        derivative: Callable[..., Any] = reference_derivative,
    ):
        """Registers an op.

        Args:
            name: under which it is compiled.
            reference: `reference(*arrays, **static)`, in `jnp`.
            kernels: the preferred one first.
            derivative: `derivative(reference, primals, tangents)`, the tangent of the result.
        """
        self.name, self.reference, self.kernels = name, reference, tuple(kernels)
        self._derivative = derivative
        self._jitted = self._compiled()
        _OPS[name] = self

    def __call__(self, *arrays, implementation: Implementation | None, **static) -> Any:
        """Runs the op.

        Args:
            arrays: pytrees of arrays.
            implementation: see the module.
            static: hashable arguments.

        Raises:
            ValueError: no op has such an implementation.
            KernelRefusal: a kernel was demanded that cannot take these arguments here; it is a
                NotImplementedError.
        """
        choice = self._choose(implementation, arrays, static)
        return self._jitted(*arrays, choice=choice, static=tuple(static.items()))

    def own(self, implementation: Implementation | None) -> Implementation | None:
        """Implementation, or None if it names a kernel that other ops have alone.

        Raises:
            ValueError: no op has such an implementation.
        """
        check_choice("implementation", implementation, (None, *implementations()))
        return implementation if implementation in (XLA, *self._names()) else None

    def for_tokens(
        self, implementation: Implementation | None, count: int, *, most: int
    ) -> Implementation | None:
        """Implementation of an op whose kernels are for few tokens; XLA takes more.

        A demanded kernel runs for few tokens alone, in its interpreter for any number.

        Args:
            implementation: as of `own`.
            count: of tokens; where it is symbolic there are many.
            most: tokens of the kernels.

        Raises:
            ValueError: no op has such an implementation.
            KernelRefusal: a kernel was demanded that cannot run here.
        """
        implementation = self.own(implementation)
        is_few = isinstance(count, int) and count <= most
        if implementation == XLA or is_few or self.is_interpreted(implementation):
            return implementation
        check_implementation(implementation)  # a demand holds for any number
        return XLA

    def is_interpreted(self, implementation: Implementation | None) -> bool:
        """Whether an implementation is a kernel of this op in its interpreter."""
        return implementation in self._names() and implementation.endswith(_INTERPRET)

    def _names(self):
        return [name for kernel in self.kernels for name in kernel.names]

    def _choose(self, implementation, arrays, static):
        implementation = self.own(implementation)
        if implementation == XLA:
            return _Choice(None)
        if implementation is None:
            return self._first_without_refusal(arrays, static)
        kernel = next(kernel for kernel in self.kernels if implementation in kernel.names)
        interpret = implementation != kernel.name
        reason = kernel.refusal_here(arrays, static, interpret=interpret)
        if reason is None:
            return _Choice(kernel, interpret, is_demanded=True)
        accepted = [None, XLA]
        for other in self.kernels:
            for name in other.names:
                if other.refusal_here(arrays, static, interpret=name != other.name) is None:
                    accepted.append(name)
        raise KernelRefusal(
            f"implementation {implementation!r} does not run {self.name} here: {reason}. Accepted "
            f"here: {', '.join(map(repr, accepted))}",
            reason,
        )

    def _first_without_refusal(self, arrays, static):
        for kernel in self.kernels:
            if _are_symbolic(arrays) or not kernel.is_faster(*arrays, **static):
                continue
            # Without a GPU the program may be lowered for one nevertheless.
            if kernel.refusal_here(arrays, static, none_is_refused=False) is None:
                return _Choice(kernel)
        return _Choice(None)

    def _compiled(self):
        def run(*arrays, choice, static):
            return self._differentiable(choice, dict(static))(*arrays)

        run.__name__ = run.__qualname__ = self.name
        return jax.jit(run, static_argnames=("choice", "static"))

    def _differentiable(self, choice, static):
        reference = functools.partial(self.reference, **static)
        run = jax.custom_jvp(_runner(choice, reference, static))

        @run.defjvp
        def _(primals, tangents):
            return run(*primals), self._derivative(reference, primals, tangents)

        return run


def _runner(choice, reference, static):
    """Function of arrays that runs as chosen."""
    if choice.kernel is None:
        return reference
    kernel = functools.partial(choice.kernel.run, interpret=choice.interpret, **static)
    if choice.is_demanded:
        return kernel

    def by_platform(*arrays):
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=reference)

    return by_platform


def _are_symbolic(arrays):
    return any(not isinstance(n, int) for x in jax.tree.leaves(arrays) for n in jnp.shape(x))


def implementations() -> tuple[Implementation, ...]:
    """Names that some op has."""
    names = [name for op in _OPS.values() for name in op._names()]
    return (XLA, *dict.fromkeys(sorted(names, key=lambda name: name.endswith(_INTERPRET))))


def kernels_of(op: str) -> tuple[Kernel, ...]:
    """Kernels of an op, the preferred one first."""
    return _OPS[op].kernels


def check_implementation(implementation: Implementation | None) -> None:
    """Refuses an implementation that no op has, or that can run for none here.

    Raises:
        ValueError: no op has it.
        KernelRefusal: its kernels need another GPU, or another JAX.
    """
    names = implementations()
    check_choice("implementation", implementation, (None, *names))
    if implementation in (None, XLA):
        return
    refusals = _machine_refusals(implementation)
    if all(refusals):
        accepted = None, XLA, *(n for n in names[1:] if not all(_machine_refusals(n)))
        raise KernelRefusal(
            f"implementation {implementation!r} does not run here: {refusals[0]}. Accepted here: "
            f"{', '.join(map(repr, accepted))}",
            refusals[0],
        )


def _machine_refusals(implementation):
    """Refusals of every kernel that an implementation demands."""
    return [
        kernel.machine_refusal(interpret=implementation != kernel.name) or kernel.import_refusal()
        for op in _OPS.values()
        for kernel in op.kernels
        if implementation in kernel.names
    ]
