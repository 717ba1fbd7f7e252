"""A bar on a terminal that says how far a command is."""

import sys

_WIDTH = 30
_ERASE = "\r\033[K"


class Progress:
    """Draws how many of all steps are done on standard error, if that is a terminal.

    The bar is the last line of the terminal: `clear` takes it away before a line is printed.
    """

    def __init__(self, name: str, total: int):
        """Draws nothing yet.

        Args:
            name: what is done, before the bar.
            total: the number of steps.
        """
        self._name, self._total = name, total
        self._is_shown = sys.stderr.isatty()

    def draw(self, done: int) -> None:
        """Draws the bar for `done` steps of all."""
        filled = _WIDTH * done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        self._write(f"{_ERASE}{self._name} [{bar}] {done} of {self._total}")

    def clear(self) -> None:
        """Takes the bar away."""
        self._write(_ERASE)

    def _write(self, text):
        if self._is_shown:
            print(text, end="", file=sys.stderr, flush=True)
