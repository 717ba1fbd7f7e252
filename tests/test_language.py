"""Docstrings that can be understood alone: the first line begins with a noun or a verb."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# They lean on the name or on a neighbour: "Of the others", "What is left", "The same, rounded".
LEANING = (
    *("What", "How", "Which", "When", "Where", "Why", "Who", "Whose", "Whatever"),
    *("That", "This", "These", "Those", "It", "Its", "They", "There", "The same"),
    *("Of", "From", "To", "With", "As", "In", "Over", "At", "By", "Like"),
    *("And", "So", "Else", "Not", "Also", "Otherwise"),
)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def first_lines(source):
    """Line and name of each docstring of a source, and its first line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            where = getattr(node, "lineno", 1), getattr(node, "name", "module")
            yield *where, docstring.splitlines()[0]


def leans(line):
    return re.match(rf"({'|'.join(LEANING)})(?![\w-])", line) is not None


@pytest.mark.parametrize("folder", ["g4attn_jax", "bench"])
def test_docstrings_begin_with_a_noun_or_a_verb(folder):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {name}: {line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, name, line in first_lines(path.read_text())
        if leans(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Of the cache, in words.", True),
        ("What is left.", True),
        ("The same, rounded.", True),
        ("The samples of a run.", False),
        ("On-line softmax of a tile.", False),
        ("Tokens of a step.", False),
        ("Tokens that it reads. Of each the position.", False),
    ],
)
def test_words_that_lean(line, expected):
    assert leans(line) == expected
