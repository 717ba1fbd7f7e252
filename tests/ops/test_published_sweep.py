"""The sweep published with the original kernel, over both norms."""

import pytest

from g4attn_jax.commands import cases, check


# Thinned for the interpreter; tests/gpu/test_kernels.py runs all of it.
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
@pytest.mark.parametrize("case", list(cases.norm_sweep(tokens=(1, 33))), ids=str)
def test_published_sweep(case, implementation):
    result = check.judge(case, case.arguments(), implementation)
    assert result.passed, result
