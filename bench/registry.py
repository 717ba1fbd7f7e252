"""The benchmarks that there are: a module each in `bench.ops` and `bench.steps`; tunings apart."""

import importlib
import pkgutil

import bench.ops
import bench.steps
import bench.tunings
from bench.benchmark import Benchmark

_PREFIX = "tune_"


def names() -> list[str]:
    """Names of the benchmarks, ops first."""
    return [*_modules(bench.ops), *_modules(bench.steps)]


def tuning_names() -> list[str]:
    """Names of the ops whose launches are tuned."""
    return list(_modules(bench.tunings))


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name, or for "tune_NAME" the tuning of an op.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name.startswith(_PREFIX):
        return tuning(name.removeprefix(_PREFIX))
    return _of(name, _modules(bench.ops) | _modules(bench.steps))


def tuning(name: str) -> Benchmark:
    """The tuning of an op's launches.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    return _of(name, _modules(bench.tunings))


def _of(name, modules):
    if name not in modules:
        raise ValueError(f"no benchmark is called {name}; accepted: {', '.join(modules)}")
    return importlib.import_module(modules[name]).BENCHMARK


def _modules(package):
    """Full names of the modules of a package that hold a benchmark, by their own names."""
    return {
        module.name: f"{package.__name__}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }
