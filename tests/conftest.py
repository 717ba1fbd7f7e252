import os
import sys

import jax
import pytest

from g4attn_jax.ops.gpu import gpu_refusal
from g4attn_jax.testing import gpu_target  # noqa: F401  (before JAX looks for devices)
from tests.everyday import in_share, is_everyday, unknown_words

# Variable with the indices of the GPUs that processes of pytest-xdist share out, each taking one.
GPUS = "TEST_GPUS"
if GPUS in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    _number, _gpus = int(os.environ["PYTEST_XDIST_WORKER"][2:]), os.environ[GPUS].split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = _gpus[_number % len(_gpus)]

# XLA has as many threads as devices, and JAX's interpreter of Mosaic GPU needs one for each
# warpgroup of a cluster: with less they wait for each other for ever.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="all tests, not those of every day alone")
    parser.addoption(
        "--share",
        metavar="SEED/PARTS",
        help="with those of every day one of so many parts of the others: another for another seed",
    )
    parser.addoption("--gpu-ops", help="only GPU tests, and those of these ops: names and commas")
    parser.addoption(
        "--whole-tables", action="store_true", help="all shapes of tests/gpu/tables.py"
    )
    parser.addoption("--fuzz-seconds", type=float, default=10, help="of each fuzz test on a GPU")
    parser.addoption("--fuzz-seed", type=int, help="of the fuzz tests; None: another every time")


def pytest_configure(config):
    """Compile without most of XLA's optimisations: a third of the time of every day."""
    if not _takes_all(config):
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of processes of tests
        jax.config.update("jax_disable_most_optimizations", True)


def _takes_all(config):
    """Whether nothing is left out: demanded, or tests are named, or GPU tests are chosen."""
    named = any("::" in name or "tests/gpu" in name for name in config.args)
    return config.option.whole or "gpu" in config.option.markexpr or named


def pytest_ignore_collect(collection_path, config):
    """GPU tests are neither imported nor skipped one by one where none was asked for."""
    in_gpu = collection_path.name == "gpu" and collection_path.parent.name == "tests"
    return True if in_gpu and not _takes_all(config) else None


def pytest_report_header(config):
    if _takes_all(config):
        return None
    share = config.option.share
    of_others = f", and of the others --share {share}" if share else "; all with --whole"
    return "tests of every day" + of_others


def pytest_collection_modifyitems(config, items):
    unknown = unknown_words(items)
    if unknown and not any("::" in name for name in config.args):
        raise pytest.UsageError("\n".join(unknown))
    if not _takes_all(config):
        share = config.option.share
        on_cpu = [item for item in items if "gpu" not in item.keywords]
        chosen = {
            item for item in on_cpu if is_everyday(item) or (share and in_share(item.nodeid, share))
        }
        _choose(config, items, chosen)
    ops = config.getoption("gpu_ops")
    if ops is not None:
        _choose(config, items, {i for i in items if _ops_of(i) & set(ops.split(","))})
    # Processes take one at a time (see tests/gpu/__main__.py): long ones are not to start last.
    items.sort(key=lambda item: not any(m.kwargs.get("slow") for m in item.iter_markers("gpu")))
    marked = [item for item in items if "gpu" in item.keywords]
    reason = gpu_refusal() if marked else None
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


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """XLA's CPU backend maps memory for every program; thousands of them pass the limit of Linux
    (vm.max_map_count), and the process dies."""
    yield
    jax.clear_caches()
