import jax
import pytest

from g4attn_jax.ops.implementation import triton_refusal
from tests import gpu_target  # noqa: F401  (before JAX looks for devices)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if "gpu" in item.keywords]
    reason = triton_refusal() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a supported NVIDIA GPU; {reason}"))


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """XLA's CPU backend maps memory for every program; thousands of them pass the limit of Linux
    (vm.max_map_count), and the process dies."""
    yield
    jax.clear_caches()
