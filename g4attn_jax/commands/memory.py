"""Memory that runs out, in one line: what was needed, and what there is."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Limit of a container (cgroup v2).
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class OutOfMemory(Exception):
    """A device has less memory than a command needs; the message says how much of each."""


def check_fits(needs: dict[str, int]) -> None:
    """Refuses what cannot fit into the default device, before any of it is made.

    A CPU's memory is overcommitted: without this the system would end the process, silently.

    Args:
        needs: bytes by what they are for.

    Raises:
        OutOfMemory: they are more than the device has.
    """
    total = device_bytes()
    if total is not None and sum(needs.values()) > total:
        raise OutOfMemory(f"{_listed(needs)}, besides activations; {_there_is(total)}")


@contextlib.contextmanager
def explained(needs: dict[str, int] | None = None) -> Iterator[None]:
    """Turns what JAX or NumPy raise for want of memory into `OutOfMemory`.

    Args:
        needs: bytes by what they are for, as far as they are known.
    """
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        reason = text.splitlines()[0] if text else "an allocation failed"
        known = f"{_listed(needs)}, besides activations; " if needs else ""
        message = f"{known}{reason.rstrip('.')}; {_there_is(device_bytes())}"
        raise OutOfMemory(message) from error


def device_bytes() -> int | None:
    """Bytes that JAX may use of the default device; None where it does not say."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return _host_bytes()
    return (device.memory_stats() or {}).get("bytes_limit")


def _host_bytes():
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdecimal() else total


def _listed(needs):
    return ", ".join(f"{name} {_gib(size)}" for name, size in needs.items())


def _there_is(total):
    import jax

    name = jax.devices()[0].device_kind
    return f"{name} has {'an unknown amount' if total is None else _gib(total)}"


def _gib(size):
    return f"{size / 2**30:.2f} GiB"
