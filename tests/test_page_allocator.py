import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from g4attn_jax.page_allocator import OutOfPages, PageAllocator
from tests.everyday import everyday

PAGE = 16


def two_in_one_page():
    """a and b own page 0; a ends inside it, b at its end."""
    allocator = PageAllocator(4, PAGE)
    allocator.allocate("a", PAGE)
    allocator.share("b", "a", PAGE)
    allocator.truncate("a", 10)
    return allocator


def raises_and_changes_nothing(allocator, error, message, method, *args):
    before = copy.deepcopy(vars(allocator))
    with pytest.raises(error, match=message) as caught:
        getattr(allocator, method)(*args)
    assert caught.type is error
    assert vars(allocator) == before


@pytest.mark.parametrize("page_size", range(16, 257, 16))
def test_a_new_allocator_is_all_free(page_size):
    allocator = PageAllocator(3, page_size)
    assert (allocator.num_pages, allocator.page_size) == (3, page_size)
    assert allocator.num_free_pages == 3
    assert allocator.sequences == ()


@pytest.mark.parametrize("page_size", [17, 24, 100, 257, 272, 512])
def test_page_sizes_refused(page_size):
    message = f"page_size is {page_size}"
    with pytest.raises(ValueError, match=message):
        PageAllocator(1, page_size)


WRONG_INTEGERS = [-1, True, np.True_, 16.0, np.float32(16), "16", None]


@pytest.mark.parametrize("value", WRONG_INTEGERS)
def test_wrong_integers_are_refused(value):
    for arguments, name in (((value, 16), "num_pages"), ((1, value), "page_size")):
        with pytest.raises(ValueError, match=f"^{name} is .*; accepted: an integer"):
            PageAllocator(*arguments)
    allocator = two_in_one_page()
    for method, *args in (
        ("allocate", "new"),
        ("append", "b"),
        ("share", "new", "b"),
        ("truncate", "b"),
        ("page_table", ["b"]),
    ):
        name = "num_columns" if method == "page_table" else "num_tokens"
        message = f"^{name} is .*; accepted: an integer"
        raises_and_changes_nothing(allocator, ValueError, message, method, *args, value)


@pytest.mark.parametrize(("arguments", "name"), [((0, 16), "num_pages"), ((1, 0), "page_size")])
def test_zeros_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} is 0; accepted: an integer"):
        PageAllocator(*arguments)


def test_numpy_integers_are_taken_and_become_ints():
    allocator = PageAllocator(np.int64(300), np.uint8(16))
    allocator.allocate("a", np.uint8(250))
    allocator.append("a", np.uint8(250))
    allocator.truncate("a", np.int32(499))
    assert allocator.length("a") == 499
    numbers = (allocator.num_pages, allocator.page_size, allocator.length("a"))
    assert {type(number) for number in (*numbers, *allocator.pages("a"))} == {int}


@pytest.mark.parametrize(
    ("num_tokens", "pages"), [(0, ()), (1, (0,)), (16, (0,)), (17, (0, 1)), (48, (0, 1, 2))]
)
def test_allocate(num_tokens, pages):
    allocator = PageAllocator(3, PAGE)
    allocator.allocate("a", num_tokens)
    assert allocator.length("a") == num_tokens
    assert allocator.pages("a") == pages
    assert allocator.num_free_pages == 3 - len(pages)


def test_append_takes_a_page_only_when_the_last_is_full():
    allocator = PageAllocator(3, PAGE)
    allocator.allocate("a", 0)
    used = []
    for _ in range(2 * PAGE):
        allocator.append("a")
        used.append(len(allocator.pages("a")))
    assert used == [1] * PAGE + [2] * PAGE
    allocator.append("a", 0)
    assert (allocator.length("a"), allocator.num_free_pages) == (2 * PAGE, 1)


def test_append_keeps_the_pages_there_are():
    allocator = PageAllocator(4, PAGE)
    allocator.allocate("a", 20)
    allocator.allocate("b", 1)
    allocator.append("a", 13)
    assert allocator.pages("a") == (0, 1, 3)


@pytest.mark.parametrize("key", [7, ("request", 3), frozenset("x"), b"id", ""])
def test_any_hashable_key_but_none(key):
    allocator = PageAllocator(1, PAGE)
    allocator.allocate(key, 1)
    assert allocator.sequences == (key,)
    assert allocator.page_table([key], 1).tolist() == [[0]]


