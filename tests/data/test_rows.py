"""Rows from JSONL, parquet and the hub: one reader's rules for all."""

import json
import logging
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from starling.base.errors import DataError
from starling.data.records import Prompt, RankingRow
from starling.data.rows import fetch, iter_rows, read_rows

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PROMPT = {"prompt": "\n\nHuman: hi\n\nAssistant: "}
RANKED = [{"answer": "a", "model": "m", "rank": 1.0}, {"answer": "b", "model": "n", "rank": 2.0}]


def write_parquet(path, rows, **options):
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def read(path, record=Prompt):
    return read_rows(path, record, quarantine=path.with_name("quarantine.jsonl"))


def test_parquet_and_jsonl_give_equal_records_of_plain_types(tmp_path):
    plain = {**PROMPT, "turns": 1, "num_responses": 2}
    rows = [
        {**plain, "answers": RANKED, "source": ["x"], "good_natured": None},
        {**plain, "answers": RANKED[::-1], "source": ["x", "y"], "good_natured": True},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_parquet = read(write_parquet(tmp_path / "r.parquet", rows), RankingRow)
    assert from_parquet == read(tmp_path / "r.jsonl", RankingRow)
    first, second = from_parquet
    assert type(first.answers[0].rank) is float
    assert (type(first.turns), type(first.source)) == (int, list)
    assert (first.good_natured, second.good_natured) == (None, True)


def test_columns_that_the_record_has_not_are_never_looked_at(tmp_path):
    columns = {"embedding": [float("nan")], "made": b"\xff", "prompt": PROMPT["prompt"]}
    [prompt] = read(write_parquet(tmp_path / "p.parquet", [columns]))
    assert prompt.messages[0].content == "hi"


def test_a_bad_parquet_row_is_put_aside_with_its_number(tmp_path, caplog):
    rows = [PROMPT] * 150
    rows[120] = {"prompt": "no marker"}
    path = write_parquet(tmp_path / "p.parquet", rows, row_group_size=50)
    with caplog.at_level(logging.WARNING):
        assert len(read(path)) == 149
    assert "1 of 150 rows" in caplog.text
    [aside] = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (aside["file"], aside["row"]) == ("p.parquet", 121)
    assert json.loads(aside["text"]) == {"prompt": "no marker"}


def test_too_many_bad_parquet_rows_are_refused_with_their_numbers(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [PROMPT, {"prompt": "no"}])
    with pytest.raises(DataError, match=r"1 of 2 rows(.|\n)*row 2: "):
        read(path)


@pytest.mark.parametrize("rank", [float("nan"), float("inf")])
def test_a_rank_that_is_no_number_is_no_rank_in_parquet_either(tmp_path, rank):
    answers = [{"answer": "a", "model": "m", "rank": rank}, RANKED[0]]
    path = write_parquet(tmp_path / "r.parquet", [{**PROMPT, "answers": answers}])
    with pytest.raises(DataError, match="not a finite number"):
        read(path, RankingRow)


def test_what_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "p.parquet").write_text(json.dumps(PROMPT))
    with pytest.raises(DataError, match=r"p.parquet is damaged or no parquet file"):
        read(tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"there is no .*q.parquet.*holds p.parquet"):
        read(tmp_path / "q.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        read(write_parquet(tmp_path / "none.parquet", [PROMPT][:0]))


@pytest.mark.parametrize(("suffix", "num_rows"), [("jsonl", 400), ("parquet", 2500)])
def test_a_file_is_gone_through_in_flat_memory(tmp_path, suffix, num_rows):
    length = 20_000_000 // num_rows
    rows = [{"prompt": f"\n\nHuman: {n} {'x' * length}\n\nAssistant: "} for n in range(num_rows)]
    path = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        write_parquet(path, rows, row_group_size=500)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    del rows
    tracemalloc.start()
    try:
        number = sum(1 for _ in iter_rows(path, Prompt, quarantine=tmp_path / "q"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == num_rows
    # Of parquet a thousand rows are here at once: 8 of the 20 MB.
    assert peak < 12e6 if suffix == "parquet" else peak < 2e6


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of the hub's files, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(hub, name, revision, file, content):
    """Write a file into the cache as the hub's client does: snapshots by commit, refs by name."""
    folder = hub / f"datasets--{name.replace('/', '--')}"
    commit = f"{abs(hash(revision)):040x}"[:40]
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


@pytest.mark.parametrize(
    ("reference", "revision"),
    [
        ("hf://datasets/an-owner/Name.1/data/rows.jsonl", "main"),
        ("hf://datasets/an-owner/Name.1@v2/data/rows.jsonl", "v2"),
        (
            "hf://datasets/an-owner/Name.1@refs/convert/parquet/data/rows.jsonl",
            "refs/convert/parquet",
        ),  # noqa: E501
        ("hf://datasets/an-owner/Name.1@refs%2Fpr%2F1/data/rows.jsonl", "refs/pr/1"),
    ],
)
def test_a_file_in_the_cache_needs_no_network(hub, reference, revision):
    for each in {"main", "v2", "refs/convert/parquet", "refs/pr/1"}:
        put(hub, "an-owner/Name.1", each, "data/rows.jsonl", each)
    assert fetch(reference).read_text() == revision
    assert fetch(reference).name == "rows.jsonl"


def test_a_file_that_is_not_here_cannot_be_had_offline(hub):
    with pytest.raises(
        DataError, match=r"hf://datasets/a/b/c.parquet cannot be had: (.|\n)*OFFLINE"
    ):
        fetch("hf://datasets/a/b/c.parquet")


@pytest.mark.parametrize(
    "reference", ["hf://datasets/a/b", "hf://datasets/a", "hf://datasets/a/b@v1", "hf://datasets/"]
)
def test_a_reference_without_a_file_is_refused(reference):
    with pytest.raises(DataError, match="names no file of a data set"):
        fetch(reference)


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as one file needs: its headers, and its bytes."""

    def do_HEAD(self):
        self._answer(body=b"")

    def do_GET(self):
        self._answer(body=b'{"n": 1}\n')

    def _answer(self, body):
        if self.path.partition("?")[0] != "/datasets/a/b/resolve/main/rows.jsonl":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", '"0123"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


def test_a_file_is_downloaded_once_and_a_missing_one_is_named(hub, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        assert fetch("hf://datasets/a/b/rows.jsonl").read_bytes() == b'{"n": 1}\n'
        with pytest.raises(DataError, match="b/none.jsonl cannot be had: .*404"):
            fetch("hf://datasets/a/b/none.jsonl")
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("hf://datasets/a/b/rows.jsonl").read_bytes() == b'{"n": 1}\n'
