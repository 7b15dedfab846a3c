"""What a bench says in the end: a table for the terminal, JSON, and Markdown for a model card."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from starling.base.estimate import LEVEL, Estimate
from starling.base.files import write_atomically
from starling.base.jsonl import write_json

HEADINGS = ("", "mean", f"{LEVEL:.0%} interval", "n", "failed", "duplicates")


class Line(NamedTuple):
    """One figure under its name; `duplicates` are rows beside the counted ones."""

    name: str
    estimate: Estimate
    duplicates: int = 0


def as_table(title: str, lines: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """The lines under each other, and the notes below."""
    rows = aligned([HEADINGS, *map(_cells, lines)])
    return "\n".join([title, "", *rows, *(["", *notes] if notes else [])])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_markdown(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Headings and rows as a Markdown section, the notes as a list."""
    ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in ruled]
    return "\n".join([f"## {title}", "", *table, "", *(f"- {note}" for note in notes)]) + "\n"


def write_results(
    out: Path, scores: Mapping[str, Any], title: str, lines: Sequence[Line], notes: Sequence[str]
) -> None:
    """Write scores.json and results.md into `out`."""
    rows = [HEADINGS, *map(_cells, lines)]
    write_json(out / "scores.json", dict(scores))
    write_atomically(out / "results.md", [as_markdown(title, rows, notes).encode()])


def stamp(bench: str, **fields: Any) -> dict[str, Any]:
    """What a score depends on beside the model: without it two scores cannot be compared."""
    return {"bench": bench, **fields, "starling": version("starling-rlaif")}


def _cells(line: Line) -> tuple[str, ...]:
    estimate = line.estimate
    interval = "unknown"
    if estimate.low is not None and estimate.high is not None:
        interval = f"{estimate.low:.2f} to {estimate.high:.2f}"
    counts = (estimate.n, estimate.num_failed, line.duplicates)
    return (line.name, f"{estimate.mean:.2f}", interval, *(f"{count:,}" for count in counts))