@pytest.mark.parametrize("key", ["a", "b", None])
def test_new_keys_must_be_new(key):
    allocator = two_in_one_page()
    message = f"sequence is {key!r}"
    raises_and_changes_nothing(allocator, ValueError, message, "allocate", key, 1)
    raises_and_changes_nothing(allocator, ValueError, message, "share", key, "b", PAGE)


@pytest.mark.parametrize("key", ["never", "freed", None])
def test_keys_must_be_in_use(key):
    allocator = two_in_one_page()
    allocator.allocate("freed", 1)
    allocator.free("freed")
    for method, *args in (
        ("append", key),
        ("truncate", key, 0),
        ("free", key),
        ("length", key),
        ("pages", key),
    ):
        message = f"sequence is {key!r}"
        raises_and_changes_nothing(allocator, ValueError, message, method, *args)
    message = f"prefix_of is {key!r}"
    raises_and_changes_nothing(allocator, ValueError, message, "share", "new", key, 0)


def test_an_unhashable_key_changes_nothing():
    allocator = two_in_one_page()
    for method, *args in (
        ("allocate", ["c"], 1),
        ("share", ["c"], "b", PAGE),
        ("append", ["b"]),
        ("truncate", ["b"], 0),
        ("free", ["b"]),
        ("page_table", [["b"]], 1),
    ):
        raises_and_changes_nothing(allocator, TypeError, "unhashable", method, *args)


def test_a_freed_key_may_be_used_again():
    allocator = PageAllocator(2, PAGE)
    allocator.allocate("a", 20)
    allocator.free("a")
    assert (allocator.num_free_pages, allocator.sequences) == (2, ())
    allocator.allocate("a", 5)
    assert (allocator.length("a"), allocator.pages("a")) == (5, (0,))


def test_pages_come_back_last_freed_first():
    allocator = PageAllocator(4, PAGE)
    allocator.allocate("a", 2 * PAGE)
    allocator.allocate("b", PAGE)
    allocator.free("a")
    allocator.allocate("c", 3 * PAGE)
    assert allocator.pages("c") == (0, 1, 3)


def test_out_of_pages():
    allocator = PageAllocator(5, PAGE)
    allocator.allocate("a", 3 * PAGE)
    for method, key, num_tokens in (("allocate", "b", 2 * PAGE + 1), ("append", "a", 2 * PAGE + 1)):
        message = "^3 pages needed, 2 of 5 free$"
        raises_and_changes_nothing(allocator, OutOfPages, message, method, key, num_tokens)
    assert issubclass(OutOfPages, RuntimeError)
    allocator.append("a", 2 * PAGE)
    assert allocator.num_free_pages == 0
    allocator.allocate("b", 0)
    raises_and_changes_nothing(allocator, OutOfPages, "^1 pages needed, 0 of 5", "append", "b")


def test_share_takes_no_page_and_the_last_owner_frees():
    allocator = PageAllocator(4, PAGE)
    allocator.allocate("a", 3 * PAGE)
    allocator.share("b", "a", 2 * PAGE)
    assert (allocator.length("b"), allocator.pages("b")) == (2 * PAGE, (0, 1))
    assert allocator.num_free_pages == 1
    allocator.free("a")
    assert allocator.num_free_pages == 2
    allocator.free("b")
    assert allocator.num_free_pages == 4


def test_sharers_grow_apart():
    allocator = PageAllocator(4, PAGE)
    allocator.allocate("a", PAGE)
    allocator.share("b", "a", PAGE)
    allocator.append("a")
    allocator.append("b")
    assert (allocator.pages("a"), allocator.pages("b")) == ((0, 1), (0, 2))


@pytest.mark.parametrize("num_tokens", [1, 15, 17, 20, 32, 48])
def test_share_takes_whole_pages_that_are_there(num_tokens):
    allocator = PageAllocator(4, PAGE)
    allocator.allocate("a", 20)
    message = f"num_tokens is {num_tokens}"
    raises_and_changes_nothing(allocator, ValueError, message, "share", "b", "a", num_tokens)
    allocator.share("b", "a", 0)
    assert allocator.pages("b") == ()
    allocator.share("c", "a", PAGE)
    assert allocator.pages("c") == (0,)


