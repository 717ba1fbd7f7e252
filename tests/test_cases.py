"""The lists of cases of the ops, and which tests run every day."""

import collections
import itertools

import jax
import jax.numpy as jnp
import pytest

from g4attn_jax.config import ProjectionMode
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
from g4attn_jax.testing.case import Case, distinct, nbytes
from g4attn_jax.testing.cases import all_cases
from tests.coverage_of_everyday import missed, ranges
from tests.everyday import everyday_cases, has_word, in_share
from tests.gpu import evidence


def test_every_op_has_cases_for_every_day_and_for_compiling():
    tags = collections.defaultdict(set)
    for case in all_cases():
        tags[case.op] |= case.tags
    assert sorted(tags) == evidence.op_names()
    assert all({"everyday", "compile", "odd"} <= of_op for of_op in tags.values())


def test_names_are_unlike():
    names = collections.Counter(map(str, all_cases()))
    assert [name for name, count in names.items() if count > 1] == []


SMALL = [
    case
    for case in all_cases("everyday")
    if "large" not in case.tags and nbytes(case.structs()) < 4 * 2**20
]


@everyday_cases
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_arguments_are_as_described(case):
    def described(tree):
        return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)

    assert described(case.arguments()) == described(case.structs())
    assert case.bytes() > 0


def test_a_case_that_is_listed_twice_has_all_tags():
    sizes = ProjectionMode.QK_ONLY, 8, 2, 64
    one, other = (QkvRmsNormCase(*sizes, 5, tags={tag}) for tag in ("odd", "bench"))
    both, third = distinct(one, QkvRmsNormCase(*sizes, 6), other)
    assert both == one and both.tags == {"odd", "bench"} and third.tokens == 6


def test_an_unknown_tag_is_refused():
    with pytest.raises(ValueError, match=r"tags .*'every day'"):
        Case(tags={"every day"})


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("31b", True),
        ("e2b", False),
        ("gemma-4-31b-ring", True),
        ("ring-KVCache", True),
        ("1", False),
    ],
)
def test_words_of_a_name(word, found):
    assert has_word("test_layers[gemma-4-31b-ring-KVCache]", word) == found


def test_all_shares_together_are_everything():
    names = [f"tests/test_x.py::test_y[{i}]" for i in range(500)]
    shares = [[name for name in names if in_share(name, f"{seed}/10")] for seed in range(7, 17)]
    assert sorted(itertools.chain(*shares)) == sorted(names)
    assert all(20 < len(share) < 80 for share in shares)
    assert shares[0] == [name for name in names if in_share(name, "17/10")]


def test_lines_that_the_whole_suite_alone_reaches():
    def report(**lines):
        return {"files": {name: {"executed_lines": given} for name, given in lines.items()}}

    found = list(missed(report(a=[1, 2], b=[5]), report(a=[1, 2, 3, 4, 7], b=[5], c=[1])))
    assert found == [("a", [3, 4, 7]), ("c", [1])]
    assert ranges([3, 4, 7]) == "3-4, 7"
