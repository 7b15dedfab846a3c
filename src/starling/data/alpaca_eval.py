"""AlpacaEval's files of outputs: a JSON list, or JSONL, of instruction, output and generator.

Two models' outputs belong together by the instruction's text.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from starling.base.errors import DataError, some, visible
from starling.base.jsonl import iter_records, parse_rows, read_json, readable
from starling.data.records import Message, Record, content_id

SHOWN = 60
"""Characters of an instruction that a message shows."""


class ModelOutput(Record):
    """What one model (`generator`) said to one instruction."""

    instruction: str = Field(pattern=r"\S")
    output: str
    generator: str
    dataset: str | None = None
    instruction_difficulty: float | None = None
    """Of AlpacaEval's model of length; read from the baseline's file."""


class OutputPair(NamedTuple):
    """Both models' outputs to one instruction."""

    baseline: ModelOutput
    answer: ModelOutput

    @property
    def messages(self) -> tuple[Message, ...]:
        """The instruction as a conversation."""
        return (Message(role="user", content=self.baseline.instruction),)

    @property
    def id(self) -> str:
        """A name that the instruction's text gives."""
        return content_id(self.messages)


def read_outputs(path: Path, *, quarantine: Path) -> list[ModelOutput]:
    """One model's outputs.

    Raises DataError for a file that cannot be read or holds several models', and for instructions
    that stand there twice or have an empty output.
    """
    with readable(path), path.open("rb") as file:
        is_list = file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if is_list:
        found = parse_rows(path, _rows(path), ModelOutput, quarantine=quarantine, unit="row")
    else:
        found = iter_records(path, ModelOutput, quarantine=quarantine)
    rows = list(found)
    generators = sorted({row.generator for row in rows})
    if len(generators) > 1:
        raise DataError(f"{path} holds outputs of {some(generators, 4)}; give one model's file")
    counts = Counter(row.instruction for row in rows)
    _refuse(path, "stand there twice", [text for text, count in counts.items() if count > 1])
    empty = [row.instruction for row in rows if not row.output.strip()]
    _refuse(path, "have an empty output", empty)
    return rows


def match_outputs(
    answers: Sequence[ModelOutput], baseline: Sequence[ModelOutput]
) -> list[OutputPair]:
    """Both models' outputs by instruction, in the baseline's order.

    Raises DataError naming the instructions that only one of them has.
    """
    given = {row.instruction: row for row in answers}
    asked = {row.instruction for row in baseline}
    missing, beside = sorted(asked - given.keys()), sorted(given.keys() - asked)
    _refuse(answers[0].generator, "are missing, which the baseline has", missing)
    _refuse(baseline[0].generator, "are missing, which the answers have", beside)
    return [OutputPair(row, given[row.instruction]) for row in baseline]


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """The list's rows as JSON, so that one and the same strict reader judges them."""
    rows: list[Any] = read_json(path)
    for number, row in enumerate(rows, start=1):
        yield number, json.dumps(row, ensure_ascii=False).encode()


def _refuse(where: Path | str, problem: str, instructions: Sequence[str]) -> None:
    if instructions:
        shown = some([repr(visible(text)[:SHOWN]) for text in instructions], 3)
        raise DataError(
            f"{where}: {len(instructions)} instructions {problem}: {shown}. Both files need the "
            "same instructions, each once and answered; repair them, then run this again"
        )