@pytest.mark.parametrize(("num_tokens", "kept"), [(40, 3), (33, 3), (32, 2), (17, 2), (1, 1)])
def test_truncate_releases_whole_pages(num_tokens, kept):
    allocator = PageAllocator(3, PAGE)
    allocator.allocate("a", 40)
    allocator.truncate("a", num_tokens)
    assert (allocator.length("a"), allocator.num_free_pages) == (num_tokens, 3 - kept)
    allocator.append("a", 40 - num_tokens)
    assert allocator.pages("a") == (0, 1, 2)


def test_truncate_to_nothing_keeps_the_key():
    allocator = PageAllocator(3, PAGE)
    allocator.allocate("a", 40)
    allocator.truncate("a", 0)
    assert (allocator.pages("a"), allocator.num_free_pages) == ((), 3)
    message = "num_tokens is 1"
    raises_and_changes_nothing(allocator, ValueError, message, "truncate", "a", 1)


def test_truncate_leaves_shared_pages_to_the_others():
    allocator = PageAllocator(3, PAGE)
    allocator.allocate("a", 2 * PAGE)
    allocator.share("b", "a", 2 * PAGE)
    allocator.truncate("a", 0)
    assert (allocator.pages("b"), allocator.num_free_pages) == ((0, 1), 1)


def test_a_shared_page_is_not_written():
    allocator = two_in_one_page()
    message = (
        "sequence 'a' ends inside page 0, which another one owns too, so num_tokens = 1 cannot be "
        "written; truncate to 0 tokens and append from there"
    )
    raises_and_changes_nothing(allocator, ValueError, message, "append", "a")
    allocator.append("a", 0)
    allocator.append("b")
    assert allocator.pages("b") == (0, 1)


def test_a_shared_page_is_left_as_the_error_says():
    allocator = two_in_one_page()
    allocator.truncate("a", 0)
    allocator.append("a", 11)
    assert (allocator.pages("a"), allocator.pages("b")) == ((1,), (0,))


def test_a_page_whose_other_owners_left_is_written_again():
    allocator = two_in_one_page()
    allocator.free("b")
    allocator.append("a")
    assert (allocator.length("a"), allocator.pages("a")) == (11, (0,))


@pytest.mark.parametrize("free", [[1, 0], [3, 3]])
def test_a_page_is_never_handed_out_twice(free):
    allocator = two_in_one_page()
    allocator._free = free
    message = r"of the free pages \[.*\] one has an owner or is there twice"
    raises_and_changes_nothing(allocator, RuntimeError, message, "allocate", "c", 2 * PAGE)
    raises_and_changes_nothing(allocator, RuntimeError, message, "append", "b", 2 * PAGE)


def test_page_table():
    allocator = PageAllocator(6, PAGE)
    allocator.allocate("a", 40)
    allocator.allocate("b", 0)
    allocator.share("c", "a", PAGE)
    table = allocator.page_table(["c", None, "a", "b"], 4)
    assert table.dtype == np.int32
    assert table.tolist() == [[0, -1, -1, -1], [-1] * 4, [0, 1, 2, -1], [-1] * 4]
    assert allocator.page_table(("a",), 3).tolist() == [[0, 1, 2]]
    assert allocator.page_table([], 3).shape == (0, 3)


def test_page_table_refuses():
    allocator = PageAllocator(6, PAGE)
    allocator.allocate("a", 40)
    for message, sequences, num_columns in (
        ("num_columns is 2; accepted: 3 or more, the pages of 'a'", ["a"], 2),
        (r"sequences\[1\] is 'b'; accepted: a key in use", ["a", "b"], 3),
        ("num_columns is 0; accepted: an integer of 1 or more", [], 0),
    ):
        raises_and_changes_nothing(
            allocator, ValueError, message, "page_table", sequences, num_columns
        )


def test_what_is_returned_is_the_callers():
    allocator = PageAllocator(2, PAGE)
    allocator.allocate("a", 20)
    allocator.page_table(["a"], 2)[:] = 7
    assert allocator.page_table(["a"], 2).tolist() == [[0, 1]]


KEYS = "abcdef"
NEW = st.runner().flatmap(lambda m: st.sampled_from([key for key in KEYS if key not in m.tokens]))
IN_USE = st.runner().flatmap(lambda m: st.sampled_from(list(m.tokens)))
NUM_TOKENS = st.integers(0, 3 * PAGE)

some_new = precondition(lambda m: len(m.tokens) < len(KEYS))
some_in_use = precondition(lambda m: m.tokens)


