"""GPUs that a program is compiled for, and the sizes of them that launches depend on."""

import re
from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """Sizes of a GPU.

    Attributes:
        compute_capability: major.minor, as NVIDIA numbers them.
        num_sms: multiprocessors.
        shared_memory: bytes that a program may have.
    """

    compute_capability: float
    num_sms: int
    shared_memory: int


# Compute capability and KiB of shared memory of described GPUs, by a word of the name. NVIDIA,
# "CUDA C++ programming guide", technical specifications per compute capability.
_DESCRIBED = {
    "V100": (7.0, 96),
    "T4": (7.5, 64),
    **dict.fromkeys(("A100", "A30"), (8.0, 163)),
    **dict.fromkeys(("A10", "A40", "A6000"), (8.6, 99)),
    **dict.fromkeys(("L4", "L40", "L40S"), (8.9, 99)),
    **dict.fromkeys(("H100", "H200", "GH200"), (9.0, 227)),
    **dict.fromkeys(("B200", "GB200"), (10.0, 227)),
    **dict.fromkeys(("B300", "GB300"), (10.3, 227)),
}
# Triton's bf16 instructions start with Ampere, its float8 conversions with Ada.
MIN_COMPUTE_CAPABILITY = 8.0
MIN_COMPUTE_CAPABILITY_FLOAT8 = 8.9
# The least that kernels run on, and the least memory.
_UNKNOWN_NAME = (8.0, 99)
# Without a GPU launches are chosen too, for the interpreter.
_NO_GPU = Gpu(8.6, 132, 99 * 1024)


def targets() -> list[tuple[str, Gpu]]:
    """Name and sizes of each GPU that a program is compiled for.

    The GPUs of this process, under a mesh those of its kind. A mesh of a kind that this process
    does not have describes a GPU, of which only the name and the multiprocessors are known.
    """
    present = [(device.device_kind, _sizes(device)) for device in _devices()]
    mesh = jax.sharding.get_abstract_mesh().abstract_device
    if mesh is None or mesh.platform != "gpu":
        return present
    of_mesh = [
        (name, gpu)
        for name, gpu in present
        if (name, gpu.num_sms) == (mesh.device_kind, mesh.num_cores)
    ]
    return of_mesh or [(mesh.device_kind, _from_name(mesh.device_kind, mesh.num_cores))]


def gpu() -> Gpu:
    """Sizes that all of `targets` have, or where there is none those of a small GPU."""
    gpus = [gpu for _, gpu in targets()] or [_NO_GPU]
    return Gpu(*map(min, zip(*gpus, strict=True)))


def gpu_refusal(
    min_compute_capability: float = MIN_COMPUTE_CAPABILITY, *, none_is_refused: bool = True
) -> str | None:
    """Reason for which kernels cannot run on (or be compiled for) all of `targets`, or None.

    Args:
        min_compute_capability: that the kernels need.
        none_is_refused: whether it is a reason that there is no GPU.
    """
    gpus = targets()
    if not gpus and none_is_refused:
        return f"this process has none (devices: {', '.join(d.device_kind for d in jax.devices())})"
    for name, gpu in gpus:
        if gpu.compute_capability < min_compute_capability:
            return f"{name} has {gpu.compute_capability}"
    return None


def _devices():
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def _sizes(device):
    return Gpu(
        float(device.compute_capability), device.core_count, device.shared_memory_per_block_optin
    )


def _from_name(name, num_sms):
    words = re.split(r"[\s-]+", name)
    known = [_DESCRIBED[word] for word in words if word in _DESCRIBED]
    compute_capability, kib = known[0] if known else _UNKNOWN_NAME
    return Gpu(compute_capability, num_sms, kib * 1024)
