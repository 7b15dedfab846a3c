"""The feedback stage from prompts to files, against a real HTTP server for candidates and judge."""

import json
import os
import re
from collections import Counter
from itertools import groupby

import pytest
from fake_server import FakeServer, Say, completion, error
from pydantic import ValidationError

from ledgers import ledger_rows
from starling.base.context import Context
from starling.base.errors import DataError, Stopped
from starling.base.jsonl import read_records
from starling.data.records import Message, RankingRow
from starling.feedback.config import Candidate, FeedbackInputs, FeedbackSection
from starling.feedback.run import _about as about_line
from starling.feedback.run import run
from starling.judging.config import JudgeSection
from starling.models import endpoint as endpoint_module


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_SECONDS", 0.001)


def prompt_rows(n):
    return [
        {
            "messages": [{"role": "user", "content": f"question {i}"}],
            "id": f"q{i}",
            "category": "math",
            "source": ["made here"],
            "checks": {"contains_any": ["right"]},
        }
        for i in range(n)
    ]


def answer(body, n):
    """What the fake models say: `good` is right, `bad` is wrong, `echo` always says the same."""
    asked = body["messages"][-1]["content"]
    if body["model"] == "judge":
        return Say(completion(judge_text(asked)))
    said = {
        "good": f"This is right for {asked}, no. {body['seed'] % 97}.",
        "bad": f"Wrong for {asked}, and long about it, with number {body['seed'] % 97}.",
        "echo": "The same words.",
    }
    return Say(completion(said[body["model"]]))


def read_rankings(folder):
    return read_records(folder / "out" / "rankings.jsonl", RankingRow, quarantine=folder / "bad")


def judge_text(asked):
    """Prefer what holds "right"; among equals the shorter; reads the fenced text alone."""
    shown = re.findall(r"<<answer ([A-Z]) [0-9a-f]{8}>>\n(.*?)\n<<end", asked, re.DOTALL)
    order = sorted(shown, key=lambda pair: ("right" not in pair[1], len(pair[1]), pair[1]))
    return f"Good-natured: yes\n[[{', '.join(repr(label) for label, _ in order)}]]"


CANDIDATES = (("good", 2), ("bad", 1))


def make_context():
    return Context(rank=0, world_size=1, device="cpu", threads=1, seed=7)


def stage(url, folder, *, rows=None, candidates=CANDIDATES, judge=None, stop=None, **fields):
    prompts = folder / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows or prompt_rows(6)))
    fields_context = fields.pop("context", None)
    section = FeedbackSection(
        prompts="prompts.jsonl",
        candidates=tuple(
            Candidate(name=f"from-{model}", model=model, url=url, answers=answers, concurrency=4)
            for model, answers in candidates
        ),
        batch=fields.pop("batch", 2),
        **fields,
    )
    inputs = FeedbackInputs(
        prompts=(prompts,),
        benchmarks=(),
        candidates=section.candidates,
        judge=judge or JudgeSection(url=url, model="judge"),
    )
    context = fields_context or make_context()
    if stop is not None:
        context.stop.signal_number = stop
    return run(section, inputs, folder / "out", context)


def test_prompts_become_rankings_in_order_with_all_their_columns(tmp_path):
    with FakeServer(answer) as server:
        summary = stage(server.url, tmp_path)
    rows = read_rankings(tmp_path)
    assert [row.id for row in rows] == [f"q{n}" for n in range(6)]
    for number, row in enumerate(rows):
        assert row.prompt == f"\n\nHuman: question {number}\n\nAssistant: "
        assert row.messages == (Message(role="user", content=f"question {number}"),)
        assert row.category == "math"
        assert row.source == ["made here"]
        assert row.checks == {"contains_any": ["right"]}
        assert row.good_natured is True
        assert (row.turns, row.num_responses) == (1, 3)
        assert [each.model for each in row.answers] == ["from-good", "from-good", "from-bad"]
        assert row.answers[2].rank == 3
        assert sorted(each.rank for each in row.answers[:2]) == [1, 2]
        assert {each.finish_reason for each in row.answers} == {"stop"}
    assert summary.figures["rankings"] == 6
    assert summary.figures["answers_per_prompt"] == 3
    assert summary.figures["unparsed"] == 0
    assert str(tmp_path / "out" / "rankings.jsonl") in summary.sentence


