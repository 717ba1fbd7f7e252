"""Lines that the whole suite reaches and the tests of every day do not.

python -m tests.coverage_of_everyday EVERYDAY.json WHOLE.json      reports of `coverage json`
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path


def missed(everyday: dict, whole: dict) -> Iterator[tuple[str, list[int]]]:
    """Files, each with the lines that are in `whole` alone."""
    for name, file in sorted(whole["files"].items()):
        reached = everyday["files"].get(name, {}).get("executed_lines", ())
        lines = sorted(set(file["executed_lines"]) - set(reached))
        if lines:
            yield name, lines


def ranges(lines: list[int]) -> str:
    """Lines as first-last, consecutive ones together."""
    runs = [
        [line for _, line in run]
        for _, run in groupby(enumerate(lines), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def main(everyday_path: str, whole_path: str) -> None:
    everyday, whole = (json.loads(Path(path).read_text()) for path in (everyday_path, whole_path))
    count = 0
    for name, lines in missed(everyday, whole):
        print(f"{name}: {ranges(lines)}")
        count += len(lines)
    total = sum(len(file["executed_lines"]) for file in whole["files"].values())
    print(f"{count} of {total} lines that the whole suite reaches")


if __name__ == "__main__":
    main(*sys.argv[1:])
