"""The small world: the same bytes per seed, disjoint files, and habits that leave room to learn."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest

import starling.demo.world as world_module
from starling.data.records import Conversation, Prompt, Question
from starling.demo.tasks import TASKS, draw_task
from starling.demo.world import VOICES, Sizes, normalised, say, write_world
from starling.judging.instructions import InstructedPrompt, share_followed
from starling.judging.rubric import Checks, Grade, grade

SMALL = Sizes(bench=32, validation=32, prompts=64, ppo=64, sft=320, instructions=32, checks=32)
FILES = ("bench", "validation", "prompts", "ppo", "sft", "instructions", "checks")
NAMES = list(TASKS)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(out, seed=0, sizes=SMALL)
    return out


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(world: Path, tmp_path: Path):
    write_world(tmp_path / "again", seed=0, sizes=SMALL)
    write_world(tmp_path / "other", seed=1, sizes=SMALL)
    for name in FILES:
        first = (world / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == first
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != first


def test_a_file_keeps_its_bytes_when_a_later_one_grows(world: Path, tmp_path: Path):
    write_world(tmp_path, seed=0, sizes=Sizes(32, 32, 64, 64, sft=640))
    for name in FILES[:-3]:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (world / f"{name}.jsonl").read_bytes()


def user_texts(row: dict[str, Any]) -> list[str]:
    if "turns" in row:
        return row["turns"]
    return [message["content"] for message in row["messages"] if message["role"] == "user"]


def test_no_user_text_stands_twice_at_the_default_sizes(tmp_path: Path):
    write_world(tmp_path, seed=0)
    seen: set[str] = set()
    for row in (row for name in FILES for row in rows(tmp_path, name)):
        texts = {normalised(text) for text in user_texts(row)}
        assert not texts & seen
        seen |= texts


def test_texts_that_differ_in_case_and_spacing_are_the_same():
    assert normalised(" Is it\nTin?") == normalised("is IT tin ?") != normalised("Is it iron?")


def test_more_rows_than_there_are_different_prompts_are_refused(monkeypatch: pytest.MonkeyPatch):
    turns = draw_task("math", Random(0))
    monkeypatch.setattr(world_module, "draw_task", lambda _category, _random: turns)
    tasks = world_module.unseen_tasks(2, Random(0), set())
    assert next(tasks) == ("writing", turns)
    with pytest.raises(ValueError, match="too few different prompts"):
        next(tasks)


def test_every_row_is_a_valid_record_with_its_category_equally_often(world: Path):
    instructed = dict.fromkeys(("instructions", "checks"), InstructedPrompt)
    kinds = {"bench": Question, "sft": Conversation, **instructed}
    for name in FILES:
        records = rows(world, name)
        for row in records:
            kinds.get(name, Prompt).model_validate_json(json.dumps(row))
        count = Counter(row["category"] for row in records)
        assert count == dict.fromkeys(NAMES, len(records) // len(NAMES))
        assert len({row["id"] for row in records}) == len(records)


def test_instructions_say_nothing_of_what_is_right(world: Path):
    for row in rows(world, "instructions"):
        assert "checks" not in row
        record = InstructedPrompt.model_validate(row)
        assert len(record.instructions) == len(set(record.instructions)) == 4
        # The same answer, whatever was asked.
        assert share_followed([record], ["It is so."]) == [1.0]


def test_instructions_are_followed_in_part_by_what_the_sft_data_says(tmp_path: Path):
    write_world(tmp_path, seed=0, sizes=Sizes(8, 8, 8, 8, 800, 800))
    records = [InstructedPrompt.model_validate(row) for row in rows(tmp_path, "instructions")]
    said = [row["messages"][1]["content"] for row in rows(tmp_path, "sft")]
    shares = share_followed(records, said)
    assert 0.6 < sum(shares) / len(shares) < 0.8
    rambling = "Well, um, it is tin, you know, more or less, so yeah, and then. Hope so! Who knows?"
    kept = share_followed(records, [rambling] * len(records))
    assert sum(kept) / len(kept) < 0.5


def test_prompts_are_half_one_turn_and_half_two_in_every_category(world: Path):
    turns = Counter((row["category"], len(row["messages"])) for row in rows(world, "ppo"))
    assert turns == {(name, length): 4 for name in NAMES for length in (1, 3)}


def test_the_right_answer_is_right_and_a_wrong_habit_is_not():
    for name in NAMES:
        random = Random(f"right/{name}")
        for _ in range(200):
            for turn in draw_task(name, random):
                right, habit = (grade(turn.checks, body) for body in (turn.right, turn.habit))
                assert right.correctness == 1.0
                assert habit.correctness < 1.0 or turn.habit.split() == turn.right.split()


def test_checks_in_the_files_grade_as_they_were_written(world: Path):
    for row in rows(world, "bench"):
        for checks in row["checks"]:
            phrases = " ".join(checks["contains_all"])
            assert grade(Checks.model_validate(checks), phrases).correctness == 1.0


def sft_like_grades(num_tasks: int) -> dict[str, list[Grade]]:
    grades: dict[str, list[Grade]] = defaultdict(list)
    random = Random("habits")
    for name in NAMES:
        for _ in range(num_tasks):
            for turn in draw_task(name, random):
                grades[name].append(grade(turn.checks, say(turn, name, random)))
    return grades


def test_no_part_is_bad_in_more_than_three_fifths_of_a_category():
    for category, grades in sft_like_grades(300).items():
        for part in Grade._fields:
            bad = sum(getattr(one, part) < 0.5 for one in grades) / len(grades)
            assert bad <= 0.6, (category, part, bad)


def test_the_commonest_voice_is_not_the_best_and_the_best_is_not_rare():
    checks = Checks(contains_all=("tin",), max_words=7)
    styles = []
    for voice in VOICES:
        said = [w.format(body="it is tin", Body="It is tin") for w in voice["wordings"]]
        styles.append(sum(grade(checks, one).style for one in said) / len(said))
    shares = [voice["share"] for voice in VOICES]
    best = max(range(len(VOICES)), key=styles.__getitem__)
    assert sum(shares) == pytest.approx(1.0)
    assert 0.2 <= shares[best] < max(shares)
    assert styles[shares.index(max(shares))] < 0.5 < 0.9 < styles[best]


def test_habits_prevail_in_several_categories_but_never_crowd_out_the_right_answer():
    shares = [TASKS[name]["habit_share"] for name in NAMES]
    assert sum(share > 0.5 for share in shares) >= 4
    assert max(shares) <= 0.58


def test_random_answers_to_one_prompt_seldom_tie_and_length_hardly_tells_them_apart():
    random = Random("pairs")
    ties, shorter_wins = [], []
    for number in range(1600):
        name = NAMES[number % len(NAMES)]
        turn = draw_task(name, random)[0]
        answers = [say(turn, name, random) for _ in range(2)]
        first, second = (grade(turn.checks, answer).total for answer in answers)
        ties.append(abs(first - second) < 0.02)
        lengths = [len(answer) for answer in answers]
        if not ties[-1] and lengths[0] != lengths[1]:
            shorter_wins.append((first > second) == (lengths[0] < lengths[1]))
    assert sum(ties) / len(ties) < 0.15
    assert 0.35 < sum(shorter_wins) / len(shorter_wins) < 0.65
