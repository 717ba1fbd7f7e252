"""Parts that tunings share: a row for each launch, and the chosen one beside the best."""

from bench.benchmark import Row


def launch_rows(point, times, chosen, more=None) -> list[Row]:
    """Rows of one point, a launch each; prints the best launch and the one that is chosen.

    Args:
        point: with its identity fields.
        times: microseconds by launch.
        chosen: the launch of the heuristic.
        more: fields of all rows.
    """
    best = min(times, key=times.get)
    place = " ".join(f"{name}={value}" for name, value in point.fields.items())
    print(
        f"{place}: best {tuple(best)} {times[best]:.2f} us, "
        f"chosen {tuple(chosen)} {times[chosen]:.2f} us",
        flush=True,
    )
    head = point.fields | (more or {})
    return [head | launch._asdict() | {"us": round(us, 3)} for launch, us in times.items()]
