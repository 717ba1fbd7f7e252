"""The one exception of this package."""

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint cannot be read into a model, or a model not saved; names the tensor or file."""


def listed(names: Iterable[str], most: int = 8) -> str:
    """`a, b, c` in alphabetical order; of long lists the beginning and how many follow."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
