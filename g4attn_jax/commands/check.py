"""`check`: kernels of the ops of the published equivalence sweep, on the device at hand."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import numpy as np

from g4attn_jax.commands.progress import Progress
from g4attn_jax.ops.gpu import gpu_refusal
from g4attn_jax.ops.op import XLA, KernelRefusal, kernels_of
from g4attn_jax.testing import oracle
from g4attn_jax.testing.case import Case
from g4attn_jax.testing.cases import all_cases

# Pallas' interpreter takes half a minute for a case of 1024 tokens.
MAX_INTERPRETED_TOKENS = 64
# Of the interpreter's programs, which are large: optimising them takes longer than it saves.
_INTERPRETER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# The limits of the original kernel's tests (SGLang PR 25461).
MAX_ABSOLUTE_ERROR = 2e-2
MAX_RELATIVE_ERROR = 1e-2
_LAYOUT = "{:<43} {:>6} {:>4} {:>5} {:<20} {:>9} {:>9} {:>9} {}"


@dataclasses.dataclass(frozen=True)
class Result:
    """Errors of one case against float64; `passed` by the published limits and the usual path's."""

    max_absolute: float
    max_relative: float
    usual_absolute: float
    passed: bool


def judge(case: Case, arguments, implementation) -> Result:
    """Runs a case and holds it against the oracle and the usual path.

    Raises:
        KernelRefusal: the kernel does not take this case.
    """
    absolute = relative = usual = 0.0
    passed = True
    run = functools.partial(case.run, implementation=implementation)
    if _is_interpreted(implementation):
        run = jax.jit(run, compiler_options=_INTERPRETER_OPTIONS)
    outputs = run(arguments), case.exact(arguments), case.usual(arguments)
    for actual, exact, usual_path in zip(*map(jax.tree.leaves, outputs), strict=True):
        actual, exact = np.asarray(actual), np.asarray(exact).astype(np.float64)
        error = oracle.max_error(actual, exact)
        relative_error = case.relative_error(actual, exact)
        passed &= (
            error <= MAX_ABSOLUTE_ERROR
            and relative_error <= MAX_RELATIVE_ERROR
            and oracle.no_worse_than(
                case.error(actual, exact), case.error(usual_path, exact), actual.dtype
            )
        )
        absolute, relative = max(absolute, error), max(relative, relative_error)
        usual = max(usual, oracle.max_error(usual_path, exact))
    return Result(absolute, relative, usual, passed)


def sweep() -> list[Case]:
    """The published equivalence sweep."""
    return all_cases("published")


def mosaic_cases() -> list[Case]:
    """Cases of real layers for Mosaic GPU's kernel, which takes none of the sweep.

    They are the smallest of each form of cache.
    """
    cases = [c for c in all_cases("real") if c.op == "decode_attention" and c.tokens == 6]
    smallest = {}
    for case in sorted(cases, key=lambda case: case.bytes()):
        smallest.setdefault(case.form, case)
    return list(smallest.values())


def sample(cases: Iterable[Case]) -> list[Case]:
    """One case of each op, mode, form and head dim, with windows, heads and tokens in turn.

    None has more tokens than Pallas' interpreter takes: every kernel runs wherever the sample does.
    """
    ops = {}
    for case in cases:
        if case.tokens <= MAX_INTERPRETED_TOKENS:
            label, _, _ = case.label.partition(" window")
            ops.setdefault(label, {}).setdefault(case.head_dim, []).append(case)
    return [
        group[(number + turn) % len(group)]
        for number, groups in enumerate(ops.values())
        for turn, group in enumerate(groups.values())
    ]


def implementations(case: Case, whole_sweep: bool) -> list[str]:
    """Names of the kernels of a case's op, then of its reference.

    Without a GPU they are interpreters. That of Mosaic GPU is slow, and for the whole sweep alone.
    """
    kernels = kernels_of(case.op)
    if gpu_refusal() is None:
        return [*(kernel.name for kernel in kernels), XLA]
    interpreters = [name for kernel in kernels for name in kernel.names if _is_interpreted(name)]
    return [*(name for name in interpreters if whole_sweep or "mosaic" not in name), XLA]


def check(whole_sweep: bool = False) -> int:
    """Runs cases with each kernel of their op and with XLA; prints a table.

    A kernel that refuses a case has a row with its reason. Where Mosaic GPU's kernel runs, cases of
    its own come last.

    Args:
        whole_sweep: rather than a sample of it.

    Returns:
        The number of failed cases.
    """
    _print_head(whole_sweep)
    cases, failures = sweep() if whole_sweep else sample(sweep()), 0
    if whole_sweep or gpu_refusal() is None:
        cases = cases + mosaic_cases()
    progress = Progress("checking", len(cases))
    for done, case in enumerate(cases):
        progress.draw(done)
        arguments = case.arguments()
        for implementation in implementations(case, whole_sweep):
            if _is_interpreted(implementation) and case.tokens > MAX_INTERPRETED_TOKENS:
                continue
            try:
                result = judge(case, arguments, implementation)
            except KernelRefusal as error:
                outcome = ("", "", "", f"skipped: {error.reason}")
            else:
                failures += not result.passed
                outcome = _outcome(result)
            progress.clear()
            print(_LAYOUT.format(*_sizes(case), implementation, *outcome), flush=True)
            progress.draw(done)
    progress.clear()
    print(f"{failures} failed" if failures else "all passed")
    return failures


def _print_head(whole_sweep):
    """Prints the device, the limits, how kernels run, and the names of the columns."""
    device = jax.devices()[0]
    print(f"bfloat16 on {device.device_kind} ({device.platform}), JAX {jax.__version__}")
    print(
        f"limits: max abs {MAX_ABSOLUTE_ERROR}, relative {MAX_RELATIVE_ERROR} (of every element; "
        "norm-wise after a rotation and for attention), and no worse than Hugging Face's roundings "
        "(by the largest error; attention norm-wise); all against float64"
    )
    if gpu_refusal() is not None:
        mosaic = "" if whole_sweep else "; Mosaic GPU's with --all alone"
        print(
            f"no supported GPU: kernels run in interpreters, up to {MAX_INTERPRETED_TOKENS} "
            f"tokens{mosaic}"
        )
    print(
        _LAYOUT.format(
            *("op", "Nq/Nkv", "D", "M", "implementation", "max abs", "usual", "relative", "")
        )
    )


def _sizes(case):
    heads = f"{case.num_q_heads}/{case.num_kv_heads}"
    return case.label, heads, case.head_dim, case.tokens


def _outcome(result):
    errors = result.max_absolute, result.usual_absolute, result.max_relative
    return *(f"{error:.2e}" for error in errors), "pass" if result.passed else "FAIL"


def _is_interpreted(implementation):
    return implementation.endswith("_interpret")
