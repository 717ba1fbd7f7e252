"""The cases of all ops."""

import importlib
import pkgutil

from g4attn_jax import ops
from g4attn_jax.testing.case import Case, tagged


def all_cases(*tags: str) -> list[Case]:
    """Cases of every op, in the order of the ops' names: those with one of the tags, or all."""
    cases = []
    for folder in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{folder.name}.cases"
        if folder.ispkg and importlib.util.find_spec(name) is not None:
            cases += importlib.import_module(name).CASES
    return tagged(cases, *tags) if tags else cases
