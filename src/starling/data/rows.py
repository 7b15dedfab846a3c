"""Rows from wherever they lie: JSONL, parquet, a data set on the hub; validated the same way."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel

from starling.base.errors import DataError
from starling.base.jsonl import iter_records, parse_rows, readable

M = TypeVar("M", bound=BaseModel)

PARQUET = ".parquet"

HUB_DATA = "hf://datasets/"
"""How a reference to a file of a data set on the hub begins."""

REFERENCE = re.compile(HUB_DATA + r"([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/(.+)")


def read_rows(path: Path, record: type[M], *, quarantine: Path) -> list[M]:
    """Read a file as `iter_rows` does, all at once."""
    return list(iter_rows(path, record, quarantine=quarantine))


def iter_rows(path: Path, record: type[M], *, quarantine: Path) -> Iterator[M]:
    """Read a file row by row: parquet when its name says so, JSONL otherwise.

    Bad rows are put aside and counted as by `base.jsonl.parse_rows`, parquet's with the row number.
    """
    if path.suffix != PARQUET:
        return iter_records(path, record, quarantine=quarantine)
    rows = _parquet_rows(path, set(record.model_fields))
    return parse_rows(path, rows, record, quarantine=quarantine, unit="row")


def fetch(reference: str) -> Path:
    """The local copy of `hf://datasets/OWNER/NAME[@REVISION]/FILE`, downloaded when it is not here.

    Raises DataError when it cannot be had.
    """
    found = REFERENCE.fullmatch(reference)
    if found is None:
        raise DataError(
            f"{reference!r} names no file of a data set. "
            f"Write {HUB_DATA}OWNER/NAME/FILE, or {HUB_DATA}OWNER/NAME@REVISION/FILE."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    name, revision, file = found.groups()
    revision = unquote(revision) if revision else None
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{reference} cannot be had: {str(error).strip().splitlines()[0]}\n"
            "Check the name, the network (HF_HUB_OFFLINE) and the access (hf auth login); or "
            "download the file elsewhere and name its path."
        ) from error


def import_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises DataError when they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "parquet files need pyarrow, which is not installed: "
            'pip install "starling-rlaif[parquet]"'
        ) from error
    return pyarrow, pyarrow.parquet


def _parquet_rows(path: Path, wanted: set[str]) -> Iterator[tuple[int, bytes]]:
    """The rows as JSON, so that one and the same strict reader judges them; only columns wanted."""
    pyarrow, parquet = import_pyarrow()
    try:
        with readable(path), parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            batches = file.iter_batches(batch_size=1000, columns=columns)
            rows = (_as_json(row) for batch in batches for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is damaged or no parquet file: {str(error).splitlines()[0]}"
        ) from error


def _as_json(row: dict[str, Any]) -> bytes:
    """The row as JSON; a column that is null in parquet is absent."""
    given = {name: value for name, value in row.items() if value is not None}
    return json.dumps(given, ensure_ascii=False, default=str).encode(errors="surrogatepass")
