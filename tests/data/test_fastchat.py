"""FastChat's folder: where its files are found, and what becomes of rows and their times."""

import fnmatch

import huggingface_hub
import pytest

from bench.mt_files import QUESTIONS, answers_of, write_bench, write_lines
from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.data.fastchat import (
    ModelAnswer,
    SingleJudgment,
    dated,
    find_files,
    find_folder,
    read_bench,
    resolve,
    write_rows,
)
from starling.data.records import Question


def test_the_judges_prompts_may_stand_one_level_up_as_in_fastchats_repository(tmp_path):
    folder = write_bench(tmp_path / "data" / "mt_bench")
    (folder / "judge_prompts.jsonl").rename(tmp_path / "data" / "judge_prompts.jsonl")
    bench = read_bench(find_files(folder), tmp_path / "quarantine.jsonl")
    assert len(bench.prompts) == 8
    assert bench.references == {111: ("4", "6")}
    (tmp_path / "data" / "judge_prompts.jsonl").unlink()
    with pytest.raises(DataError, match=r"no judge_prompts.jsonl in .* or beside it"):
        find_files(folder)


def test_of_several_references_gpt_4s_are_the_official_ones(tmp_path):
    folder = write_bench(tmp_path)
    official = folder / "reference_answer" / "gpt-4.jsonl"
    other = folder / "reference_answer" / "a-judge.jsonl"
    other.write_bytes(official.read_bytes())
    assert find_files(folder).references == official
    assert find_files(folder, other).references == other
    official.unlink()
    assert find_files(folder).references == other
    official.with_name("b-judge.jsonl").write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"holds a-judge.jsonl, b-judge.jsonl; .*--references"):
        find_files(folder)


def test_a_question_asked_twice_is_refused(tmp_path):
    folder = write_bench(tmp_path)
    write_lines(folder / "question.jsonl", [*QUESTIONS, QUESTIONS[0]])
    with pytest.raises(DataError, match="more than one question 81"):
        read_bench(find_files(folder), tmp_path / "quarantine.jsonl")


def test_its_questions_are_questions_of_ours(tmp_path):
    path = write_bench(tmp_path) / "question.jsonl"
    rows = read_records(path, Question, quarantine=tmp_path / "quarantine.jsonl")
    assert [(row.id, row.category) for row in rows] == [
        *(("81", "writing"), ("111", "math"), ("141", "stem"))
    ]


@pytest.mark.parametrize(
    ("reference", "repository", "kind", "inner"),
    [
        ("hf://spaces/owner/name/data/mt_bench", "owner/name", "space", "data/mt_bench"),
        ("hf://datasets/owner/name", "owner/name", "dataset", ""),
        ("hf://datasets/owner/name@v1/sub", "owner/name", "dataset", "sub"),
    ],
)
def test_a_folder_on_the_hub_is_fetched_with_no_more_than_is_read(
    tmp_path, monkeypatch, reference, repository, kind, inner
):
    asked = {}

    def download(name, *, repo_type, revision, allow_patterns):
        asked.update(name=name, kind=repo_type, revision=revision)
        folder = write_bench(tmp_path / inner, "a-model")
        if inner:
            (folder / "judge_prompts.jsonl").rename(folder.parent / "judge_prompts.jsonl")
        for path in tmp_path.rglob("*.jsonl"):
            relative = path.relative_to(tmp_path).as_posix()
            if not any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                path.unlink()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = find_folder(reference)
    assert asked == {
        "name": repository,
        "kind": kind,
        "revision": "v1" if "@" in reference else None,
    }
    assert len(read_bench(find_files(folder), tmp_path / "quarantine.jsonl").questions) == 3
    assert not (folder / "model_answer" / "a-model.jsonl").exists()


def test_what_cannot_be_fetched_says_what_to_do():
    with pytest.raises(DataError, match=r"cannot be had.*\n.*or give a folder"):
        find_folder("hf://spaces/nobody/nothing-at-all/data")


def test_rows_keep_the_time_at_which_they_were_first_written(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [ModelAnswer.model_validate(row | {"tstamp": None}) for row in answers_of("one")]
    first = dated(rows[:2], path)
    assert all(row.tstamp is not None for row in first)
    write_rows(path, [row.model_copy(update={"tstamp": 5.0}) for row in first])
    again = dated(rows, path)
    assert [row.tstamp for row in again[:2]] == [5.0, 5.0]
    assert again[2].tstamp > 5.0
    assert dated([], path) == []


def test_a_whole_score_is_written_as_a_whole_number(tmp_path):
    base = {"question_id": 1, "model": "m", "judge": ["j", "p"], "turn": 1}
    rows = [SingleJudgment.model_validate(base | {"score": score}) for score in (7, 7.5, -1)]
    write_rows(tmp_path / "rows.jsonl", rows)
    texts = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert ['"score": 7,' in texts[0], '"score": 7.5' in texts[1], '"score": -1,' in texts[2]] == [
        *(True, True, True)
    ]


def test_a_second_row_is_resolved_by_the_rule(tmp_path):
    rows = [ModelAnswer.model_validate(row) for row in answers_of("one")]
    keys = [1, 1, 2]
    assert resolve(tmp_path, rows, keys, "first", "row") == ([rows[0], rows[2]], 1)
    assert resolve(tmp_path, rows, keys, "last", "row") == ([rows[1], rows[2]], 1)
    with pytest.raises(DataError, match=r"more than one row 1.*--duplicates first"):
        resolve(tmp_path, rows, keys, "refuse", "row")
