"""`check`: the published equivalence sweep of the fused norms, on the device at hand."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax import ops, oracle
from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.implementation import triton_refusal

# The sweep of the original kernel's tests (SGLang PR 25461) and its limits.
HEAD_DIMS = (128, 256, 512)
HEADS = ((32, 16), (16, 8))
TOKENS = (1, 7, 64, 1024)
# Pallas' interpreter takes half a minute for a case of 1024 tokens.
MAX_INTERPRETED_TOKENS = 64
MAX_ABSOLUTE_ERROR = 2e-2
MAX_RELATIVE_ERROR = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape; `mode` None is `q_keqv_rms_norm`, the rest is `qkv_rms_norm`."""

    mode: ProjectionMode | None
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int

    @property
    def op(self) -> str:
        """Name and mode of the op."""
        return "q_keqv_rms_norm" if self.mode is None else f"qkv_rms_norm {self.mode.name}"

    def arguments(self, dtype=jnp.bfloat16, seed=0) -> list[jax.Array]:
        """Random buffers and scales, of magnitudes as trained ones have."""
        keys = jax.random.split(jax.random.key(seed), 4)
        m, nq, nkv, d = self.tokens, self.num_q_heads, self.num_kv_heads, self.head_dim
        if self.mode is None:
            shapes = [(m, nq, d), (m, nkv, d)]
        else:
            shapes = [(m, nkv, nq // nkv + self.mode.num_kv_projections, d)]
        buffers = [
            3 * jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=False)
        ]
        # Up to 1.25, so that no result reaches 8, where half an ulp of bfloat16 is above 2e-2.
        scales = jax.random.uniform(keys[3], (2, d), minval=0.5, maxval=1.25).astype(dtype)
        return [*buffers, *(scales[:1] if self.mode is ProjectionMode.Q_ONLY else scales)]

    def run(self, arguments, implementation):
        """The op's outputs."""
        if self.mode is None:
            return ops.q_keqv_rms_norm(*arguments, implementation=implementation)
        return ops.qkv_rms_norm(*arguments, mode=self.mode, implementation=implementation)

    def expected(self, arguments, norm: oracle.Norm):
        """The op's outputs in NumPy with the given norm."""
        if self.mode is None:
            return oracle.q_keqv_rms_norm(*arguments, norm=norm)
        return oracle.qkv_rms_norm(*arguments, mode=self.mode, norm=norm)


@dataclasses.dataclass(frozen=True)
class Result:
    """Errors of one case against float64; `passed` by the published limits and the usual path's."""

    max_absolute: float
    max_relative: float
    usual_absolute: float
    passed: bool


def sweep(tokens=TOKENS) -> Iterator[Case]:
    """All cases: every op and mode over the published shapes."""
    modes = (None, *ProjectionMode)
    for mode, d, (nq, nkv), m in itertools.product(modes, HEAD_DIMS, HEADS, tokens):
        yield Case(mode, nq, nkv, d, m)


def judge(case: Case, arguments, implementation) -> Result:
    """Runs a case and holds it against the oracle and the usual path."""
    absolute = relative = usual = 0.0
    passed = True
    rows = zip(
        jax.tree.leaves(case.run(arguments, implementation)),
        jax.tree.leaves(case.expected(arguments, oracle.rms_norm)),
        jax.tree.leaves(case.expected(arguments, oracle.usual_rms_norm)),
        strict=True,
    )
    for actual, exact, usual_path in rows:
        actual = np.asarray(actual)
        error, usual_error = oracle.max_error(actual, exact), oracle.max_error(usual_path, exact)
        relative_error = oracle.max_error(actual / exact, 1.0)
        passed &= (
            error <= MAX_ABSOLUTE_ERROR
            and relative_error <= MAX_RELATIVE_ERROR
            and oracle.no_worse_than(error, usual_error, actual.dtype)
        )
        absolute, relative = max(absolute, error), max(relative, relative_error)
        usual = max(usual, usual_error)
    return Result(absolute, relative, usual, passed)


def check() -> int:
    """Runs the sweep with every implementation that runs here; prints a table.

    Returns:
        The number of failed cases.
    """
    kernel = "triton_interpret" if triton_refusal() else "triton"
    device = jax.devices()[0]
    print(f"bfloat16 on {device.device_kind} ({device.platform}), JAX {jax.__version__}")
    print(
        f"limits: max abs {MAX_ABSOLUTE_ERROR}, max rel {MAX_RELATIVE_ERROR}, and no worse than "
        "Hugging Face's roundings; all against float64"
    )
    if kernel == "triton_interpret":
        print(
            "no supported GPU: the kernel runs in Pallas' interpreter, up to "
            f"{MAX_INTERPRETED_TOKENS} tokens"
        )
    header = ("op", "Nq/Nkv", "D", "M", "implementation", "max abs", "usual", "max rel", "")
    layout = "{:<24} {:>6} {:>4} {:>5} {:<17} {:>9} {:>9} {:>9} {}"
    print(layout.format(*header))
    failures = 0
    for case in sweep():
        arguments = case.arguments()
        for implementation in (kernel, "xla"):
            if implementation == "triton_interpret" and case.tokens > MAX_INTERPRETED_TOKENS:
                continue
            result = judge(case, arguments, implementation)
            failures += not result.passed
            print(
                layout.format(
                    case.op,
                    f"{case.num_q_heads}/{case.num_kv_heads}",
                    case.head_dim,
                    case.tokens,
                    implementation,
                    f"{result.max_absolute:.2e}",
                    f"{result.usual_absolute:.2e}",
                    f"{result.max_relative:.2e}",
                    "pass" if result.passed else "FAIL",
                ),
                flush=True,
            )
    print(f"{failures} failed" if failures else "all passed")
    return failures
