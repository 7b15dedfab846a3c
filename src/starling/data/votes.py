"""Votes on battles between two models, in the columns and words that people publish them in.

    left, right, winner         left | right | tie
    model_a, model_b, winner    model_a | model_b | tie | tie (bothbad)      Chatbot Arena
                                leftvote | rightvote | tievote | bothbad_vote: its log's words

The file is CSV with a header when its name says so, JSONL otherwise.  Other columns are ignored.
"""

import csv
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import AliasChoices, Field, StringConstraints, model_validator

from starling.base.battles import Battles
from starling.base.errors import DataError
from starling.base.jsonl import iter_records, parse_rows, readable
from starling.data.records import Id, Record

WON = {
    **dict.fromkeys(("left", "model_a", "leftvote"), 1.0),
    **dict.fromkeys(("right", "model_b", "rightvote"), 0.0),
    **dict.fromkeys(("tie", "tie (bothbad)", "tievote", "bothbad_vote"), 0.5),
}
"""What the left model gets; both answers bad is a tie as well."""

COLUMNS = ("left", "right", "model_a", "model_b", "winner")

MOST_CELL_CHARS = 1 << 24
"""Files with the conversations in them have cells beyond what the csv module allows by itself."""

Model = Annotated[Id, StringConstraints(strip_whitespace=True, pattern=r"\S")]


class Vote(Record):
    """One battle and who won it."""

    left: Model = Field(validation_alias=AliasChoices("left", "model_a"))
    right: Model = Field(validation_alias=AliasChoices("right", "model_b"))
    winner: Literal[
        "left", "right", "tie", "model_a", "model_b", "tie (bothbad)",
        "leftvote", "rightvote", "tievote", "bothbad_vote",
    ]  # fmt: skip
    cells_beyond_the_header: None = None

    @model_validator(mode="after")
    def _check(self) -> "Vote":
        if self.left == self.right:
            raise ValueError(f"{self.left} is on both sides")
        return self


class Votes(NamedTuple):
    """The models by name, and their battles in the file's order."""

    models: tuple[str, ...]
    battles: Battles


def read_votes(path: Path, *, quarantine: Path) -> Votes:
    """All votes of a file; bad rows are put aside as by `base.jsonl.parse_rows`.

    Raises DataError for what is no CSV, and for too many bad rows.
    """
    if path.suffix.lower() == ".csv":
        rows = parse_rows(path, _csv_rows(path), Vote, quarantine=quarantine, unit="line")
    else:
        rows = iter_records(path, Vote, quarantine=quarantine)
    number_of: dict[str, int] = {}
    numbers = (
        (
            number_of.setdefault(vote.left, len(number_of)),
            number_of.setdefault(vote.right, len(number_of)),
            WON[vote.winner],
        )
        for vote in rows
    )
    # Row by row: a million records at once would take a gigabyte.
    table = np.fromiter(numbers, dtype=[("left", int), ("right", int), ("won", float)])
    battles = Battles(table["left"], table["right"], table["won"], len(number_of))
    return Votes(tuple(number_of), battles)


def _csv_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """The rows as JSON, each with the number of its first line, so that one reader judges all."""
    csv.field_size_limit(MOST_CELL_CHARS)
    with (
        readable(path),
        # What is not UTF-8 comes out as it went in, and is refused with its row.
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next((row for row in reader if row), [])]
            columns = [(place, name) for place, name in enumerate(header) if name in COLUMNS]
            if len({name for _, name in columns}) < len(columns):
                raise DataError(f"{path} has a column twice: {', '.join(header)}. Rename one.")
            last = reader.line_num
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    given = tuple((name, row[place]) for place, name in columns if place < len(row))
                    yield last + 1, _as_json(given, max(0, len(row) - len(header)))
                last = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: broken CSV: {error}. Repair that line: what "
                "follows it cannot be told apart."
            ) from error


@lru_cache(maxsize=1 << 16)
def _as_json(given: tuple[tuple[str, str], ...], to_spare: int) -> bytes:
    """The row as JSON; cells beyond the header's are said, for `Vote` to refuse."""
    row = {**dict(given), **({"cells_beyond_the_header": to_spare} if to_spare else {})}
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogateescape")
