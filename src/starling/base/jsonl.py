"""Read and write records on disk: JSONL, UTF-8, one object a line; and single JSON files.

Reading is strict. A row that is not one JSON object with distinct keys, finite numbers and the
record's fields is put aside in a quarantine file with its number and the reason; a file with more
than a few such rows is refused. Writing replaces the whole file at once.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from starling.base.errors import DataError
from starling.base.files import neighbours, write_atomically

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

ALLOWED_SHARE = 0.01
"""How many of a file's rows may be bad."""


def read_records(path: Path, record: type[M], *, quarantine: Path) -> list[M]:
    """Read every row of a JSONL file as a `record`; as `iter_records`, all at once."""
    return list(iter_records(path, record, quarantine=quarantine))


def iter_records(path: Path, record: type[M], *, quarantine: Path) -> Iterator[M]:
    """Read a JSONL file row by row as `record`s; blank lines are ignored.

    What happens to bad rows is `parse_rows`'s to say.  Raises DataError when the file cannot be
    read.
    """
    return parse_rows(path, _lines(path), record, quarantine=quarantine, unit="line")


def parse_rows(
    path: Path, rows: Iterable[tuple[int, bytes]], record: type[M], *, quarantine: Path, unit: str
) -> Iterator[M]:
    """Parse the numbered JSON objects of the file `path`; `unit` is what the numbers count.

    Bad rows go to the file `quarantine`, in place of what it held for a file of this name, and are
    left out with a warning. Raises DataError when there are no rows, and when more than
    ALLOWED_SHARE of them are bad. All of that comes after the last row: memory stays flat, and
    who stops earlier must not trust what was read.
    """
    total = 0
    bad: list[dict[str, Any]] = []
    for number, content in rows:
        total += 1
        try:
            parsed = _parse_record(content, record)
        except ValueError as error:
            text = content.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            bad.append({unit: number, "reason": _reason(error), "text": text})
        else:
            yield parsed
    if total == 0:
        raise DataError(f"{path} holds no rows. It needs one JSON object a {unit}.")
    _update_quarantine(quarantine, path.name, bad)
    if len(bad) > ALLOWED_SHARE * total:
        reasons = "".join(f"\n  {unit} {row[unit]}: {row['reason']}" for row in bad[:3])
        more = f"\n  and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{len(bad)} of {total} rows of {path} are bad; at most {ALLOWED_SHARE} of the rows "
            f"may be.{reasons}{more}\nRepair or remove those {unit}s. All of them stand in "
            f"{quarantine}."
        )
    if bad:
        logger.warning(
            f"{len(bad)} of {total} rows of {path} are bad and were left out; "
            f"they stand in {quarantine}"
        )


def write_records(path: Path, records: Iterable[BaseModel | Mapping[str, Any]]) -> None:
    """Replace `path` by the records, one a line, fields in order, those that are None left out.

    Of a mapping only its own None values are left out, not those further in. Raises DataError when
    the disk refuses and ValueError for NaN or infinity; the old file then stays.
    """
    write_atomically(path, (dump_line(record) for record in records))


def read_json(path: Path) -> Any:
    """Read one JSON file, as strictly as a row. Raises DataError that says what is wrong."""
    with readable(path):
        content = path.read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {_reason(error)}. Restore it, or delete it to have it made again."
        ) from error


def iter_json(path: Path, check: Callable[[Any], object] | None = None) -> Iterator[Any]:
    """Every line of a file that a stage wrote. Raises DataError that names a line that is bad.

    So is one for which `check` raises ValueError.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = parse_json(line)
                if check is not None:
                    check(value)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: {_reason(error)}. Run the stage again to have it made "
                    "anew."
                ) from error
            yield value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the value as indented JSON. Raises like `write_records`."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(path, [text.encode(), b"\n"])


def parse_json(content: bytes) -> Any:
    """Parse strict JSON: UTF-8, distinct keys, finite numbers, no lone surrogates."""
    text = content.decode("utf-8-sig")
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\u" in text:
        # json lets an escaped lone surrogate through; no UTF-8 file could hold it again.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _parse_record(content: bytes, record: type[M]) -> M:
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    # From the text, not from `value`: in strict models a JSON list may fill a tuple.
    return record.model_validate_json(content.removeprefix(b"\xef\xbb\xbf"))


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} stands twice")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _reason(error: ValueError) -> str:
    match error:
        case ValidationError():
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            return "; ".join(
                ".".join(str(part) for part in problem["loc"]) + f": {problem['msg']}"
                for problem in problems
            ).removeprefix(": ")
        case json.JSONDecodeError():
            return f"broken JSON: {error.msg} at character {error.pos + 1}"
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {error.start + 1}"
        case UnicodeEncodeError():
            return "holds half of a surrogate pair"
        case _:
            return str(error)


def dump_line(record: BaseModel | Mapping[str, Any]) -> bytes:
    """One line of what `write_records` writes."""
    if isinstance(record, BaseModel):
        value = record.model_dump(mode="json", by_alias=True, exclude_none=True)
    else:
        value = {key: field for key, field in record.items() if field is not None}
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _update_quarantine(quarantine: Path, name: str, bad: list[dict[str, Any]]) -> None:
    """Put the bad rows of the file `name` in place of those of an earlier read of it."""
    rows = [{"file": name, **row} for row in bad]
    # One that cannot be read is replaced: reading its files again fills it again.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        earlier = [json.loads(line) for line in quarantine.read_bytes().splitlines()]
        rows += [row for row in earlier if row["file"] != name]
    if rows:
        write_records(quarantine, rows)
    else:
        quarantine.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with readable(path), path.open("rb") as file:
        yield from ((n, line) for n, line in enumerate(file, start=1) if line.strip())


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the disk says against reading `path` into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}. {neighbours(path)}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


# Made once: json.loads with hooks would make one for every row, at twice the time.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_distinct_keys, parse_constant=_finite, parse_float=_finite
)
