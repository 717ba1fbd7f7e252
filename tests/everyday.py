"""Choice of the tests that run every day, and of the share of the others that a run of CI takes.

A test is one of every day unless `@everyday` says otherwise:

    @everyday("31b", "e2b")         of its cases those whose name has one of these words
    @everyday()                     none of its cases

A parameter that is a `Case` of an op says it itself: with `@everyday_cases` those with the tag.
"""

import hashlib
import re
from collections.abc import Iterable

import pytest

from g4attn_jax.testing.case import Case

everyday = pytest.mark.everyday
everyday_cases = pytest.mark.everyday_cases


def is_everyday(item: pytest.Item) -> bool:
    """Whether a test runs every day."""
    if item.get_closest_marker("everyday_cases") is not None:
        given = item.callspec.params.values()
        if not all("everyday" in case.tags for case in given if isinstance(case, Case)):
            return False
    marker = item.get_closest_marker("everyday")
    return marker is None or any(has_word(item.name, word) for word in marker.args)


def has_word(name: str, word: str) -> bool:
    """Whether a test's name, with its parameters in brackets and dashes between them, has a word.

    Words of several parameters have their dashes: "31b-Paged".
    """
    edge = r"(^|$|[\[\]-])"
    return re.search(edge + re.escape(word) + edge, name) is not None


def unknown_words(items: Iterable[pytest.Item]) -> list[str]:
    """Words of `@everyday` that no case of their test has: it would not run every day."""
    names = {}
    for item in items:
        marker = item.get_closest_marker("everyday")
        for word in marker.args if marker else ():
            names.setdefault((item.nodeid.split("[")[0], word), []).append(item.name)
    return [
        f"{test}: no case has {word!r}"
        for (test, word), found in names.items()
        if not any(has_word(name, word) for name in found)
    ]


def in_share(nodeid: str, share: str) -> bool:
    """Whether a test is in a share, "seed/parts": one of so many parts, another for another seed.

    The parts of consecutive numbers have all tests between them.
    """
    seed, _, parts = share.rpartition("/")
    digest = hashlib.sha256(nodeid.encode()).digest()
    return (int.from_bytes(digest[:8]) + int(seed)) % int(parts) == 0
