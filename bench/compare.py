"""Comparison of two files of results of one benchmark: what became slower or faster.

Rows are matched by the benchmark's identity fields. A time has changed if the spreads of the two
runs do not overlap (10th to 90th percentile of a kernel, shortest to longest repeat of a step), or,
where a run has none, if it differs by more than `TOLERANCE`. A count of launches has changed if it
differs.
"""

from pathlib import Path
from typing import Any, NamedTuple

from bench import registry, results
from bench.benchmark import Benchmark, Row, field
from bench.driver import identified

# Medians of one kernel differ by up to this share between runs and machines of one kind.
TOLERANCE = 0.03


class Change(NamedTuple):
    """A watched field of a row that became slower or faster."""

    row: str
    field: str
    before: float
    after: float

    @property
    def is_slower(self) -> bool:
        """Whether the value grew."""
        return self.after > self.before

    def __str__(self):
        word = "slower" if self.is_slower else "faster"
        ratio = self.after / self.before if self.before else float("inf")
        return f"{word}  {self.row}: {self.field} {self.before:g} -> {self.after:g} (x {ratio:.3f})"


def compare_files(before: Path, after: Path) -> int:
    """Prints the changes from one file to the other.

    Returns:
        1 if something became slower, or else 0.

    Raises:
        ValueError: the files are of different benchmarks, or no row is in both.
    """
    (old_head, old), (new_head, new) = results.read(before), results.read(after)
    names = [_name(path, head) for path, head in ((before, old_head), (after, new_head))]
    if names[0] != names[1]:
        raise ValueError(f"{before} is of {names[0]}, {after} of {names[1]}; accepted: one name")
    benchmark = registry.benchmark(names[0])
    for name in ("gpu", "driver", "jax"):
        if old_head.get(name) != new_head.get(name):
            print(f"another {name}: {old_head.get(name)} -> {new_head.get(name)}")
    pairs = matched(benchmark, old, new)
    if not pairs:
        raise ValueError(f"no row of {before} is in {after}")
    found = [change for pair in pairs for change in changes(benchmark, *pair)]
    for change in found:
        print(change)
    num_slower = sum(change.is_slower for change in found)
    print(
        f"{names[0]}: {len(pairs)} rows in both, {len(old) - len(pairs)} only in {before}, "
        f"{len(new) - len(pairs)} only in {after}; {num_slower} times slower, "
        f"{len(found) - num_slower} times faster"
    )
    return int(num_slower > 0)


def matched(benchmark: Benchmark, old: list[Row], new: list[Row]) -> list[tuple[Row, Row]]:
    """Pairs of rows of one identity, in the order of the new ones."""

    def identity(row):
        missing = [name for name in benchmark.identity if name not in row]
        if missing:
            raise ValueError(
                f"a row has no {', '.join(missing)}; rows of {benchmark.name} have "
                f"{', '.join(benchmark.identity)}"
            )
        return tuple(row[name] for name in benchmark.identity)

    by_identity = {identity(row): row for row in old}
    return [(by_identity[identity(row)], row) for row in new if identity(row) in by_identity]


def changes(benchmark: Benchmark, old: Row, new: Row) -> list[Change]:
    """The watched fields of one row that became slower or faster than the spread."""
    found = []
    for name, spread in benchmark.watched.items():
        before, after = field(old, name), field(new, name)
        if before is None or after is None:
            continue
        if name.endswith("launches"):
            has_changed = before != after
        else:
            has_changed = _differs(before, after, _ends(old, spread), _ends(new, spread))
        if has_changed:
            found.append(Change(identified(benchmark, new), name, before, after))
    return found


def _differs(before, after, old_ends, new_ends):
    if old_ends is None or new_ends is None:
        return max(before, after) > (1 + TOLERANCE) * min(before, after)
    return new_ends[0] > old_ends[1] or new_ends[1] < old_ends[0]


def _ends(row: Row, spread: Any) -> list[float] | None:
    """Both ends of a time's spread, or None where a row does not have them."""
    if spread is None:
        return None
    values = [field(row, name) for name in spread] if isinstance(spread, tuple) else row.get(spread)
    return None if values is None or None in values else values


def _name(path, head):
    """The benchmark of a file: files measured before heads said it are called after it."""
    return head.get("benchmark", path.stem)
