"""Plots that several benchmarks draw."""

from typing import Any

from bench.benchmark import Row


def times_against_tokens(
    axis: Any, title: str, rows: list[Row], lines: dict[str, tuple[str, str, str]]
) -> None:
    """Time against tokens, and the memory limit.

    Args:
        axis: of matplotlib.
        title: of the panel.
        rows: of one shape.
        lines: (label, color, marker) by the prefix of a field; one that a row lacks is left out.
    """
    tokens = [row["tokens"] for row in rows]
    for name, (label, color, marker) in lines.items():
        times = [row[f"{name}_us"] for row in rows]
        if None not in times:
            axis.loglog(tokens, times, color=color, marker=marker, ms=4, label=label)
    axis.loglog(tokens, [row["limit_us"] for row in rows], "k--", lw=1, label="memory limit")
    axis.set(title=title, ylim=(0.8, None), xlabel="tokens", ylabel="kernel time, us")
    axis.set_xticks(tokens, [str(t) for t in tokens])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)


def panels(rows: list[Row], identity: tuple[str, ...]) -> list[tuple[str, list[Row]]]:
    """Rows of one shape together, with its name; the identity fields other than tokens say it."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(_shape(row, identity), []).append(row)
    return list(grouped.items())


def _shape(row, identity):
    heads = "/".join(str(row[name]) for name in ("num_q_heads", "num_kv_heads", "head_dim"))
    words = [row["mode"], heads, *([row["form"]] if "form" in identity else [])]
    return " ".join(words[:2] if row["mode"] == "Q_ONLY" else words)