class AnyInterleaving(RuleBasedStateMachine):
    """The model is what each sequence should read; the cache is written where the allocator says.

    Every token is a number of its own, so a token written over or in the wrong place shows.
    """

    @initialize(num_pages=st.integers(4, 12))
    def start(self, num_pages):
        self.allocator = PageAllocator(num_pages, PAGE)
        self.cache = np.full((num_pages, PAGE), -1)
        self.tokens = {}
        self.num_written = 0

    def attempt(self, error, method, *args):
        """Whether the call succeeded, which it must unless `error` is expected."""
        if error is not None:
            raises_and_changes_nothing(self.allocator, error, None, method, *args)
            return False
        getattr(self.allocator, method)(*args)
        return True

    def out_of_pages(self, old_length, num_tokens):
        new = -(-(old_length + num_tokens) // PAGE) - -(-old_length // PAGE)
        return OutOfPages if new > len(self.cache) - len(self.owners()) else None

    def owners(self):
        return Counter(page for key in self.tokens for page in self.allocator.pages(key))

    def write(self, key, num_tokens):
        pages = self.allocator.pages(key)
        for _ in range(num_tokens):
            page, place = divmod(len(self.tokens[key]), PAGE)
            self.num_written += 1
            self.cache[pages[page], place] = self.num_written
            self.tokens[key].append(self.num_written)

    @some_new
    @rule(key=NEW, num_tokens=NUM_TOKENS)
    def allocate(self, key, num_tokens):
        if self.attempt(self.out_of_pages(0, num_tokens), "allocate", key, num_tokens):
            self.tokens[key] = []
            self.write(key, num_tokens)

    @some_in_use
    @rule(key=IN_USE, num_tokens=NUM_TOKENS)
    def append(self, key, num_tokens):
        length = len(self.tokens[key])
        error = self.out_of_pages(length, num_tokens)
        if num_tokens and length % PAGE and self.owners()[self.allocator.pages(key)[-1]] > 1:
            error = ValueError
        if self.attempt(error, "append", key, num_tokens):
            self.write(key, num_tokens)

    @some_new
    @some_in_use
    @rule(key=NEW, prefix_of=IN_USE, more=st.sampled_from([0, 0, 0, -PAGE, PAGE, 1]))
    def share(self, key, prefix_of, more):
        length = len(self.tokens[prefix_of])
        num_tokens = length - length % PAGE + more
        error = None if num_tokens in range(0, length + 1, PAGE) else ValueError
        if self.attempt(error, "share", key, prefix_of, num_tokens):
            self.tokens[key] = self.tokens[prefix_of][:num_tokens]

    @some_in_use
    @rule(key=IN_USE, num_dropped=st.integers(-1, PAGE))
    def truncate(self, key, num_dropped):
        num_tokens = len(self.tokens[key]) - num_dropped
        error = None if 0 <= num_tokens <= len(self.tokens[key]) else ValueError
        if self.attempt(error, "truncate", key, num_tokens):
            del self.tokens[key][num_tokens:]

    @some_in_use
    @rule(key=IN_USE)
    def free(self, key):
        self.attempt(None, "free", key)
        del self.tokens[key]
        self.attempt(ValueError, "free", key)

    @some_in_use
    @rule(key=IN_USE)
    def start_again(self, key):
        self.attempt(ValueError, "allocate", key, 1)
        self.attempt(ValueError, "share", key, key, 0)

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        assert self.allocator.sequences == tuple(self.tokens)
        table = self.allocator.page_table(tuple(self.tokens), len(self.cache))
        for row, (key, tokens) in zip(table, self.tokens.items(), strict=True):
            assert self.allocator.length(key) == len(tokens)
            assert np.count_nonzero(row >= 0) == -(-len(tokens) // PAGE)
            assert self.cache[row[row >= 0]].ravel()[: len(tokens)].tolist() == tokens

    @invariant()
    def every_page_is_free_or_owned(self):
        owners = self.owners()
        num_pages = len(self.cache)
        assert self.allocator.num_free_pages == num_pages - len(owners)
        assert sorted([*self.allocator._free, *owners]) == list(range(num_pages))
        assert self.allocator._num_owners == [owners[page] for page in range(num_pages)]


TestAnyInterleaving = everyday()(AnyInterleaving.TestCase)
TestAnyInterleaving.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True
)