def test_answers_of_one_candidate_to_one_prompt_have_seeds_of_their_own(tmp_path):
    with FakeServer(answer) as server:
        stage(server.url, tmp_path)
    seeds = [call["seed"] for call in server.calls if call["model"] != "judge"]
    assert len(seeds) == 18
    assert len(set(seeds)) == 18


def test_the_judge_is_asked_once_per_prompt_and_never_shown_names_or_checks(tmp_path):
    with FakeServer(answer) as server:
        stage(server.url, tmp_path)
    asked = [json.dumps(call["messages"]) for call in server.calls if call["model"] == "judge"]
    assert len(asked) == 6
    assert not any("from-good" in text or "contains_any" in text for text in asked)


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(tmp_path):
    files = ("rankings.jsonl", "judgments.jsonl", "audit.json", "prompts.jsonl")
    with FakeServer(answer) as server:
        first = stage(server.url, tmp_path)
        before = [(tmp_path / "out" / name).read_bytes() for name in files]
        num_calls = len(server.calls)
        second = stage(server.url, tmp_path)
        assert len(server.calls) == num_calls
    assert [(tmp_path / "out" / name).read_bytes() for name in files] == before
    assert first == second
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "audit.json",
        "calls.sqlite",
        "judgments.jsonl",
        "prompts.jsonl",
        "rankings.jsonl",
    ]


def test_a_killed_stage_resumes_to_the_same_bytes_and_pays_only_for_calls_in_flight(tmp_path):
    with FakeServer(answer) as server:
        stage(server.url, tmp_path / "whole")
        whole_calls = Counter(json.dumps(call) for call in server.calls)

        child = os.fork()
        if child == 0:
            die_after_calls(server, tmp_path / "killed")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not (tmp_path / "killed" / "out" / "rankings.jsonl").exists()
        kept = ledger_rows(tmp_path / "killed" / "out" / "calls.sqlite")
        num_answered = sum(row["state"] == "answered" for row in kept)
        assert 0 < num_answered < 24

        server.calls.clear()
        stage(server.url, tmp_path / "killed")
        again = Counter(json.dumps(call) for call in server.calls)
    assert sum(again.values()) == 24 - num_answered
    assert not again - whole_calls
    for name in ("rankings.jsonl", "judgments.jsonl", "audit.json"):
        killed = (tmp_path / "killed" / "out" / name).read_bytes()
        assert killed == (tmp_path / "whole" / "out" / name).read_bytes()
    assert ledger_rows(tmp_path / "killed" / "out" / "calls.sqlite") == ledger_rows(
        tmp_path / "whole" / "out" / "calls.sqlite"
    )


def die_after_calls(server, folder):
    """Run the stage in this child until it has had eleven replies, then die without clean-up."""
    real, counted = endpoint_module.read_completion, []

    def counting(request, body):
        counted.append(request.id)
        if len(counted) > 11:
            os._exit(9)
        return real(request, body)

    endpoint_module.read_completion = counting
    stage(server.url, folder)
    os._exit(0)


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    left = tmp_path / "out" / ".tmp-123-rankings.jsonl"
    left.parent.mkdir()
    left.write_text("half a li")
    with FakeServer(answer) as server:
        stage(server.url, tmp_path)
    assert not left.exists()


