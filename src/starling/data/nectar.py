"""Nectar's form of a ranking: its one-string prompt, its key of equal prompts, its columns.

Source: the data set card of berkeley-nest/Nectar and the notebooks that made it.  Only what its
columns hold is written: ids, modes and checks are ours and stay behind.
"""

import contextlib
import functools
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from starling.base.errors import InputError
from starling.base.files import write_atomically
from starling.base.jsonl import write_records
from starling.base.seeding import permutation
from starling.data.records import Message, Prompt, RankingRow, split_nectar_prompt
from starling.data.rows import PARQUET, import_pyarrow, iter_rows

ROWS_AT_ONCE = 1000

MARKERS = re.compile(r"\[/?inst\]|\n\n(?:human|assistant):")


def nectar_prompt(messages: Sequence[Message]) -> str:
    r"""The conversation as Nectar's one string, which ends with `\n\nAssistant: `.

    Its format has no system role: a system message opens the first human turn.
    """
    text = system = ""
    for message in messages:
        if message.role == "system":
            system = f"{message.content}\n\n"
        elif message.role == "user":
            text += f"\n\nHuman: {system}{message.content}"
            system = ""
        else:
            text += f"\n\nAssistant: {message.content}"
    return f"{text}\n\nAssistant: "


def published_prompt(row: Prompt | RankingRow) -> str:
    """The row's own prompt string, byte for byte, unless it says something else than messages."""
    text = row.prompt or ""
    with contextlib.suppress(ValueError):
        if split_nectar_prompt(text) == row.messages:
            return text
    return nectar_prompt(row.messages)


def text_key(messages: Sequence[Message]) -> list[list[str]]:
    """Equal for conversations that are the same but for case and spacing."""
    return [[each.role, " ".join(_folded(each.content).split())] for each in messages]


def dedup_key(messages: Sequence[Message]) -> str:
    """Equal for prompts that are the same to Nectar, whatever their case, spacing and signs.

    Its rule: lower case, without [INST] and role markers and all that is not alphanumeric; so
    "2+2" and "2-2" are one.  A prompt of nothing else (only emoji) is its own text.
    """
    text = nectar_prompt(messages)
    return "".join(map(_alphanumeric, MARKERS.sub(" ", _folded(text)))) or text


def normalised_words(text: str) -> list[str]:
    """The words of a text without case and signs; a Chinese or Japanese character is a word."""
    return "".join(map(_word_part, _folded(text))).split()


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


@functools.cache
def _alphanumeric(character: str) -> str:
    # Marks are the vowels of many scripts; variation selectors only choose a drawing.
    is_kept = unicodedata.category(character)[0] in "LMN" and not "\ufe00" <= character <= "\ufe0f"
    return character if is_kept else ""


@functools.cache
def _word_part(character: str) -> str:
    kept = _alphanumeric(character)
    if "\u2e80" <= character < "\ua000":
        return f" {kept} "
    return kept or ("" if character in "'\u2019" else " ")


def write_nectar(path: Path, rows: Iterable[RankingRow]) -> None:
    """Write rankings in the published columns and types: parquet when the path ends so, else JSONL.

    In JSONL an absent column stays out.  Ranks are the row's: tied answers share theirs, an
    unranked one has null.
    """
    columns = map(_columns, rows)
    if path.suffix == PARQUET:
        write_atomically(path, _parquet(columns))
    else:
        write_records(path, columns)


def convert(source: Path, target: Path, *, sample: int | None = None, seed: int = 0) -> int:
    """Write one file's rankings, or a sample, as Nectar's to another; return how many.

    Raises InputError for a sample of none, and for a target of another kind.
    """
    if sample is not None and sample < 1:
        raise InputError(f"a sample of {sample} rankings is none; ask for 1 or more")
    if target.suffix not in (".jsonl", PARQUET):
        raise InputError(f"{target} is written as its name ends: use .jsonl or {PARQUET}")
    quarantine = target.with_name("quarantine.jsonl")
    number = sum(1 for _ in iter_rows(source, RankingRow, quarantine=quarantine))
    chosen = set(permutation(number, seed, "nectar/sample", 0)[:sample])
    rows = enumerate(iter_rows(source, RankingRow, quarantine=quarantine))
    write_nectar(target, (row for index, row in rows if index in chosen))
    return len(chosen)


def _columns(row: RankingRow) -> dict[str, Any]:
    asked = sum(message.role == "user" for message in row.messages)
    return {
        "prompt": published_prompt(row),
        "answers": [{"answer": a.answer, "model": a.model, "rank": a.rank} for a in row.answers],
        "turns": asked if row.turns is None else row.turns,
        "num_responses": len(row.answers) if row.num_responses is None else row.num_responses,
        "source": row.source,
        "good_natured": row.good_natured,
    }


def _parquet(rows: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    pa, parquet = import_pyarrow()
    text, number = pa.string(), pa.int64()
    answer = pa.struct([("answer", text), ("model", text), ("rank", pa.float64())])
    columns = [("prompt", text), ("answers", pa.list_(answer)), ("turns", number)]
    columns += [("num_responses", number), ("source", pa.list_(text)), ("good_natured", pa.bool_())]
    schema = pa.schema(columns)
    sink = io.BytesIO()
    with parquet.ParquetWriter(sink, schema) as writer:
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            # What is written goes on at once, so that memory holds one batch.
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
    yield sink.getvalue()
