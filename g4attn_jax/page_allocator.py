"""Allocation of the pages of a paged KV cache to sequences."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from g4attn_jax.checks import check_integer


def check_page_size(page_size: int) -> None:
    """Refuses a page size that no kernel reads in whole tiles.

    Raises:
        ValueError: saying what is accepted.
    """
    if page_size not in range(16, 257, 16):
        raise ValueError(f"page_size is {page_size}; accepted: a multiple of 16 from 16 to 256")


class OutOfPages(RuntimeError):
    """Fewer pages are free than a sequence needs."""


class PageAllocator:
    """Hands out the pages of a cache [num_pages, page_size, Nkv, D]; the cache is the caller's.

    Token t of a sequence lies in place t % page_size of page `pages(sequence)[t // page_size]`.
    A sequence is named by a key of the caller's choice: anything hashable but None. Sequences may
    share pages: one with several owners is never written, and is free when the last one leaves.
    A call that raises changes nothing.

    Args:
        num_pages: pages of the cache, at least 1.
        page_size: tokens of a page; a multiple of 16 from 16 to 256.

    Raises:
        ValueError: an argument is something else; from the methods too, a key not in use included.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = check_integer("num_pages", num_pages)
        self.page_size = check_integer("page_size", page_size, least=16)
        check_page_size(self.page_size)
        # A stack: taking and releasing a page cost the same however many pages there are.
        self._free = list(reversed(range(self.num_pages)))
        self._num_owners = [0] * self.num_pages
        self._pages: dict[Hashable, list[int]] = {}
        self._lengths: dict[Hashable, int] = {}

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no sequence owns."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The keys in use, oldest first."""
        return tuple(self._pages)

    def length(self, sequence: Hashable) -> int:
        """Number of tokens of a sequence."""
        self._find("sequence", sequence)
        return self._lengths[sequence]

    def pages(self, sequence: Hashable) -> tuple[int, ...]:
        """The pages of a sequence, in the order of its tokens."""
        return tuple(self._find("sequence", sequence))

    def allocate(self, sequence: Hashable, num_tokens: int) -> None:
        """Starts a sequence, under a key not in use, with pages for `num_tokens` (0 or more).

        Raises:
            OutOfPages: too few pages are free.
        """
        self._check_new(sequence)
        num_tokens = check_integer("num_tokens", num_tokens, least=0)
        self._pages[sequence] = self._take(self._pages_for(num_tokens))
        self._lengths[sequence] = num_tokens

    def append(self, sequence: Hashable, num_tokens: int = 1) -> None:
        """Makes room for `num_tokens` (0 or more) further tokens.

        Raises:
            OutOfPages: too few pages are free.
            ValueError: the tokens would go into a page that another sequence owns too, because
                `truncate` ended this one inside it.
        """
        pages = self._find("sequence", sequence)
        num_tokens = check_integer("num_tokens", num_tokens, least=0)
        length = self._lengths[sequence]
        filled = length % self.page_size
        if num_tokens and filled and self._num_owners[pages[-1]] > 1:
            raise ValueError(
                f"sequence {sequence!r} ends inside page {pages[-1]}, which another one owns too, "
                f"so num_tokens = {num_tokens} cannot be written; truncate to {length - filled} "
                "tokens and append from there"
            )
        pages += self._take(self._pages_for(length + num_tokens) - len(pages))
        self._lengths[sequence] = length + num_tokens

    def share(self, sequence: Hashable, prefix_of: Hashable, num_tokens: int) -> None:
        """Starts a sequence whose first tokens are another's, in the same pages.

        Args:
            sequence: key of the new sequence, not in use.
            prefix_of: key of the one to share with.
            num_tokens: a multiple of page_size, at most the length of `prefix_of`.
        """
        self._check_new(sequence)
        pages = self._find("prefix_of", prefix_of)
        num_tokens = check_integer("num_tokens", num_tokens, least=0)
        length = self._lengths[prefix_of]
        if num_tokens > length or num_tokens % self.page_size:
            raise ValueError(
                f"num_tokens is {num_tokens}; accepted: multiples of page_size = {self.page_size} "
                f"up to {length}, the length of {prefix_of!r}"
            )
        shared = pages[: self._pages_for(num_tokens)]
        for page in shared:
            self._num_owners[page] += 1
        self._pages[sequence], self._lengths[sequence] = shared, num_tokens

    def truncate(self, sequence: Hashable, num_tokens: int) -> None:
        """Forgets all but the first `num_tokens` (0 to the length); releases pages left empty."""
        pages = self._find("sequence", sequence)
        num_tokens = check_integer("num_tokens", num_tokens, least=0)
        if num_tokens > self._lengths[sequence]:
            raise ValueError(
                f"num_tokens is {num_tokens}; accepted: 0 to {self._lengths[sequence]}, the length "
                f"of {sequence!r}"
            )
        while len(pages) > self._pages_for(num_tokens):
            page = pages.pop()
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                self._free.append(page)
        self._lengths[sequence] = num_tokens

    def free(self, sequence: Hashable) -> None:
        """Ends a sequence and releases its pages."""
        self.truncate(sequence, 0)
        del self._pages[sequence], self._lengths[sequence]

    def page_table(self, sequences: Sequence[Hashable | None], num_columns: int) -> np.ndarray:
        """The pages of a batch: int32 [B, num_columns], -1 where a sequence has no page.

        Args:
            sequences: B keys; None is an empty place of the batch.
            num_columns: at least 1, and at least the number of pages of every sequence.
        """
        num_columns = check_integer("num_columns", num_columns)
        keys = [sequence for sequence in sequences if sequence is not None]
        if isinstance(sequences, str) or len(set(keys)) < len(keys):
            raise ValueError(
                f"sequences is {sequences!r}; accepted: a list of keys, each of them once, or None"
            )
        table = np.full((len(sequences), num_columns), -1, np.int32)
        for row, sequence in enumerate(sequences):
            pages = [] if sequence is None else self._find(f"sequences[{row}]", sequence)
            if len(pages) > num_columns:
                raise ValueError(
                    f"num_columns is {num_columns}; accepted: {len(pages)} or more, the pages of "
                    f"{sequence!r}"
                )
            table[row, : len(pages)] = pages
        return table

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPages(f"{count} pages needed, {len(self._free)} of {self.num_pages} free")
        first = len(self._free) - count
        pages = self._free[first:][::-1]
        # Only a bug in this class leads here; stopping beats two sequences writing one page.
        if len(set(pages)) < count or any(self._num_owners[page] for page in pages):
            raise RuntimeError(f"of the free pages {pages} one has an owner or is there twice")
        del self._free[first:]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def _find(self, argument: str, sequence: Any) -> list[int]:
        if sequence not in self._pages:
            raise ValueError(f"{argument} is {sequence!r}; accepted: a key in use, not yet freed")
        return self._pages[sequence]

    def _check_new(self, sequence: Any) -> None:
        if sequence is None or sequence in self._pages:
            raise ValueError(f"sequence is {sequence!r}; accepted: a key not in use, and not None")
