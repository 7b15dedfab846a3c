"""Check rankings and their judge: what decides beside the answers, and how much of it is chance.

The same function makes the audit at the end of the stage and that of `starling audit FILE`, from
the same files.  Nectar's authors measured their judge's bias for the first position with chi-square
over the places of the winners (Starling-7B, COLM 2024); the same table is made here of every call.
Calls about one prompt count singly there: their orders are drawn, or spread so that an answer
stands at another place each time, which only makes chi-square smaller.  A place has its label, so
the table by place is also that by label.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from starling.base.jsonl import iter_json
from starling.data.records import RankingRow
from starling.data.rows import iter_rows
from starling.feedback.findings import find
from starling.feedback.tallies import Tallies, check_judgment

JUDGMENTS = "judgments.jsonl"
NORMAL_99 = 2.3263478740408408
SMALLEST_EXPECTED = 5
"""Winners that each place must be expected to have before chi-square means anything."""
MOST_ROWS, WIDTH = 20, 80
"""Of a table in the terminal; audit.json has all."""


def audit_file(path: Path, *, quarantine: Path | None = None) -> dict[str, Any]:
    """Audit a file of rankings, JSONL or parquet, with judgments.jsonl beside it if there is one.

    Bad rows go to `quarantine`, or beside the file.  Raises DataError for files that cannot be
    read, and for one without a ranking.
    """
    beside = path.with_name(JUDGMENTS)
    quarantine = quarantine or path.with_name("quarantine.jsonl")
    rows = iter_rows(path, RankingRow, quarantine=quarantine)
    return audit(rows, iter_json(beside, check_judgment) if beside.is_file() else ())


def audit(
    rows: Iterable[RankingRow], judgments: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The audit as JSON: findings in plain words first, then the tables that they stand on."""
    tallies = Tallies()
    for row in rows:
        tallies.add_ranking(row)
    for line in judgments:
        tallies.add_judgment(line)
    tables = tallies.tree()
    for table in tables.get("positions", {}).values():
        shares = [place["winner_share"] for place in table["places"].values()]
        table["chi_square"] = chi_square([share["mean"] * share["n"] for share in shares])
        table["critical_99"] = critical_99(len(shares) - 1)
        enough = table["verdicts"] >= SMALLEST_EXPECTED * len(shares)
        table["is_biased"] = table["chi_square"] > table["critical_99"] if enough else None
    return {"findings": find(tables), **tables}


def as_text(report: Mapping[str, Any]) -> str:
    """The audit for a terminal of 80 columns: findings, those of concern first, then tables."""
    lines = []
    for finding in sorted(report["findings"], key=lambda each: not each["is_concern"]):
        mark = "!" if finding["is_concern"] else "-"
        lines += wrap(f"{mark} {finding['sentence']}", WIDTH, subsequent_indent="  ")
        if finding["advice"]:
            lines += wrap(f"  -> {finding['advice']}", WIDTH, subsequent_indent="     ")
    for k, table in report.get("positions", {}).items():
        lines += _table(f"place, of {k}", ("winner_share", "mean_rank"), table["places"])
    models = report["models"]
    frequent = {n: models[n] for n in sorted(models, key=lambda n: -models[n]["win_share"]["n"])}
    lines += _table("model", ("mean_rank", "win_share"), frequent)
    natures = ("mean_rank_good_natured", "mean_rank_not_good_natured")
    lines += _table("model", natures, frequent)
    lines += _table("length in its prompt", ("mean_rank", "win_share"), report["length"])
    for kind in ("sources", "categories"):
        lines += _table(kind, ("longer_wins", "good_natured"), report.get(kind, {}))
    return "\n".join(lines)


def chi_square(counts: Sequence[float]) -> float:
    """Pearson's statistic of the counts against all being equally likely."""
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def critical_99(degrees: int) -> float:
    """What chi-square exceeds once in a hundred by chance.

    Wilson and Hilferty's cube root (PNAS 1931): 0.7 % low at one degree, under 0.2 % from three on.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NORMAL_99 * math.sqrt(spread)) ** 3


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Any]) -> Iterator[str]:
    """Rows that have one of the columns, a line each."""
    shown = [(n, [row.get(c) for c in columns]) for n, row in rows.items()]
    shown = [(name, cells) for name, cells in shown if any(cells)]
    if shown:
        yield from ("", f"{title:26}" + "".join(f"{c.replace('_', ' '):>27}" for c in columns))
    for name, cells in shown[:MOST_ROWS]:
        yield f"{name:26.26}" + "".join(f"{_cell(cell):>27}" for cell in cells)
    if len(shown) > MOST_ROWS:
        yield f"and {len(shown) - MOST_ROWS} more"


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "none"
    low, high = ("?" if e is None else f"{e:.2f}" for e in (estimate["low"], estimate["high"]))
    return f"{estimate['mean']:.2f} [{low}, {high}]"