def test_a_signal_stops_the_stage_after_the_call_that_is_being_stored(tmp_path):
    context = make_context()

    def script(body, n):
        # The third of 20 calls of the round's first candidate.
        if len(server.calls) == 3:
            context.stop.signal_number = 15
        return answer(body, n)

    with FakeServer(script) as server:
        with pytest.raises(Stopped):
            stage(server.url, tmp_path, rows=prompt_rows(20), batch=20, context=context)
        # What was in flight (4 at a time and candidate) was sent, not the round's 60 calls.
        assert len(server.calls) < 45
        num_kept = sum(
            row["state"] == "answered" for row in ledger_rows(tmp_path / "out" / "calls.sqlite")
        )
        assert num_kept >= 1
        context.stop.signal_number = None
        server.calls.clear()
        stage(server.url, tmp_path, rows=prompt_rows(20), batch=20)
        assert len(server.calls) <= 80 + 2 - num_kept
    assert len(read_rankings(tmp_path)) == 20


def test_a_signal_stops_the_stage_between_rounds(tmp_path):
    with FakeServer(answer) as server, pytest.raises(Stopped):
        stage(server.url, tmp_path, stop=15)
    assert not (tmp_path / "out" / "rankings.jsonl").exists()
    assert server.calls == []


def test_equal_answers_are_merged_and_a_prompt_with_one_distinct_answer_is_skipped(tmp_path):
    with FakeServer(answer) as server:
        summary = stage(server.url, tmp_path, candidates=(("echo", 3), ("good", 1)))
        assert summary.figures["answers_per_prompt"] == 2
        assert summary.figures["merged_answers"] == 12
        with pytest.raises(DataError, match="nothing to rank"):
            stage(server.url, tmp_path / "alike", candidates=(("echo", 3),))
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["candidates"]["merged"] == 12
    assert list(audit["models"]) == ["from-echo", "from-good"]


def test_verdicts_that_cannot_be_read_are_counted_up_to_the_allowed_share(tmp_path):
    def script(body, n):
        if body["model"] == "judge" and "question 3" in body["messages"][-1]["content"]:
            return Say(completion("I like them all."))
        return answer(body, n)

    with FakeServer(script) as server:
        summary = stage(server.url, tmp_path, allowed_failures=0.2)
        with pytest.raises(DataError, match=r"1 of 6 prompts.*could not be read"):
            stage(server.url, tmp_path / "strict", allowed_failures=0.1)
    assert summary.figures["unparsed"] == 1
    rows = read_rankings(tmp_path)
    assert [row.id for row in rows] == ["q0", "q1", "q2", "q4", "q5"]
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["judge"]["examples"][0]["id"] == "q3"
    assert not (tmp_path / "strict" / "out" / "rankings.jsonl").exists()


def test_a_judge_that_never_answers_is_not_asked_to_the_end(tmp_path):
    def script(body, n):
        return error(400, "too long") if body["model"] == "judge" else answer(body, n)

    with FakeServer(script) as server:
        with pytest.raises(DataError, match="2 of 6 prompts.*too long"):
            stage(server.url, tmp_path)
        assert sum(call["model"] == "judge" for call in server.calls) == 2


@pytest.mark.parametrize(
    ("allowed", "num_rows", "num_judged", "said"),
    [
        # The first round is of 64, whatever the others are; none of it has a ranking.
        (0.9, 200, 64, "64 of 200 prompts .* not one of the first 64 has one"),
        (0.1, 200, 64, "64 of 200 prompts"),
        (0.9, 16, 16, "16 of 16 prompts .* not one of the first 16 has one"),
    ],
)
def test_a_judge_that_never_answers_is_asked_64_times(
    tmp_path, allowed, num_rows, num_judged, said
):
    def script(body, n):
        return error(400, "too long") if body["model"] == "judge" else answer(body, n)

    fields = {"rows": prompt_rows(num_rows), "batch": None, "allowed_failures": allowed}
    with FakeServer(script) as server:
        with pytest.raises(DataError, match=said):
            stage(server.url, tmp_path, candidates=(("good", 1), ("bad", 1)), **fields)
        models = Counter(call["model"] for call in server.calls)
    assert models == dict.fromkeys(("good", "bad", "judge"), num_judged)


