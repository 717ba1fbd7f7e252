"""What happened while a checkpoint was loaded: a bar meanwhile, a report after."""

import dataclasses
import sys
from collections.abc import Mapping

_WIDTH = 30


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a checkpoint.

    Attributes:
        loaded: tensors that are now in the model.
        parameters: parameters they make up; fewer, as some are packed together.
        bytes: that the parameters take.
        skipped: how many tensors were passed over, by what they have in common: the prefix of a
            tower of another modality, the tied head, what KV-shared layers do not use, buffers and
            scales that say nothing.
    """

    loaded: int
    parameters: int
    bytes: int
    skipped: Mapping[str, int]


def terminal_bar(done: int, total: int) -> None:
    """Draws how many of all bytes are loaded on standard error, if that is a terminal."""
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
