"""Kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.sanitizer_program import PROGRAMS


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.gpu(*program.ops, slow=True))
        for name, program in PROGRAMS.items()
    ],
)
def test_compute_sanitizer_is_clean(name, tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # JAX's own start-up calls may fail where a driver lacks a feature; only kernels count here.
    command += ["--report-api-errors", "no"]
    names = "norm _attention combine_splits grouped_ linear geglu logits router_ moe_"
    for kernel in names.split():
        command += ["--kernel-regex", f"kernel_substring={kernel}"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.sanitizer_program", name],
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "RACECHECK SUMMARY: 0" in result.stdout
    assert f"launched {PROGRAMS[name].launches}\n" in result.stdout
