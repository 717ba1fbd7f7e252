"""Marks of tests that run a kernel."""

import pytest


def kernel_of(*ops: str) -> list:
    """Values of `implementation` that are a kernel: interpreted anywhere, and on a GPU.

    Args:
        ops: folders of `g4attn_jax/ops` whose kernels the test on a GPU is evidence for.
    """
    return ["triton_interpret", pytest.param("triton", marks=pytest.mark.gpu(*ops))]