def test_a_small_round_without_a_ranking_ends_nothing_while_so_many_may_fail(tmp_path):
    def script(body, n):
        asked = body["messages"][-1]["content"]
        is_dead = body["model"] == "judge" and not re.search(r"question 1[5-9]", asked)
        return error(400, "too long") if is_dead else answer(body, n)

    with FakeServer(script) as server:
        rows = prompt_rows(20)
        summary = stage(server.url, tmp_path, rows=rows, batch=15, allowed_failures=0.8)
    assert summary.figures["rankings"] == 5


def test_a_round_without_a_ranking_ends_nothing_after_one_that_had_some(tmp_path):
    """Else a run whose judge refuses sixteen prompts in a row could never be finished."""

    def script(body, n):
        is_dead = body["model"] == "judge" and re.search(
            r"question (1[6-9]|2\d|3[01])\b", body["messages"][-1]["content"]
        )
        return error(400, "too long") if is_dead else answer(body, n)

    with FakeServer(script) as server:
        rows = prompt_rows(40)
        summary = stage(server.url, tmp_path, rows=rows, batch=16, allowed_failures=0.5)
    assert summary.figures["rankings"] == 24


def test_later_rounds_are_as_large_as_the_recipe_says(tmp_path):
    """Nothing of the third round is asked before the second, of 100, has been judged."""
    with FakeServer(answer) as server:
        rows = [row | {"answers": [{"answer": "No.", "model": "x"}]} for row in prompt_rows(170)]
        stage(server.url, tmp_path, rows=rows, batch=100, candidates=(("good", 1),), canaries=0)
    runs = [(m, len([*calls])) for m, calls in groupby(call["model"] for call in server.calls)]
    assert runs == [(model, size) for size in (64, 100, 6) for model in ("good", "judge")]


def test_a_judge_that_calls_everything_a_tie_teaches_nothing_and_fails_the_stage(tmp_path):
    def script(body, n):
        if body["model"] == "judge":
            return Say(completion("Good-natured: yes\nRating: [[7]]"))
        return answer(body, n)

    with FakeServer(script) as server:
        judge = JudgeSection(url=server.url, model="judge", strategy="pointwise")
        with pytest.raises(DataError, match="prefers no answer"):
            stage(server.url, tmp_path, judge=judge)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "calls.sqlite",
        "prompts.jsonl",
    ]


def test_the_judges_own_answers_are_those_of_its_model_at_its_address(tmp_path):
    with FakeServer(answer) as server, FakeServer(answer) as other:
        judge = JudgeSection(url=f"{server.url}/", model="good", strategy="kwise")
        candidates = tuple(
            Candidate(name=name, model=model, url=url)
            for name, model, url in [
                ("self", "good", server.url),
                ("namesake", "good", other.url),
                ("neighbour", "bad", server.url),
            ]
        )
        inputs = FeedbackInputs((), (), candidates, judge)
        about = about_line(inputs, {"kept": 3})
    assert about == {
        "judge": "good",
        "kind": "endpoint",
        "strategy": "kwise",
        "own": ["self"],
        "prompts": {"kept": 3},
    }


def test_a_failed_candidate_call_costs_one_answer_and_is_asked_again_by_the_next_run(tmp_path):
    broken = {"now": True}

    def script(body, n):
        if broken["now"] and body["model"] == "bad":
            return error(400, "no")
        return answer(body, n)

    with FakeServer(script) as server:
        summary = stage(server.url, tmp_path)
        assert summary.figures["answers_per_prompt"] == 2
        assert summary.figures["failed_answers"] == 6
        broken["now"] = False
        server.calls.clear()
        summary = stage(server.url, tmp_path)
    assert summary.figures["answers_per_prompt"] == 3
    # Six answers that were missing, and six comparisons that are others now.
    assert Counter(call["model"] for call in server.calls) == {"bad": 6, "judge": 6}


def test_prompts_left_without_two_answers_by_failures_count_as_failures(tmp_path):
    def script(body, n):
        return error(400, "no") if body["model"] != "good" else answer(body, n)

    with FakeServer(script) as server, pytest.raises(DataError, match="from-bad: .*400: .*no"):
        stage(server.url, tmp_path, candidates=(("good", 1), ("bad", 1)))


