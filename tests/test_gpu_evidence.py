"""The gate: no kernel differs from the one that passed on a GPU; what counts, what is recorded."""

import ast
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.everyday import everyday
from tests.gpu import __main__ as command
from tests.gpu import evidence

README = evidence.ROOT / "README.md"
RUN = {"gpu": "NVIDIA H200", "driver": "1", "jax": "0.11.2", "date": "2026-01-01", "passed": 3}


def test_every_kernel_has_passed_on_a_gpu_as_it_is():
    """Else run `python -m tests.gpu` where there is a GPU, and commit the file that it writes."""
    assert evidence.stale() == {}


def test_the_readme_says_where():
    readme = README.read_text()
    for op, passed in evidence.read().items():
        for run in passed["runs"]:
            model = run["gpu"].removeprefix("NVIDIA ").split()[0]
            assert f"GPU tests passed with {run['jax']}" in readme, (op, run)
            assert model in readme, (op, run)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the ops, to be changed, and evidence that all have passed as they are."""
    shutil.copytree(evidence.OPS, tmp_path / "ops")
    monkeypatch.setattr(evidence, "OPS", tmp_path / "ops")
    monkeypatch.setattr(evidence, "FILE", tmp_path / "evidence.json")
    for op in evidence.op_names():
        evidence.record(op, RUN)

    def change(path, old, new):
        path = tmp_path / "ops" / path
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("path", "old", "new", "ops"),
    [
        # Arithmetic of the kernel for several tokens.
        (
            "decode_attention/mosaic_kernel.py",
            "total = total * alpha + jnp.sum(weights, axis=1)",
            "total = total + jnp.sum(weights, axis=1)",
            {"decode_attention"},
        ),
        # A constant that launches were tuned with.
        (
            "prefill_attention/triton.py",
            "(128, 32, 2, 8, 2)",
            "(128, 32, 2, 8, 3)",
            {"prefill_attention"},
        ),
        # A module of both attention kernels.
        (
            "flash_attention/triton_rows.py",
            "exists & is_page",
            "exists",
            {"decode_attention", "prefill_attention"},
        ),
        ("qkv_norm_rope/triton.py", "rsqrt(", "sqrt(", {"qkv_norm_rope", "qkv_norm_rope_write"}),
        # A formula of the reference that a kernel takes too.
        (
            "linear/reference.py",
            "approximate=True",
            "approximate=False",
            {"linear", "grouped_gated_matmul"},
        ),
    ],
)
def test_a_changed_kernel_is_stale(path, old, new, ops, copy):
    copy(path, old, new)
    found = evidence.stale()
    assert found.keys() == ops
    assert all(changed == [path] for changed in found.values())
    assert path in evidence.describe(found.items())


def test_a_new_module_of_a_kernel_is_stale(copy):
    (evidence.OPS / "decode_attention" / "combine.py").write_text("X = 1\n")
    assert evidence.stale() == {"decode_attention": ["decode_attention/combine.py"]}


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("decode_attention/mosaic_limits.py", "KEYS = 64  # of a tile", "KEYS = 64"),
        ("decode_attention/mosaic_kernel.py", '"""Runs a program;', '"""A program:'),
        (
            "flash_attention/operands.py",
            "LOG2_E = 1.4426950408889634",
            "LOG2_E = (\n    1.4426950408889634\n)",
        ),
        # Neither is part of a kernel or of a launch.
        ("checks.py", "def check_packed", "def check_packs"),
        ("op.py", "def check_implementation", "def check_implementations"),
        ("decode_attention/reference.py", "axis=-1", "axis=-2"),
    ],
)
def test_what_is_no_part_of_a_kernel_does_not_count(path, old, new, copy):
    copy(path, old, new)
    assert evidence.stale() == {}


def test_docstrings_of_every_kind_do_not_count():
    def digest(source):
        return evidence.digest(ast.parse(source))

    assert digest('"""A."""\nclass C:\n    """B."""\n    x = 1\n') == digest("class C: x = 1")
    assert digest('def f():\n    "A."\n    return "A."') == digest('def f(): return "A."')
    assert digest("x = 1") != digest("x = 1.0")
    assert digest("x = 1") != digest("x = True")
    assert digest("f(a, b=1)") != digest("f(a, c=1)")


def test_an_op_without_evidence_is_stale(copy):
    evidence.FILE.unlink()
    assert evidence.stale().keys() == set(evidence.op_names())
    assert (
        "decode_attention" in evidence.op_names() and "flash_attention" not in evidence.op_names()
    )


def report(test, outcome="passed", when="call", ops=("linear",)):
    return SimpleNamespace(
        nodeid=test, outcome=outcome, when=when, user_properties=[("ops", list(ops))]
    )


@pytest.mark.parametrize(
    ("reports", "recorded"),
    [
        ([report("a"), report("b")], True),
        ([report("a"), report("b", "failed")], False),
        ([report("a"), report("b"), report("b", "failed", "teardown")], False),
        ([report("a"), report("b", "skipped", "setup")], False),
        ([report("a"), report("b", when="setup")], False),  # never ran
        ([report("a")], False),
        ([report("a", ops=["geglu"]), report("b", ops=["geglu"])], False),
        # The process died: who the test belongs to is unknown.
        (
            [
                report("a"),
                SimpleNamespace(nodeid="b", outcome="failed", when="???", user_properties=[]),
            ],
            False,
        ),
    ],
)
def test_only_what_ran_and_passed_is_recorded(reports, recorded, copy, monkeypatch):
    evidence.FILE.unlink()
    monkeypatch.setattr(
        command, "machine", lambda: {name: RUN[name] for name in ("gpu", "driver", "jax")}
    )
    results = command.Results()
    results.pytest_xdist_node_collection_finished(None, ["a", "b"])
    for one in reports:
        results.pytest_runtest_logreport(one)
    refused = command.record(["linear"], results)
    assert bool(refused) != recorded
    assert ("linear" in evidence.read()) == recorded
    assert ("linear" in evidence.stale()) != recorded


@pytest.mark.parametrize("further", [["-k", "one"], ["tests/gpu/test_moe.py"], []])
def test_nothing_is_recorded_where_tests_may_be_left_out(further, copy, monkeypatch, capsys):
    evidence.FILE.unlink()
    results = command.Results()
    results.pytest_xdist_node_collection_finished(None, ["a"])
    results.pytest_runtest_logreport(report("a", ops=evidence.op_names()))
    monkeypatch.setattr(command.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(command, "gpus", lambda: {"0": "NVIDIA H200, 1"})
    monkeypatch.setattr(command, "run", lambda *_: results)
    assert command.main(["--all", *further]) == bool(further)
    assert bool(evidence.read()) != bool(further)
    assert ("nothing is recorded" in capsys.readouterr().out) == bool(further)


def test_gpus_of_several_kinds_are_refused(monkeypatch):
    monkeypatch.setattr(command, "gpus", lambda: {"0": "NVIDIA H200, 1", "1": "NVIDIA A100, 1"})
    with pytest.raises(SystemExit, match="NVIDIA A100"):
        command.machine()


def test_ops_run_again_whose_tests_were_mended(copy):
    evidence.FILE.unlink()
    evidence.record("linear", RUN)
    evidence.record("qkv_rms_norm", RUN | {"mended_since": {"a": "its criterion"}})
    assert evidence.unfinished() == ["qkv_rms_norm"]
    evidence.record("qkv_rms_norm", RUN)
    assert evidence.unfinished() == []


def test_runs_of_other_modules_are_forgotten(copy):
    evidence.FILE.unlink()
    evidence.record("linear", RUN)
    evidence.record("linear", RUN | {"gpu": "NVIDIA A100"})
    evidence.record("linear", RUN | {"passed": 4})
    assert [(r["gpu"], r["passed"]) for r in evidence.read()["linear"]["runs"]] == [
        ("NVIDIA A100", 3),
        ("NVIDIA H200", 4),
    ]
    copy("linear/launch.py", "_MAX_PARTIAL_SUMS = 8", "_MAX_PARTIAL_SUMS = 4")
    evidence.record("linear", RUN)
    assert evidence.read()["linear"]["runs"] == [RUN]


@everyday()
def test_a_process_without_a_gpu_is_replaced(tmp_path):
    """After a fault nothing runs on the GPU in the same process: the next test has another."""
    (tmp_path / "test_fault.py").write_text(
        "import os, pathlib\n"
        "def process():\n"
        "    with open(pathlib.Path(__file__).parent / 'processes', 'a') as file:\n"
        "        print(os.getpid(), file=file)\n"
        "def test_before(): process()\n"
        "def test_fault():\n"
        "    process()\n"
        "    raise RuntimeError('INTERNAL: CUDA_ERROR_MISALIGNED_ADDRESS: misaligned address')\n"
        "def test_after(): process()\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "1", "--max-worker-restart", "9", "-p"]
    command += ["tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=evidence.ROOT, capture_output=True, text=True)
    assert "1 failed, 2 passed" in result.stdout, result.stdout
    assert "CUDA_ERROR_MISALIGNED_ADDRESS" in result.stderr
    before, fault, after = (tmp_path / "processes").read_text().split()
    assert before == fault != after
