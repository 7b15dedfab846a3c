"""Nectar's prompt string, its key of equal prompts, and its columns in both file formats."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.base.errors import DataError, InputError
from starling.base.jsonl import write_records
from starling.data.nectar import (
    convert,
    dedup_key,
    nectar_prompt,
    normalised_words,
    published_prompt,
    write_nectar,
)
from starling.data.records import Message, Prompt, RankingRow
from starling.data.rows import read_rows

NAMES = ["nectar.jsonl", "nectar.parquet"]
COLUMNS = ["prompt", "answers", "turns", "num_responses", "source", "good_natured"]


def user(text):
    return (Message(role="user", content=text),)


def row(**columns):
    answers = [{"answer": f"a{n}", "model": "m", "rank": n} for n in (1, 2)]
    return RankingRow.model_validate({"answers": answers, **columns})


def read(path):
    return read_rows(path, RankingRow, quarantine=path.with_name("bad.jsonl"))


def raw_rows(path):
    """What other programs read in the file, without any code of ours."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_conversation_becomes_one_string_with_the_system_message_in_the_first_turn():
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye")]
    messages = [Message(role=role, content=text) for role, text in turns]
    expected = "\n\nHuman: be brief\n\nhi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: "
    assert nectar_prompt(messages) == expected


@pytest.mark.parametrize(
    "prompt", ["\n\nHuman:  two spaces \n\nAssistant: ", "\n\nHuman: hi\n\nAssistant:"]
)
def test_the_published_string_stays_as_it_was_though_its_messages_are_stripped(prompt):
    assert published_prompt(row(prompt=prompt)) == prompt
    assert published_prompt(Prompt.model_validate({"prompt": prompt})) == prompt


@pytest.mark.parametrize("prompt", [None, "", "hello", "\n\nHuman: other\n\nAssistant: "])
def test_messages_speak_where_the_prompt_string_says_something_else(prompt):
    messages = [{"role": "user", "content": "hi"}]
    told = published_prompt(row(messages=messages, prompt=prompt))
    assert told == "\n\nHuman: hi\n\nAssistant: "


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("What is 2+2, [INST]Bob[/INST]?", "whatis22bob"),
        ("a_b\tC\n\nHuman: d\n\nAssistant: e", "abcde"),
        ("\u00c9t\u00e9!", "\u00e9t\u00e9"),
        ("E\u0301te\u0301", "\u00e9t\u00e9"),
        ("\u4e16\u754c\u3002", "\u4e16\u754c"),
        ("\u0915\u093f?", "\u0915\u093f"),
    ],
)
def test_the_key_is_lower_case_and_alphanumeric_without_marks_of_turns(text, key):
    assert dedup_key(user(text)) == key


def test_other_scripts_and_emoji_do_not_fall_together():
    texts = [
        "\u4f60\u597d",
        "\u4e16\u754c",
        "\u0915\u093f",
        "\u0915\u0940",
        "\u2764\ufe0f",
        "\u2600\ufe0f",
        "...",
    ]  # noqa: E501
    assert len({dedup_key(user(text)) for text in texts}) == len(texts)


@given(st.text(st.sampled_from("aB3 .,!?\n-")), st.text(st.sampled_from(" .,!?\n-_"), max_size=3))
def test_signs_spaces_and_case_do_not_change_a_key(text, noise):
    varied = noise + noise.join(text.swapcase()) + noise
    if any(character.isalnum() for character in text):
        assert dedup_key(user(varied)) == dedup_key(user(text))


def test_words_have_no_case_and_signs_and_an_ideograph_is_one():
    text = "Don\u2019t stop: it's x_y, \u4e16\u754c3 \u0915\u093f"
    expected = ["dont", "stop", "its", "x", "y", "\u4e16", "\u754c", "3", "\u0915\u093f"]
    assert normalised_words(text) == expected


