"""Record of what passed on which GPU, and whether the kernels are still those that passed.

    python -m tests.gpu.evidence       says which ops are stale; exit status 1 if any is

`tests/gpu_evidence.json` has of every op a digest of each module of `g4attn_jax/ops` that its
kernels are made of, and the runs in which all GPU tests of the op passed with these modules. Under
"mended_since" a run may name tests that failed for a fault of the test, not of a kernel, each with
its fault. They have not passed yet, so `python -m tests.gpu` runs their ops again.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OPS = ROOT / "g4attn_jax" / "ops"
FILE = ROOT / "tests" / "gpu_evidence.json"
_PACKAGE = "g4attn_jax.ops"
# Argument checks, and which kernel runs: neither is part of a kernel or of its launch. Modules that
# launches are chosen in are, and so are those that Triton and Mosaic kernels share.
_NOT_KERNELS = {"checks", "op"}
# Of an op's own folder. A formula that a kernel imports counts nevertheless.
_NOT_ROOTS = {"__init__", "cases", "reference"}


def op_names() -> list[str]:
    """The folders of `g4attn_jax/ops` that have a public function."""
    tree = ast.parse((OPS / "__init__.py").read_text())
    modules = {name for name in _imported(tree) if (OPS / name).is_dir()}
    return sorted(modules)


def modules_of(op: str) -> dict[str, str]:
    """Digests of the modules that an op's launches and kernel bodies reach, by path below `ops`.

    Followed are imports of modules of `g4attn_jax.ops`, wherever in a file they stand.
    """
    found, roots = {}, [p for p in (OPS / op).glob("*.py") if p.stem not in _NOT_ROOTS]
    left = [path.relative_to(OPS).as_posix() for path in roots]
    while left:
        path = left.pop()
        if path not in found:
            tree = ast.parse((OPS / path).read_text())
            found[path] = digest(tree)
            left += [module for name in _imported(tree) for module in _file_of(name)]
    return dict(sorted(found.items()))


def digest(tree: ast.AST) -> str:
    """Digest of a module without comments, docstrings and formatting; equal on every Python."""
    return hashlib.sha256(repr(_essence(tree)).encode()).hexdigest()[:16]


def _essence(node):
    """Nested tuples of a syntax tree; fields that are empty, and may not exist, are left out."""
    if isinstance(node, list):
        return [_essence(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    fields.pop("ctx", None)
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if ast.get_docstring(node, clean=False) is not None:
            fields["body"] = fields["body"][1:]
    if isinstance(node, ast.Constant):
        fields = {"value": (type(node.value).__name__, repr(node.value))}
    return type(node).__name__, [(name, _essence(value)) for name, value in fields.items()]


def _imported(tree) -> Iterator[str]:
    """Modules and names that are imported from below `g4attn_jax.ops`, relative to it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = []
        for name in names:
            if name.startswith(_PACKAGE + "."):
                yield name.removeprefix(_PACKAGE + ".")


def _file_of(name) -> list[str]:
    """The module that a dotted name is, if it is one that counts."""
    path = name.replace(".", "/") + ".py"
    if name in _NOT_KERNELS or not (OPS / path).exists():
        return []
    return [path]


def read() -> dict:
    """Contents of the file; empty if there is none."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def stale(evidence: dict | None = None) -> dict[str, list[str]]:
    """Ops whose kernels have not passed as they are, each with the modules that say so."""
    evidence = read() if evidence is None else evidence
    found = {}
    for op in op_names():
        now, then = modules_of(op), evidence.get(op, {}).get("modules", {})
        changed = sorted(path for path in {*now, *then} if now.get(path) != then.get(path))
        if changed or not evidence[op]["runs"]:
            found[op] = changed
    return found


def unfinished() -> list[str]:
    """Ops of which a test has been mended since their kernels ran."""
    return [op for op, passed in read().items() if any("mended_since" in r for r in passed["runs"])]


def record(op: str, run: dict) -> None:
    """Adds a run in which all GPU tests of an op passed, with the modules as they are now.

    Of other modules all runs are forgotten, of the same GPU and JAX the one before.
    """
    evidence, modules = read(), modules_of(op)
    before = evidence.get(op, {})
    runs = before.get("runs", []) if before.get("modules") == modules else []
    same = [r for r in runs if (r["gpu"], r["jax"]) != (run["gpu"], run["jax"])]
    evidence[op] = {"modules": modules, "runs": [*same, run]}
    FILE.write_text(json.dumps(dict(sorted(evidence.items())), indent=1) + "\n")


def describe(stale_ops: Iterable[tuple[str, list[str]]]) -> str:
    """One line an op."""
    lines = [f"{op}: {', '.join(paths) or 'no run'}" for op, paths in stale_ops]
    return "\n".join(lines)


def main() -> int:
    found = stale()
    if unfinished():
        print("tests were mended since, and have not run again:", *unfinished())
    if not found:
        print("every kernel is as it ran on a GPU")
        return 0
    print("changed since their GPU tests passed (run python -m tests.gpu where there is a GPU):")
    print(describe(found.items()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
