"""A benchmark as data: its points, variants, fields and bars; no measuring happens here."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Point(NamedTuple):
    """One place where a benchmark measures.

    Attributes:
        fields: the identity fields of its rows, with their values.
        subject: what the benchmark measures there, an op's case for example.
    """

    fields: Row
    subject: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """Aim for a measured value, and its reason; rows that miss it are printed, nothing fails.

    The value is the field `of`, divided by the field `over` where there is one. Fields of nested
    objects are separated by dots.

    Attributes:
        of: field of the row.
        over: field that it is divided by.
        beside: identity fields in which the row that `over` is taken from differs from this one.
            Where there is no such row the bar does not apply.
        where: rows that the bar is for: a value or a container of values for each field named.
        least: smallest value accepted.
        most: largest value accepted.
        why: the reason, for a reader who knows nothing else of the project.
    """

    of: str
    over: str | None = None
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    least: float | None = None
    most: float | None = None
    why: str

    def __post_init__(self):
        if (self.least is None) == (self.most is None):
            raise ValueError(f"bar on {self.of}: give either least or most")

    def named_fields(self) -> set[str]:
        """Fields of a row that the bar reads, without what nested objects hold."""
        names = {self.of, *self.beside, *self.where} | ({self.over} - {None})
        return {name.split(".")[0] for name in names}

    def missed(self, row: Row, rows: Sequence[Row], identity: Sequence[str]) -> str | None:
        """A line on how a row misses the bar, or None: it is reached or does not apply.

        Args:
            row: one of a benchmark's rows.
            rows: all of them.
            identity: the benchmark's identity fields.
        """
        if not matches(row, self.where):
            return None
        value = field(row, self.of)
        other = row
        if self.beside:
            wanted = {name: row[name] for name in identity} | dict(self.beside)
            other = next((r for r in rows if matches(r, wanted)), None)
        if value is None or other is None:
            return None
        name = self.of
        if self.over is not None:
            divisor = field(other, self.over)
            if divisor is None:
                return None
            value, name = value / divisor, f"{name} / {self._divisor_name()}"
        if self.least is not None and value < self.least:
            return f"{name} is {value:.3f}, at least {self.least} is asked for"
        if self.most is not None and value > self.most:
            return f"{name} is {value:.3f}, at most {self.most} is asked for"
        return None

    def _divisor_name(self):
        beside = ", ".join(f"{name}={value}" for name, value in self.beside.items())
        return f"{self.over} ({beside})" if beside else self.over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark or a tuning.

    Attributes:
        name: on the command line, and of the files of its results.
        about: one line.
        variants: what is compared: a description for each prefix of fields, or for each value of
            the field "variant".
        identity: fields that say which point a row is of.
        fields: the other fields of a row, all measured or derived.
        points: makes the points; needs no GPU.
        measure: yields rows of the points it is given, with the memory rate of this run in GB/s
            (None without `rate`).
        watched: the fields that `compare` judges; smaller is better. A field's spread is the
            field that holds both of its ends, a pair of fields, or None.
        rate: "copy_gbps" or "read_gbps", the memory rate that limits are computed from.
        bars: aims for the fields.
        head: makes what else the head of the results says; needs a GPU.
        plot: draws (rows, head, path).
        memory_fraction: share of the GPU's memory that JAX reserves.
    """

    name: str
    about: str
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identity: tuple[str, ...]
    fields: tuple[str, ...]
    points: Callable[[], list[Point]]
    measure: Callable[[list[Point], float | None], Iterator[Row]]
    watched: Mapping[str, str | tuple[str, str] | None]
    rate: str | None = None
    bars: tuple[Bar, ...] = ()
    head: Callable[[], Row] = dict
    plot: Callable[[list[Row], Row, Any], None] | None = None
    memory_fraction: float | None = None

    def missed_bars(self, rows: Sequence[Row]) -> list[tuple[Row, Bar, str]]:
        """Rows that miss a bar, the bar, and how."""
        found = []
        for row in rows:
            for bar in self.bars:
                how = bar.missed(row, rows, self.identity)
                if how is not None:
                    found.append((row, bar, how))
        return found


def field(row: Row, name: str) -> Any:
    """A field of a row, or of an object in it: "verify.ms"; None where there is none."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def matches(row: Row, where: Mapping[str, Any]) -> bool:
    """Whether each field named has the value, or one of the values, that `where` gives."""
    return all(name in row and _accepts(wanted, row[name]) for name, wanted in where.items())


def select(points: Iterable[Point], where: Mapping[str, Sequence[str]]) -> list[Point]:
    """Points whose fields, as text, are among those given on the command line.

    Raises:
        ValueError: no point has such fields.
    """
    points = list(points)
    for name, texts in where.items():
        known = {str(point.fields[name]) for point in points if name in point.fields}
        unknown = [text for text in texts if text not in known]
        if unknown:
            accepted = ", ".join(sorted(known)) if known else "no value, as no point has the field"
            raise ValueError(f"{name} is {', '.join(unknown)}; accepted: {accepted}")
    chosen = [
        point
        for point in points
        if all(str(point.fields[name]) in texts for name, texts in where.items())
    ]
    if not chosen:
        raise ValueError(f"no point has {dict(where)}")
    return chosen


def _accepts(wanted, value):
    is_container = isinstance(wanted, Container) and not isinstance(wanted, str)
    return value in wanted if is_container else value == wanted
