"""Progress while a checkpoint is loaded, and a report of it afterwards."""

import dataclasses
import sys
from collections.abc import Mapping

_WIDTH = 30


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Tensors of a checkpoint that were loaded or skipped.

    Attributes:
        loaded: number of tensors that are now in the model.
        parameters: number of parameters they make up; fewer, as some tensors are packed together.
        bytes: that the parameters take.
        skipped: numbers of tensors that were not loaded, by what they have in common: the prefix of
            a tower of another modality, the tied head, projections that KV-shared layers do not
            use, buffers and scales that say nothing.
    """

    loaded: int
    parameters: int
    bytes: int
    skipped: Mapping[str, int]


def terminal_bar(done: int, total: int) -> None:
    """Draws a bar of the bytes that are loaded on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        return
    filled = _WIDTH * done // total
    bar = "#" * filled + "." * (_WIDTH - filled)
    end = "\n" if done == total else ""
    print(
        f"\rloading [{bar}] {done / 1e9:.2f} of {total / 1e9:.2f} GB",
        end=end,
        file=sys.stderr,
        flush=True,
    )
