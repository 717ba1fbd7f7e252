"""Run the GPU tests and keep the evidence.

    python -m tests.gpu             the tests of the ops whose kernels have changed
    python -m tests.gpu --all       all GPU tests
    python -m tests.gpu --tables    attention over whole tables of shapes, drafts of every number;
                                    records nothing

On a machine with an NVIDIA GPU, with the extra `test` installed. An op is recorded in
`tests/gpu_evidence.json` if every one of its tests ran and passed. Further arguments go to pytest,
which may leave tests out for them: then nothing is recorded.
"""

import argparse
import collections
import datetime
import functools
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import GPUS
from tests.gpu import evidence

MAX_SECONDS, MAX_SECONDS_OF_TABLES = 360, 540
# On each GPU; each may need 6 GB of its memory.
MAX_PROCESSES = 14


class Results:
    """Reports of pytest on each test: outcome, ops and what the test measured."""

    def __init__(self):
        self.collected, self.outcomes, self.properties = set(), {}, {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        """All tests are over: to end the processes takes a while, and is not to be interrupted."""
        signal.alarm(0)

    def pytest_xdist_node_collection_finished(self, node, ids):
        self.collected.update(ids)

    def pytest_runtest_logreport(self, report):
        self.properties[report.nodeid] = dict(report.user_properties)
        # A test has passed when it has run, and nothing before or after was wrong.
        if report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def counts(self, op: str) -> collections.Counter:
        """Outcomes of the tests of an op. A test whose process died does not say of which op."""
        return collections.Counter(
            outcome
            for test, outcome in self.outcomes.items()
            if op in self.properties[test].get("ops", (op,))
        )

    @property
    def missing(self) -> set[str]:
        """Tests that were to run and did not."""
        return self.collected - set(self.outcomes)


@functools.cache
def gpus() -> dict[str, str]:
    """Name and driver of each GPU by its index, from nvidia-smi: this command holds none itself."""
    query = ["nvidia-smi", "--query-gpu=index,name,driver_version", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query += ["-i", visible]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split(", ", maxsplit=1) for line in lines)


def machine() -> dict[str, str]:
    """The GPU, its driver and JAX.

    Raises:
        SystemExit: there are GPUs of several kinds, of which a record could not say which it was.
    """
    kinds = set(gpus().values())
    if len(kinds) > 1:
        sys.exit(f"GPUs are of several kinds: {', '.join(kinds)}; set CUDA_VISIBLE_DEVICES")
    gpu, driver = kinds.pop().split(", ")
    return {"gpu": gpu, "driver": driver, "jax": importlib.metadata.version("jax")}


def run(arguments: list[str], seconds: int, processes: int) -> Results:
    """Run pytest in processes side by side; those that a test kills are started again."""
    results = Results()
    # Processes allocate GPU memory as they need it, and give NumPy few threads. Autotuning of XLA's
    # own matmuls is off: every process would repeat it, and no kernel of ours depends on it.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "2"}
    os.environ[GPUS] = ",".join(gpus())  # which tests/conftest.py shares out
    os.environ["XLA_FLAGS"] = flags
    options = ["-m", "gpu", "-q", "-n", str(processes), "--dist", "load", "--maxschedchunk", "1"]
    options += ["--max-worker-restart", "1000", "-p", "no:cacheprovider", "--durations", "25"]
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    pytest.main([*options, *arguments], plugins=[results])
    return results


def _stop(*_):
    raise KeyboardInterrupt("out of time")


def record(ops: list[str], results: Results) -> list[str]:
    """Record the ops of which everything passed; returns the others, each with the reason."""
    about = machine() | {"date": datetime.date.today().isoformat()}
    refused = []
    for op in ops:
        counts = results.counts(op)
        if results.missing or counts["failed"] or counts["skipped"] or not counts["passed"]:
            missing = f", {len(results.missing)} tests of any op not run" * bool(results.missing)
            refused.append(f"{op} is not recorded: {dict(counts)}{missing}")
        else:
            evidence.record(op, about | {"passed": counts["passed"]})
    return refused


def report(results: Results) -> int:
    """Print the largest error of each (tokens, group), or what failed; returns the exit status."""
    failed = [test for test, outcome in results.outcomes.items() if outcome != "passed"]
    for op in ("decode_attention", "prefill_attention"):
        errors = {}
        for found in results.properties.values():
            if found.get("op") == op:
                at = found["tokens"], found["group"]
                errors[at] = max(errors.get(at, 0.0), found["error"])
        groups = sorted({group for _, group in errors})
        print(f"{op}: largest error in 1e-3 by tokens and heads a group")
        print("tokens " + " ".join(f"{group:>5}" for group in groups))
        for tokens in sorted({t for t, _ in errors}):
            row = (errors.get((tokens, group)) for group in groups)
            cells = ("    -" if e is None else f"{1e3 * e:5.2f}" for e in row)
            print(f"{tokens:>6} " + " ".join(cells))
    print(*failed, sep="\n")
    print(f"{len(results.outcomes)} shapes, {len(failed)} failed, {len(results.missing)} not run")
    return bool(failed or results.missing or not results.outcomes)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="all GPU tests")
    what.add_argument("--tables", action="store_true", help="the whole tables of attention")
    parser.add_argument("--processes", type=int, help="14 on each GPU, at most one a core")
    options, further = parser.parse_known_args(argv)
    if shutil.which("nvidia-smi") is None:
        sys.exit("python -m tests.gpu needs an NVIDIA GPU; this machine has no nvidia-smi")
    print(*machine().values(), f"{len(gpus())} of them", sep=", ", flush=True)
    processes = options.processes or min(MAX_PROCESSES * len(gpus()), os.cpu_count())
    if options.tables:
        tests = ["tests/gpu/test_tables.py", "tests/gpu/test_generator.py"]
        arguments = [*tests, "--whole-tables", *further]
        return report(run(arguments, MAX_SECONDS_OF_TABLES, processes))
    changed = dict.fromkeys([*evidence.stale(), *evidence.unfinished()])
    ops = evidence.op_names() if options.all else list(changed)
    if not ops:
        print("every kernel is as it passed on a GPU")
        return 0
    print("ops:", *ops, flush=True)
    arguments = [] if options.all else ["--gpu-ops", ",".join(ops)]
    results = run([*arguments, *further], MAX_SECONDS, processes)
    refused = [f"nothing is recorded, with {further}"] if further else record(ops, results)
    print(*refused, sep="\n")
    return bool(refused or "failed" in results.outcomes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
