import os
import sys

import jax
import pytest

from g4attn_jax.ops.implementation import triton_refusal
from g4attn_jax.testing import gpu_target  # noqa: F401  (before JAX looks for devices)

# XLA has as many threads as devices, and JAX's interpreter of Mosaic GPU needs one for each
# warpgroup of a cluster: with less they wait for each other for ever.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="of each test, implementation and described GPU the first case alone; none on a GPU",
    )
    parser.addoption("--gpu-ops", help="only GPU tests, and those of these ops: names and commas")
    parser.addoption(
        "--whole-tables", action="store_true", help="all shapes of tests/gpu/tables.py"
    )
    parser.addoption("--fuzz-seconds", type=float, default=10, help="of each fuzz test on a GPU")
    parser.addoption("--fuzz-seed", type=int, help="of the fuzz tests; None: another every time")


def pytest_collection_modifyitems(config, items):
    if config.getoption("first_cases"):
        first = {}
        for item in items:
            if "gpu" not in item.keywords:
                first.setdefault(_test_of(item), item)
        _choose(config, items, set(first.values()))
    ops = config.getoption("gpu_ops")
    if ops is not None:
        _choose(config, items, {i for i in items if _ops_of(i) & set(ops.split(","))})
    # Processes take one at a time (see tests/gpu/__main__.py): long ones are not to start last.
    items.sort(key=lambda item: not any(m.kwargs.get("slow") for m in item.iter_markers("gpu")))
    marked = [item for item in items if "gpu" in item.keywords]
    reason = triton_refusal() if marked else None
    for item in marked:
        item.user_properties.append(("ops", sorted(_ops_of(item))))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a supported NVIDIA GPU; {reason}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends a process that a kernel's fault has left without a GPU; pytest-xdist starts another."""
    report = yield
    error = "" if call.excinfo is None else str(call.excinfo.value)
    if (
        "CUDA_ERROR_" in error
        and "OUT_OF_MEMORY" not in error
        and "PYTEST_XDIST_WORKER" in os.environ
    ):
        print(item.nodeid, error, sep="\n", file=sys.__stderr__, flush=True)
        os._exit(1)
    return report


def _choose(config, items, chosen):
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _ops_of(item):
    """The ops whose kernels a GPU test is evidence for."""
    return {op for marker in item.iter_markers("gpu") for op in marker.args}


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
