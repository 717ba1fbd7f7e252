"""Numbers of launches that the programs for compute-sanitizer are to make."""

import pytest

from g4attn_jax.ops import op
from tests.everyday import everyday
from tests.gpu.sanitizer_program import PROGRAMS


@everyday()
@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"verification"}))  # it asks the GPU
def test_a_program_makes_as_many_launches_as_it_says(name, monkeypatch):
    """A wrong number would fail where compute-sanitizer runs, which is on a GPU alone."""
    monkeypatch.setattr(op, "check_implementation", lambda implementation: None)
    monkeypatch.setattr(op.Op, "_choose", lambda *arguments: op._Choice(None))  # by XLA
    assert PROGRAMS[name].run() == PROGRAMS[name].launches
