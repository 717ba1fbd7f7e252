"""What launches depend on of the GPU that they are for."""

from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """Sizes of a GPU.

    Attributes:
        compute_capability: 8.0 or more.
        num_sms: multiprocessors.
        shared_memory: bytes that a program may have.
    """

    compute_capability: float
    num_sms: int
    shared_memory: int


# Compute capability and KiB of shared memory by a word of the name. NVIDIA, "CUDA C++ programming
# guide", technical specifications per compute capability.
_BY_NAME = {
    "A100": (8.0, 163),
    **dict.fromkeys(("H100", "H200", "GH200"), (9.0, 227)),
    **dict.fromkeys(("B200", "GB200"), (10.0, 227)),
    **dict.fromkeys(("B300", "GB300"), (10.3, 227)),
}
_ANY_OTHER = (8.6, 99)


def gpu() -> Gpu:
    """The GPU that a program is compiled for.

    The one that the abstract mesh describes, or the least of the process' GPUs; without one a GPU
    of the least shared memory.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.platform == "gpu":
        known = [_BY_NAME[word] for word in target.device_kind.split() if word in _BY_NAME]
        compute_capability, kib = known[0] if known else _ANY_OTHER
        return Gpu(compute_capability, target.num_cores, kib * 1024)
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        compute_capability, kib = _ANY_OTHER
        return Gpu(compute_capability, 132, kib * 1024)
    return Gpu(
        min(float(device.compute_capability) for device in devices),
        min(device.core_count for device in devices),
        min(device.shared_memory_per_block_optin for device in devices),
    )
