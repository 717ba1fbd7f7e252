"""Measures on a GPU and writes JSON and plots; compares two such files.

    python -m bench list
    python -m bench run NAME ... [--where FIELD=VALUE,... ...] [--out DIR]
    python -m bench tune NAME ... [--where FIELD=VALUE,... ...] [--out DIR]
    python -m bench compare A.json B.json
    python -m bench memory

NAME may be "all". `run` compares variants of an op or of a step, `tune` the launches that an op's
heuristic chooses from. Results are NAME.json and tune_NAME.json in DIR, by default
bench/results/h200.
`list` also prints the committed rows that miss a bar. `compare` has the exit status 1 if something
became slower, `run` and `tune` of several names if one of them failed. `memory` prints which model
fits on which card.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import compare, driver, memory, registry, results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command of these arguments and returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "list":
            return _list()
        if args.command == "compare":
            return compare.compare_files(args.before, args.after)
        if args.command == "memory":
            print(memory.table())
            return 0
        return _measure(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is to run and to tune")
    for name, what in (("run", "variants of ops and steps"), ("tune", "launches of ops")):
        measuring = commands.add_parser(name, help=f"measures {what}")
        measuring.add_argument("names", nargs="+", metavar="NAME", help='see `list`; or "all"')
        measuring.add_argument(
            "--where",
            nargs="+",
            default=[],
            metavar="FIELD=VALUE,...",
            help="measures only rows with one of these values, and keeps the others of the file",
        )
        measuring.add_argument(
            "--out", type=Path, default=results.COMMITTED, metavar="DIR", help="for the results"
        )
    commands.add_parser("memory", help="weights and caches of the models, and what fits on a card")
    comparing = commands.add_parser("compare", help="what became slower or faster")
    comparing.add_argument("before", type=Path, metavar="A.json")
    comparing.add_argument("after", type=Path, metavar="B.json")
    return parser


def _list():
    for title, names, find in (
        ("run", registry.names(), registry.benchmark),
        ("tune", registry.tuning_names(), registry.tuning),
    ):
        print(f"{title}:")
        for name in names:
            benchmark = find(name)
            print(f"  {name:<20} {benchmark.about} ({len(benchmark.points())} points)")
            for variant, what in benchmark.variants.items():
                print(f"  {'':<20}   {variant}: {what}")
            for miss in _committed_misses(benchmark, name if title == "run" else f"tune_{name}"):
                print(f"  {'':<20}   {miss}")
    return 0


def _committed_misses(benchmark, file_name):
    """Lines on committed rows that miss a bar."""
    path = results.COMMITTED / f"{file_name}.json"
    return driver.misses(benchmark, results.read(path)[1]) if path.exists() else []


def _measure(args):
    tunes = args.command == "tune"
    names = args.names
    if names == ["all"]:
        names = registry.tuning_names() if tunes else registry.names()
    benchmarks = [registry.tuning(name) if tunes else registry.benchmark(name) for name in names]
    if len(names) > 1:  # a process each, as one that has ended holds no memory of the GPU
        statuses = [_in_a_process(args, name) for name in names]
        return int(any(statuses))  # negative where a signal ended the process
    where = _conditions(args.where)
    command = shlex.join(["python", "-m", "bench", args.command, *names, *_where_words(args)])
    driver.run(benchmarks[0], args.out, command, where)
    return 0


def _in_a_process(args, name):
    words = [args.command, name, *_where_words(args), "--out", str(args.out)]
    command = [sys.executable, "-m", "bench", *words]
    print(shlex.join(command), flush=True)
    return subprocess.run(command).returncode


def _where_words(args):
    return ["--where", *args.where] if args.where else []


def _conditions(texts):
    where = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals:
            raise ValueError(f"--where is {text}; accepted: FIELD=VALUE, or FIELD=VALUE,VALUE")
        where[name] = values.split(",")
    return where


if __name__ == "__main__":
    sys.exit(main())