def read_judgments(folder):
    lines = (folder / "out" / "judgments.jsonl").read_text().splitlines()
    about, *rest = map(json.loads, lines)
    return about, rest


def test_every_prompt_has_a_line_of_what_the_judge_was_asked_and_said(tmp_path):
    def script(body, n):
        if body["model"] == "judge" and "question 2" in body["messages"][-1]["content"]:
            return Say(completion("I like them all."))
        if body["model"] == "bad" and "question 4" in body["messages"][-1]["content"]:
            return error(400, "no")
        return answer(body, n)

    with FakeServer(script) as server:
        stage(server.url, tmp_path, allowed_failures=0.2)
    about, lines = read_judgments(tmp_path)
    assert (about["judge"], about["own"]) == ("judge", [])
    assert about["prompts"]["kept"] == 6
    assert [each["id"] for each in lines] == [f"q{n}" for n in range(6)]
    assert [each["outcome"] for each in lines] == ["ranked"] * 2 + ["unparsed"] + ["ranked"] * 3
    assert "no ranking" in lines[2]["reason"]
    assert lines[2]["votes"][0]["text"] == "I like them all."
    assert [len(each["failed"]) for each in lines] == [0, 0, 0, 0, 1, 0]
    for row, each in zip(read_rankings(tmp_path), lines[:2] + lines[3:], strict=True):
        assert each["ranks"] == [answer.rank for answer in row.answers]
        [vote] = each["votes"]
        # The votes' ranks are by place; the row's by answer.
        assert [each["ranks"][index] for index in vote["presented"]] == vote["ranks"]
        assert vote["response_tokens"] > 0
        assert not {"seconds", "usd"} & set(vote)


def test_answers_that_stand_in_a_row_are_ranked_in_front_of_new_ones(tmp_path):
    rows = prompt_rows(3)
    for row in rows:
        row["answers"] = [{"answer": "This is right, and kept.", "model": "old", "rank": 4.0}]
    with FakeServer(answer) as server:
        stage(server.url, tmp_path / "both", rows=rows, candidates=(("bad", 1),))
        calls = len(server.calls)
        for row in rows:
            row["answers"].append({"answer": "Wrong.", "model": "older"})
        summary = stage(server.url, tmp_path / "alone", rows=rows, candidates=())
        # Only the judge was asked.
        assert len(server.calls) == calls + 3
    [row, *_] = read_rankings(tmp_path / "both")
    assert [(each.model, each.rank) for each in row.answers] == [("old", 1), ("from-bad", 2)]
    assert summary.figures["answers_per_prompt"] == 2


def test_only_free_places_are_asked_for_and_progress_expects_no_more(tmp_path, capsys):
    rows = prompt_rows(3)
    for row, number in zip(rows, (26, 24, 20), strict=True):
        row["answers"] = [{"answer": f"Number {n}.", "model": "old"} for n in range(number)]
    with FakeServer(answer) as server:
        stage(server.url, tmp_path, rows=rows, candidates=(("good", 3), ("bad", 2)), canaries=0)
    asked = Counter(
        (call["model"], call["messages"][-1]["content"][-1])
        for call in server.calls
        if call["model"] != "judge"
    )
    assert asked == {("good", "1"): 2, ("good", "2"): 3, ("bad", "2"): 2}
    assert [row.num_responses for row in read_rankings(tmp_path)] == [26, 26, 25]
    assert "feedback  10/10  100%" in capsys.readouterr().err


def test_progress_expects_no_ranking_of_fewer_than_two_answers(tmp_path, capsys):
    rows = prompt_rows(3)
    for row, texts in zip(rows, ("", "a", "ab"), strict=True):
        row["answers"] = [{"answer": text, "model": "old"} for text in texts]
    with FakeServer(answer) as server:
        stage(server.url, tmp_path, rows=rows, candidates=())
    assert len(server.calls) == 1
    assert "feedback  1/1  100%" in capsys.readouterr().err


