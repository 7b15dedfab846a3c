"""What an MT-Bench judge is shown, to the byte, and what is read of its reply.

The real prompts of three models are in the real_data lane; the small ones here are written out.
"""

import csv
import json

import pytest

from bench.mt_files import QUESTIONS, answer_row, write_bench, write_lines
from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.bench.asking import Unread
from starling.bench.mt_bench.protocol import (
    TEMPERATURES,
    first_score,
    read_any_score,
    read_score,
    read_winner,
    show_answer,
    show_pair,
)
from starling.data.fastchat import SingleJudgment, find_files, read_answers, read_bench
from starling.models.interfaces import Reply, Usage


@pytest.fixture
def bench(tmp_path):
    return read_bench(find_files(write_bench(tmp_path)), tmp_path / "quarantine.jsonl")


def texts(shown):
    return [(message.role, message.content) for message in shown.messages]


def test_a_first_turn_is_asked_about_in_the_user_prompt(bench):
    shown = show_answer(bench, bench.questions[0], ("Done {z}", "DONE"), 1)
    assert shown.prompt == "single-v1"
    # Braces that somebody typed stay what they are.
    asked = "[Task]\nRate it, as [[rating]].\n\n[Q]\nWrite {x}.\n\n[A]\nDone {z}\n[End]"
    assert texts(shown) == [("system", "You help."), ("user", asked)]


def test_a_second_turn_shows_both_with_the_instruction_as_the_system_message(bench):
    shown = show_answer(bench, bench.questions[0], ("Done", "DONE"), 2)
    assert shown.prompt == "single-v1-multi-turn"
    asked = "1: Write {x}.\nA: Done\n2: Now in capitals.\nA: DONE\n"
    assert texts(shown) == [("system", "Rate the second turn.\n\n"), ("user", asked)]


def test_mathematics_is_judged_beside_the_reference_and_of_both_turns_in_the_second(bench):
    first = show_answer(bench, bench.questions[1], ("4", "7"), 1)
    second = show_answer(bench, bench.questions[1], ("4", "7"), 2)
    assert (first.prompt, second.prompt) == ("single-math-v1", "single-math-v1-multi-turn")
    assert first.user_prompt.endswith("[End]\n[R]\n4")
    assert second.user_prompt.endswith("A: 7\n\n[R]\n4\n6")


def test_a_pair_is_shown_in_its_seats(bench):
    one, other = ("a1", "a2"), ("b1", "b2")
    first = show_pair(bench, bench.questions[2], one, other, 1)
    assert (first.prompt, first.user_prompt) == (
        "pair-v2",
        "[Q]\nWhat is mass?\n[A]\na1\n[B]\nb1",
    )
    second = show_pair(bench, bench.questions[2], other, one, 2)
    assert second.prompt == "pair-v2-multi-turn"
    assert second.user_prompt == "What is mass?|And weight?\nA: b1|b2\nB: a1|a2"
    guided = show_pair(bench, bench.questions[1], one, other, 1)
    assert (guided.prompt, guided.user_prompt[-5:]) == ("pair-math-v1", "[R]\n4")


def test_a_question_whose_reference_is_missing_is_refused_with_what_to_do(tmp_path):
    folder = write_bench(tmp_path)
    (folder / "reference_answer" / "gpt-4.jsonl").unlink()
    bench = read_bench(find_files(folder), tmp_path / "quarantine.jsonl")
    with pytest.raises(DataError, match=r"question 111 is of category math.*--references"):
        show_answer(bench, bench.questions[1], ("4", "7"), 1)
    show_answer(bench, bench.questions[0], ("4", "7"), 1)


def test_a_reference_for_one_turn_of_two_is_not_enough(tmp_path):
    folder = write_bench(tmp_path)
    write_lines(folder / "reference_answer" / "gpt-4.jsonl", [answer_row("gpt-4", 111, ["4"])])
    bench = read_bench(find_files(folder), tmp_path / "quarantine.jsonl")
    with pytest.raises(DataError, match=r"for each of its 2 turns, and reference_answer/ holds 1"):
        show_answer(bench, bench.questions[1], ("4", "7"), 1)


@pytest.mark.parametrize("category", ["math", "reasoning", "coding"])
def test_three_categories_have_references(tmp_path, category):
    folder = write_bench(tmp_path)
    write_lines(folder / "question.jsonl", [QUESTIONS[1] | {"category": category}])
    bench = read_bench(find_files(folder), tmp_path / "quarantine.jsonl")
    assert show_answer(bench, bench.questions[0], ("4", "7"), 1).prompt == "single-math-v1"


