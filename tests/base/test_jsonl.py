import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from starling.base.errors import DataError
from starling.base.jsonl import iter_records, read_json, read_records, write_json, write_records


class Row(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    text: str
    ranks: tuple[int, ...] = ()
    score: float | None = None


class Renamed(BaseModel):
    turns: int = Field(alias="num turns")


GOOD = b'{"text": "fine"}\n'
BAD_LINES = [
    (b'{"text": "a"', "broken JSON"),
    (b"[1, 2]", "not a JSON object but list"),
    (b'"text"', "not a JSON object but str"),
    (b'{"text": "a", "score": NaN}', "NaN is not a finite number"),
    (b'{"text": "a", "score": -Infinity}', "-Infinity is not a finite number"),
    (b'{"text": "a", "score": 1e999}', "1e999 is not a finite number"),
    (b'{"text": "a", "text": "b"}', "key 'text' stands twice"),
    (b'{"text": 3}', "text: Input should be a valid string"),
    (b'{"texts": "a"}', "text: Field required; texts: Extra inputs are not permitted"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    (b'{"text": "\\ud800"}', "holds half of a surrogate pair"),
    (b'{"text": "a", "ranks": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"text": "a", "score": ' + b"9" * 5000 + b"}", "limit"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_and_reason(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_records(path, Row, quarantine=path.with_name("quarantine.jsonl"))
    assert "1 of 3 rows" in str(caught.value)
    assert "line 3: " in str(caught.value)
    assert reason in str(caught.value)


def test_good_rows_come_back_in_order_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = '\ufeff{"text": "\u00e9\u2028\U0001f600"}'
    second = '{"text": "b", "ranks": [1, 2], "score": 0.1}'
    path.write_bytes(f"{first}\r\n\n  \n{second}".encode())
    rows = read_records(path, Row, quarantine=path.with_name("quarantine.jsonl"))
    assert rows == [Row(text="\u00e9\u2028\U0001f600"), Row(text="b", ranks=(1, 2), score=0.1)]


def test_one_bad_row_in_a_hundred_is_put_aside_with_a_warning(tmp_path, caplog):
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes(GOOD * 42 + b'{"text": "\xc3\xa9", \n' + GOOD * 57)
    with caplog.at_level(logging.WARNING):
        rows = read_records(path, Row, quarantine=quarantine)
    assert rows == [Row(text="fine")] * 99
    assert "1 of 100 rows" in caplog.text
    assert str(quarantine) in caplog.text
    [put_aside] = [json.loads(line) for line in quarantine.read_text("utf-8").splitlines()]
    assert put_aside["file"] == "rows.jsonl"
    assert put_aside["line"] == 43
    assert put_aside["reason"].startswith("broken JSON")
    assert put_aside["text"] == '{"text": "\u00e9", '


def test_one_bad_row_in_ninety_nine_stops_after_the_quarantine_is_written(tmp_path):
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes(GOOD * 98 + b"nonsense\n")
    with pytest.raises(DataError, match="1 of 99 rows.*at most 0.01 of the rows may be") as caught:
        read_records(path, Row, quarantine=quarantine)
    assert str(quarantine) in str(caught.value)
    assert json.loads(quarantine.read_text())["text"] == "nonsense"


def test_the_error_shows_three_reasons_and_counts_the_rest(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x\n" * 5)
    with pytest.raises(DataError, match="and 2 more") as caught:
        read_records(path, Row, quarantine=path.with_name("quarantine.jsonl"))
    lines = [number for number in range(1, 6) if f"line {number}:" in str(caught.value)]
    assert lines == [1, 2, 3]


def test_without_bad_rows_no_quarantine_is_written(tmp_path):
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes(GOOD)
    read_records(path, Row, quarantine=quarantine)
    assert not quarantine.exists()


def test_a_new_read_replaces_what_the_quarantine_held_for_that_file_only(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    quarantine = tmp_path / "quarantine.jsonl"

    def files_put_aside():
        return [json.loads(line)["file"] for line in quarantine.read_text().splitlines()]

    for path in (first, second, first):
        path.write_bytes(GOOD * 99 + b"nonsense\n")
        read_records(path, Row, quarantine=quarantine)
    assert sorted(files_put_aside()) == ["first.jsonl", "second.jsonl"]
    first.write_bytes(GOOD)
    read_records(first, Row, quarantine=quarantine)
    assert files_put_aside() == ["second.jsonl"]
    second.write_bytes(GOOD)
    read_records(second, Row, quarantine=quarantine)
    assert not quarantine.exists()


@pytest.mark.parametrize("damage", [b"{", b"[3]\n", b'{"line": 3}\n', b"\xff\n"])
def test_a_damaged_quarantine_is_replaced(tmp_path, damage):
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes(GOOD * 99 + b"nonsense\n")
    quarantine.write_bytes(damage)
    read_records(path, Row, quarantine=quarantine)
    [put_aside] = map(json.loads, quarantine.read_text().splitlines())
    assert put_aside["text"] == "nonsense"
    quarantine.write_bytes(damage)
    path.write_bytes(GOOD)
    read_records(path, Row, quarantine=quarantine)
    assert not quarantine.exists()


def test_rows_come_one_by_one_and_the_verdict_on_the_file_after_the_last(tmp_path):
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes(GOOD + b"nonsense\n" + GOOD)
    rows = iter_records(path, Row, quarantine=quarantine)
    assert [next(rows), next(rows)] == [Row(text="fine")] * 2
    assert not quarantine.exists()
    with pytest.raises(DataError, match="1 of 3 rows"):
        next(rows)
    assert json.loads(quarantine.read_text())["line"] == 2


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows"):
        read_records(path, Row, quarantine=path.with_name("quarantine.jsonl"))


def test_a_missing_file_names_what_is_nearly_called_that(tmp_path):
    for name in ("prompts.jsonl", "prompt.txt", "zebra"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"there is no .*promts.jsonl.*holds prompts.jsonl"
    ) as caught:
        read_records(tmp_path / "promts.jsonl", Row, quarantine=tmp_path / "q")
    assert "zebra" not in str(caught.value)


def test_a_missing_file_with_no_near_name_lists_what_is_there(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        read_records(tmp_path / "prompts.jsonl", Row, quarantine=tmp_path / "q")
    (tmp_path / "zebra").touch()
    with pytest.raises(DataError, match="holds zebra"):
        read_records(tmp_path / "prompts.jsonl", Row, quarantine=tmp_path / "q")
    with pytest.raises(DataError, match="no folder"):
        read_records(tmp_path / "nowhere" / "prompts.jsonl", Row, quarantine=tmp_path / "q")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read .*directory"):
        read_records(tmp_path, Row, quarantine=tmp_path / "q")


@settings(deadline=None)
@given(
    rows=st.lists(
        st.builds(
            Row,
            text=st.text(st.characters(exclude_categories=["Cs"])),
            ranks=st.lists(st.integers(-(2**63), 2**63 - 1)).map(tuple),
            score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
    )
)
def test_what_was_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_records(path, rows)
    assert path.read_bytes().count(b"\n") == len(rows)
    assert read_records(path, Row, quarantine=path.with_name("quarantine.jsonl")) == rows


def test_records_are_written_in_field_order_without_none_and_by_alias(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        Row(text="\u00e9", ranks=(2, 1)),
        {"z": 1, "a": None, "b": [None]},
        Renamed.model_validate({"num turns": 2}),
    ]
    write_records(path, rows)
    assert path.read_text("utf-8").splitlines() == [
        '{"text": "\u00e9", "ranks": [2, 1]}',
        '{"z": 1, "b": [null]}',
        '{"num turns": 2}',
    ]


@pytest.mark.parametrize("row", [Row(text="a", score=math.nan), {"score": math.inf}])
def test_a_record_that_is_not_finite_is_not_written(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(path, [Row(text="a"), row])
    assert path.read_bytes() == GOOD


def test_a_json_file_comes_back_as_it_was(tmp_path):
    value = {"b": [1, 0.1, None, True], "a": {"\u00e9": "x"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text("utf-8").startswith('{\n  "b": [\n    1,')
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", math.nan)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff"])
def test_a_damaged_json_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="a.json is damaged: .*delete it"):
        read_json(tmp_path / "a.json")


def test_a_missing_json_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        read_json(tmp_path / "a.json")