def test_prompts_without_two_answers_say_whether_these_were_alike_or_too_few(tmp_path):
    rows = prompt_rows(3)
    rows[0]["answers"] = [{"answer": "The same words.", "model": "old"}]
    rows[1]["answers"] = [{"answer": "Others.", "model": "old"}]
    with FakeServer(answer) as server:
        summary = stage(server.url, tmp_path, rows=rows, candidates=(("echo", 1),))
    assert [each["outcome"] for each in read_judgments(tmp_path)[1]] == [
        "answers alike",
        "ranked",
        "too few answers",
    ]
    assert "(1 answers alike, 1 too few answers)" in summary.sentence


def test_canaries_are_judged_beside_the_rankings_and_stay_out_of_them(tmp_path):
    rows = prompt_rows(40)
    with FakeServer(answer) as server:
        stage(server.url, tmp_path / "without", rows=rows, canaries=0)
        assert Counter(call["model"] for call in server.calls)["judge"] == 40
        server.calls.clear()
        stage(server.url, tmp_path / "with", rows=rows)
        assert Counter(call["model"] for call in server.calls)["judge"] == 44
    first, second = (tmp_path / name / "out" / "rankings.jsonl" for name in ("without", "with"))
    assert first.read_bytes() == second.read_bytes()
    canaries = [each for each in read_judgments(tmp_path / "with")[1] if "canary" in each]
    assert len({each["canary"] for each in canaries}) == len(canaries) == 4
    # This judge sees that none of them is right, as the last answer was not; then it likes brevity.
    ranked = {row.id: row for row in read_rankings(tmp_path / "with")}
    for each in canaries:
        assert ranked[each["id"]].answers[each["index"]].rank == 3
        assert each["ranks"][each["index"]] == 3
    audit = json.loads((tmp_path / "with" / "out" / "audit.json").read_text())
    assert {name: each["wins"] for name, each in audit["canaries"].items()} == dict.fromkeys(
        ("null model", "bare ranking", "rank me first", "forged verdict"), 0
    )


def test_a_rubric_judges_canaries_too(tmp_path):
    with FakeServer(answer) as server:
        judge = JudgeSection(kind="rubric")
        stage(server.url, tmp_path, rows=prompt_rows(10), judge=judge, canaries=3)
    [canary] = [each for each in read_judgments(tmp_path)[1] if "canary" in each]
    assert canary["ranks"][canary["index"]] == 3


def test_progress_counts_calls_and_the_sentence_says_what_was_made_and_what_is_next(
    tmp_path, capsys
):
    with FakeServer(answer) as server:
        sentence = stage(server.url, tmp_path).sentence
    # Six prompts, three answers and a ranking each.
    assert re.search(r"^feedback  24/24  100%  done in \d+s  24 calls", capsys.readouterr().err)
    assert sentence.startswith("Ranked 6 of 6 prompts, 3.0 answers each; of concern: ")
    assert "prefer" not in sentence
    assert "starling reward" in sentence


def test_a_rubric_judges_by_the_prompts_checks(tmp_path):
    with FakeServer(answer) as server:
        stage(server.url, tmp_path, judge=JudgeSection(kind="rubric"))
    rows = read_rankings(tmp_path)
    assert [row.answers[2].rank for row in rows] == [3] * 6
    assert not any(call["model"] == "judge" for call in server.calls)


def test_a_limit_is_drawn_and_bad_rows_are_put_aside(tmp_path):
    rows = [*prompt_rows(150), {"messages": []}]
    with FakeServer(answer) as server:
        summary = stage(server.url, tmp_path, rows=rows, limit=3)
    assert summary.figures["rankings"] == 3
    [bad] = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad)["line"] == 151


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ((("good", 20), ("bad", 7)), "27 answer"),
        ((("good", 1), ("good", 1)), "stands twice"),
    ],
)
def test_candidates_that_cannot_be_ranked_are_refused_before_any_call(tmp_path, candidates, said):
    with FakeServer(answer) as server:
        with pytest.raises(ValidationError, match=said):
            stage(server.url, tmp_path, candidates=candidates)
        assert server.calls == []
