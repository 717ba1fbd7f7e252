"""Run of a benchmark, for `python -m bench run`: select, measure, write, judge, draw."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import results
from bench.benchmark import Benchmark, Point, Row, field, matches, select


def run(
    benchmark: Benchmark, folder: Path, command: str, where: Mapping[str, Sequence[str]]
) -> None:
    """Measures a benchmark, prints rows and missed bars, writes NAME.json and NAME.png.

    Rows of a file that is there already stay if they are not measured now and are of this machine.
    If all points are measured none stays, and those that are of no point are counted in print.

    Args:
        benchmark: of the registry.
        folder: of the results; made if there is none.
        command: recorded in the head.
        where: values of identity fields, as text; points that have others are left out.

    Raises:
        ValueError: no point is left, or the rows that would stay are of another machine or of no
            point of the benchmark.
    """
    points = benchmark.points()
    chosen = select(points, where)
    if benchmark.memory_fraction is not None:  # read when JAX starts
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(benchmark.memory_fraction))
    from bench import measure

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark.name}.json"
    head = results.machine()
    kept = _kept(path, chosen, points, head)
    head |= {"benchmark": benchmark.name, "command": command, **benchmark.head()}
    rate = None if benchmark.rate is None else measure.RATES[benchmark.rate]()
    rows: list[Row] = []
    for row in benchmark.measure(chosen, rate):
        # Rows that stay are of an earlier run, so every row has the rate of its own.
        rows.append(row if rate is None else row | {benchmark.rate: round(rate, 1)})
        results.write(path, head, _in_order([*kept, *rows], points))  # so far
        print(described(benchmark, rows[-1]), flush=True)
    rows = _in_order([*kept, *rows], points)
    judge(benchmark, rows)
    if benchmark.plot is not None and len(rows) == len(points):
        benchmark.plot(rows, head, path.with_suffix(".png"))


def judge(benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """Prints the rows that miss a bar, how, and why the bar is there."""
    for miss in misses(benchmark, rows):
        print(miss)
    num_rows = len({id(row) for row, _, _ in benchmark.missed_bars(rows)})
    print(f"{benchmark.name}: {len(rows)} rows, {num_rows} miss a bar")


def misses(benchmark: Benchmark, rows: Sequence[Row]) -> list[str]:
    """A line for each row and bar that it misses."""
    return [
        f"bar missed, {identified(benchmark, row)}: {how} ({bar.why})"
        for row, bar, how in benchmark.missed_bars(rows)
    ]


def identified(benchmark: Benchmark, row: Row) -> str:
    """The identity of a row in words."""
    return " ".join(f"{name}={row[name]}" for name in benchmark.identity if name in row)


def described(benchmark: Benchmark, row: Row) -> str:
    """The identity and the numbers of a row."""
    numbers = (
        f"{name} {row[name]:g}"
        for name in benchmark.fields
        if isinstance(field(row, name), int | float)
    )
    return f"{identified(benchmark, row)}: {', '.join(numbers)}"


def _kept(path, chosen, points, head):
    """Rows of points that are not measured now, of an earlier file of the same machine."""
    if not path.exists():
        return []
    old, rows = results.read(path)
    left = [point for point in points if point not in chosen]
    unknown = [row for row in rows if not any(matches(row, point.fields) for point in points)]
    if unknown and left:
        raise ValueError(
            f"{path} has {len(unknown)} rows of no point of the benchmark, which would be lost; "
            "accepted: all points (no --where), or another folder (--out)"
        )
    if unknown:
        print(f"{path}: {len(unknown)} rows of no point of the benchmark are dropped")
    kept = [row for row in rows if any(matches(row, point.fields) for point in left)]
    different = [name for name, value in head.items() if old.get(name) != value]
    if kept and different:
        raise ValueError(
            f"{path} has {len(kept)} rows of another {', '.join(different)}; accepted: all points, "
            "or another folder"
        )
    return kept


def _in_order(rows, points: Sequence[Point]):
    """Rows by the order of their points; those of one point as they come."""

    def place(row):
        return next(i for i, point in enumerate(points) if matches(row, point.fields))

    return sorted(rows, key=place)