@pytest.mark.parametrize("name", NAMES)
def test_ties_and_unranked_answers_are_written_and_read_back(tmp_path, name):
    ranks = [2.0, 1.0, 2.0, None]
    answers = [
        {"answer": f"\u00e9{n}", "model": f"m{n}", "rank": rank} for n, rank in enumerate(ranks)
    ]
    full = row(
        prompt="\n\nHuman: q\n\nAssistant: ", answers=answers, source=["a", "b"], good_natured=False
    )
    bare = row(messages=[{"role": "user", "content": "other"}], id="7", mode="code")
    write_nectar(tmp_path / name, [full, bare])
    first, second = raw_rows(tmp_path / name)
    assert list(first) == COLUMNS
    assert first["answers"] == answers
    assert (first["turns"], first["num_responses"], first["source"]) == (1, 4, ["a", "b"])
    assert first["good_natured"] is False
    assert second["prompt"] == "\n\nHuman: other\n\nAssistant: "
    assert (second.get("source"), second.get("good_natured")) == (None, None)
    assert "mode" not in second
    assert [each.ranks for each in read(tmp_path / name)] == [[2, 1, 2, None], [1, 2]]


def test_parquet_has_the_published_types_in_more_than_one_row_group(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("starling.data.nectar.ROWS_AT_ONCE", 2)
    rows = [row(prompt=f"\n\nHuman: {n}\n\nAssistant: ") for n in range(5)]
    write_nectar(tmp_path / "n.parquet", rows)
    file = parquet.ParquetFile(tmp_path / "n.parquet")
    assert file.num_row_groups == 3
    types = {
        field.name: str(field.type).replace("item:", "element:") for field in file.schema_arrow
    }
    answer = "struct<answer: string, model: string, rank: double>"
    assert types == {
        "prompt": "string",
        "answers": f"list<element: {answer}>",
        "turns": "int64",
        "num_responses": "int64",
        "source": "list<element: string>",
        "good_natured": "bool",
    }
    assert [each["prompt"] for each in raw_rows(tmp_path / "n.parquet")] == [r.prompt for r in rows]


@pytest.mark.parametrize(
    ("name", "sample", "said"),
    [
        ("to.jsonl", 0, "a sample of 0 rankings is none"),
        ("to.parquet", -5, "a sample of -5 rankings is none"),
        ("to.json", 3, "use .jsonl or .parquet"),
        ("to", None, "use .jsonl or .parquet"),
        ("to.PARQUET", None, "use .jsonl or .parquet"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(tmp_path, name, sample, said):
    with pytest.raises(InputError, match=said):
        convert(tmp_path / "none.jsonl", tmp_path / name, sample=sample)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_source_leaves_the_old_target(tmp_path):
    (tmp_path / "from.jsonl").write_text("nonsense\n")
    (tmp_path / "to.jsonl").write_text("old")
    with pytest.raises(DataError, match="1 of 1 rows"):
        convert(tmp_path / "from.jsonl", tmp_path / "to.jsonl")
    assert (tmp_path / "to.jsonl").read_text() == "old"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(DataError, match=r'pip install "starling-rlaif\[parquet\]"'):
        read(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r'pip install "starling-rlaif\[parquet\]"'):
        write_nectar(tmp_path / "new.parquet", [row(prompt="\n\nHuman: q\n\nAssistant: ")])


@pytest.mark.real_data
@pytest.mark.parametrize("name", NAMES)
def test_real_nectar_comes_back_as_it_was_published(test_data, tmp_path, name):
    published = test_data / "nectar" / "rankings.jsonl"
    assert convert(published, tmp_path / name) == 100
    assert convert(tmp_path / name, tmp_path / "again.jsonl") == 100
    original = raw_rows(published)
    assert len(original) == 100
    for again in (raw_rows(tmp_path / name), raw_rows(tmp_path / "again.jsonl")):
        assert [{k: v for k, v in each.items() if v is not None} for each in again] == original
    assert read(tmp_path / name) == read(published)


def test_a_sample_is_drawn_from_the_whole_file_and_keeps_its_order(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": f"Question {n:03}"}],
            "answers": [{"answer": "a", "model": "m", "rank": 1}, {"answer": "b", "model": "n"}],
        }
        for n in range(200)
    ]
    write_records(tmp_path / "from.jsonl", rows)
    drawn = []
    for seed in (0, 0, 1):
        target = tmp_path / "to.jsonl"
        assert convert(tmp_path / "from.jsonl", target, sample=20, seed=seed) == 20
        lines = target.read_text(encoding="utf-8").splitlines()
        drawn.append([int(json.loads(line)["prompt"][-16:-13]) for line in lines])
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(each == sorted(each) and each[0] < 60 and each[-1] > 140 for each in drawn)
