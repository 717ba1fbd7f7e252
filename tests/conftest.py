import jax
import pytest

from g4attn_jax.ops.implementation import triton_refusal
from tests import gpu_target  # noqa: F401  (before JAX looks for devices)

# XLA has as many threads as devices, and JAX's interpreter of Mosaic GPU needs one for each
# warpgroup of a cluster: with less they wait for each other for ever.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="of each test, implementation and described GPU the first case alone; none on a GPU",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("first_cases"):
        first = {}
        for item in items:
            if "gpu" not in item.keywords:
                first.setdefault(_test_of(item), item)
        chosen = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = first.values()
    marked = [item for item in items if "gpu" in item.keywords]
    reason = triton_refusal() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a supported NVIDIA GPU; {reason}"))


def _test_of(item):
    """The test that an item is a case of, for its implementation and the GPU it compiles for."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return item.nodeid.split("[")[0], str(params.get("implementation")), str(params.get("gpu"))


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """XLA's CPU backend maps memory for every program; thousands of them pass the limit of Linux
    (vm.max_map_count), and the process dies."""
    yield
    jax.clear_caches()