def test_a_template_with_a_field_that_nobody_fills_is_refused(tmp_path):
    folder = write_bench(tmp_path)
    rows = [json.loads(line) for line in (folder / "judge_prompts.jsonl").open()]
    write_lines(
        folder / "judge_prompts.jsonl",
        [row | {"prompt_template": "{question} {answer} {mood}"} for row in rows],
    )
    bench = read_bench(find_files(folder), tmp_path / "quarantine.jsonl")
    with pytest.raises(DataError, match=r"single-v1.*mood.*\{question\}"):
        show_answer(bench, bench.questions[0], ("4", "7"), 1)
    without = write_bench(tmp_path / "without")
    write_lines(without / "judge_prompts.jsonl", rows[1:])
    bench = read_bench(find_files(without), tmp_path / "quarantine.jsonl")
    with pytest.raises(DataError, match="holds no prompt 'single-v1'"):
        show_answer(bench, bench.questions[0], ("4", "7"), 1)


def reply(text):
    return Reply("id", text, "stop", Usage(1, 1))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. Rating: [[8]]", 8.0),
        ("I say [[7.5]] and not [[3]]", 7.5),
        ("Rating: [6]", 6.0),
        ("See [1], as it says. Rating: [[9]]", 9.0),
        ("[[10]]", 10.0),
        ("[[5.]]", 5.0),
        ("[[1]]", 1.0),
        ("[ [4] ]", 4.0),
        ("[[70]]", None),
        ("[[0]]", None),
        ("[[0.5]]", None),
        ("[[10.5]]", None),
        ("[[-3]]", None),
        ("[[eight]]", None),
        ("8/10", None),
        ("[[٨]]", None),
        ("", None),
    ],
)
def test_the_first_rating_in_double_brackets_counts_else_the_first_in_single_ones(text, score):
    read = read_score(reply(text))
    assert isinstance(read, Unread) if score is None else read == score


def test_as_fastchat_reads_any_number_is_a_score():
    assert read_any_score(reply("[[70]]")) == 70.0
    assert read_any_score(reply("Rating: [[0]]")) == 0.0
    assert isinstance(read_any_score(reply("none")), Unread)


def test_an_unreadable_rating_says_what_was_found():
    assert "70" in read_score(reply("[[70]]")).reason
    assert "no [[rating]]" in read_score(reply("seven")).reason


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("[[A]]", "A"),
        ("So [[B]].", "B"),
        ("[[C]]", "tie"),
        ("[[B]] it is, not [[A]]", "A"),
        ("[[C]] or [[B]]", "B"),
        ("[A]", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_a_verdict_is_looked_for_in_the_published_order(text, winner):
    read = read_winner(reply(text))
    assert isinstance(read, Unread) if winner is None else read == winner


def test_answers_are_sampled_at_the_published_temperatures():
    assert {
        **dict.fromkeys(("writing", "roleplay"), 0.7),
        **dict.fromkeys(("stem", "humanities"), 0.1),
        **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    } == TEMPERATURES
    assert len(QUESTIONS) == 3


@pytest.mark.real_data
@pytest.mark.parametrize("file", ["Stefanstud", "alvarobartt", "sarahlmk"])
def test_real_judge_prompts_are_equal_to_the_byte_and_real_replies_read_the_same(
    test_data, tmp_path, file
):
    folder, quarantine = test_data / "mt_bench", tmp_path / "quarantine.jsonl"
    bench = read_bench(find_files(folder), quarantine)
    by_id = {each.question_id: each for each in bench.questions}
    path = folder / "model_judgment" / f"{file}__gpt-4_single.jsonl"
    judged = read_records(path, SingleJudgment, quarantine=quarantine)
    model = judged[0].model
    answers, _ = read_answers(
        folder / "model_answer" / f"{model}.jsonl", model, bench.questions, "refuse", quarantine
    )
    turns = {row.question_id: row.turns for row in answers}
    for row in judged:
        shown = show_answer(bench, by_id[row.question_id], turns[row.question_id], row.turn)
        assert shown.user_prompt == row.user_prompt
        assert shown.prompt == row.judge[1]
        assert first_score(row.judgment) == row.score
    assert len(judged) == 160
    with (folder / "expected_scores.csv").open() as table:
        assert {each["model"] for each in csv.DictReader(table)} >= {model}
