"""The sweep published with the original kernel, over both norms."""

import pytest

from g4attn_jax.commands import check
from g4attn_jax.testing.cases import all_cases
from tests.everyday import everyday, everyday_cases

# Thinned for the interpreter; tests/gpu/test_kernels.py runs all of it.
NORMS = [
    case
    for case in all_cases("published")
    if case.op in ("qkv_rms_norm", "q_keqv_rms_norm")
    and (case.tokens in (1, 7) or (case.tokens, case.head_dim) == (64, 128))
]


@everyday("triton_interpret")
@everyday_cases
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_published_sweep(case, implementation):
    result = check.judge(case, case.arguments(), implementation)
    assert result.passed, result
