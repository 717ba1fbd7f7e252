"""Which implementation of an op runs where, and its derivative."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from g4attn_jax.cache import Cache, float8_refusal
from g4attn_jax.ops.gpu import targets

Implementation = Literal["triton", "xla", "triton_interpret"]

# Triton's bf16 instructions start with Ampere, its float8 conversions with Ada.
MIN_COMPUTE_CAPABILITY = 8.0
MIN_COMPUTE_CAPABILITY_FLOAT8 = 8.9


def check_implementation(
    implementation: Implementation | None,
    min_compute_capability: float = MIN_COMPUTE_CAPABILITY,
    further: tuple[str, ...] = (),
) -> None:
    """Refuses what cannot run here.

    Args:
        implementation: of an op.
        min_compute_capability: that its kernel needs.
        further: names that the op has besides.

    Raises:
        ValueError: `implementation` is not one of the names.
        NotImplementedError: it is "triton" and no supported GPU is there.
    """
    names = *get_args(Implementation), *further
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation is {implementation!r}; accepted: None, " + ", ".join(map(repr, names))
        )
    if implementation == "triton":
        reason = triton_refusal(min_compute_capability)
        if reason is not None:
            raise NotImplementedError(
                f"implementation 'triton' needs an NVIDIA GPU of compute capability "
                f"{min_compute_capability} or higher; {reason}. Accepted here: None, 'xla', "
                "'triton_interpret'"
            )


def triton_refusal(min_compute_capability: float = MIN_COMPUTE_CAPABILITY) -> str | None:
    """Why Triton kernels cannot run on (or be compiled for) the GPUs of this process, or None."""
    gpus = targets()
    if not gpus:
        return f"this process has none (devices: {', '.join(d.device_kind for d in jax.devices())})"
    for name, gpu in gpus:
        if gpu.compute_capability < min_compute_capability:
            return f"{name} has {gpu.compute_capability}"
    return None


def for_cache(
    implementation: Implementation | None, cache: Cache, launch_refusal: str | None = None
) -> dict[str, Any]:
    """What an op that a kernel writes or reads a cache for passes on.

    Args:
        implementation: of the op.
        cache: of the op.
        launch_refusal: why the GPU cannot run the kernel for these arguments, or None. The
            interpreter can.

    Returns:
        `implementation` and `min_compute_capability`. Without a demand, what the kernel cannot do
        goes to XLA.

    Raises:
        NotImplementedError: a kernel was demanded that cannot do it.
    """
    float8 = cache.scale is not None
    minimum = MIN_COMPUTE_CAPABILITY_FLOAT8 if float8 else MIN_COMPUTE_CAPABILITY
    refusal = float8_refusal(cache)
    if refusal is not None and implementation in ("triton", "triton_interpret"):
        raise NotImplementedError(refusal)
    if launch_refusal is not None and implementation == "triton":
        check_implementation(implementation, minimum)  # without a GPU that is what is wrong
        raise NotImplementedError(launch_refusal)
    if implementation is None and (refusal or launch_refusal):
        implementation = "xla"
    return {"implementation": implementation, "min_compute_capability": minimum}


def differentiable_op(
    *, kernel: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """An op that runs a kernel and differentiates as its reference does.

    The derivative is the reference's, recomputed in the backward pass: nothing but the op's own
    arguments is kept for it. It is a `custom_jvp` rather than a `custom_vjp` because the latter
    refuses forward-mode differentiation; JAX transposes the tangent, which is linear, by itself.

    Args:
        kernel: `kernel(*arrays, interpret=..., **static)`.
        reference: `reference(*arrays, **static)`, the same function in `jnp`.

    Returns:
        `op(*arrays, implementation, **static)`; `min_compute_capability` may be given too. With
        `implementation=None` the choice falls when the program is lowered for a platform: the
        kernel on CUDA, the reference elsewhere and where shapes are symbolic. Raises
        NotImplementedError for a kernel demanded of these.
    """

    def tangent(static, primals, tangents):
        def tangent_out(primals, tangents):
            return jax.jvp(functools.partial(reference, **static), primals, tangents)[1]

        return jax.checkpoint(tangent_out)(primals, tangents)

    return _op(kernel, reference, tangent)


def inference_op(
    *, kernel: Callable[..., Any], reference: Callable[..., Any], refusal: str
) -> Callable[..., Any]:
    """The same without a derivative: differentiating it raises NotImplementedError(`refusal`)."""

    def tangent(static, primals, tangents):
        raise NotImplementedError(refusal)

    return _op(kernel, reference, tangent)


def _op(kernel, reference, tangent):
    @functools.partial(
        jax.jit, static_argnames=("implementation", "min_compute_capability", "static")
    )
    def jitted(*arrays, implementation, min_compute_capability, static):
        static = dict(static)
        run_reference = functools.partial(reference, **static)
        run_kernel = functools.partial(kernel, **static)

        symbolic = any(
            not isinstance(size, int) for x in jax.tree.leaves(arrays) for size in x.shape
        )
        if symbolic and implementation in ("triton", "triton_interpret"):
            raise NotImplementedError(
                f"implementation {implementation!r} needs shapes known at trace time; with the "
                "symbolic ones of jax.export accepted: None, 'xla'"
            )

        @jax.custom_jvp
        def run(*arrays):
            match implementation:
                case "xla":
                    return run_reference(*arrays)
                case "triton" | "triton_interpret":
                    return run_kernel(*arrays, interpret=implementation == "triton_interpret")
            if symbolic or _has_unsupported_gpu(min_compute_capability):
                return run_reference(*arrays)
            return jax.lax.platform_dependent(
                *arrays,
                cuda=functools.partial(run_kernel, interpret=False),
                default=run_reference,
            )

        @run.defjvp
        def _(primals, tangents):
            return run(*primals), tangent(static, primals, tangents)

        return run(*arrays)

    def op(*arrays, implementation, min_compute_capability=MIN_COMPUTE_CAPABILITY, **static):
        check_implementation(implementation, min_compute_capability)
        return jitted(
            *arrays,
            implementation=implementation,
            min_compute_capability=min_compute_capability,
            static=tuple(static.items()),
        )

    return op


def _has_unsupported_gpu(min_compute_capability) -> bool:
    return bool(targets()) and triton_refusal(min_compute_capability) is not None
