"""`starling mt-bench` against real servers: what it writes, refuses, retries and pays once."""

import csv
import json
import statistics

import pytest

from bench.mt_files import QUESTIONS, answer_row, answers_of, write_bench, write_lines
from models.fake_server import FakeServer, Say, completion, error
from starling.cli import main


@pytest.fixture
def data(tmp_path):
    return write_bench(tmp_path / "data", "one", "other")


def answers(data, model="one"):
    return data / "model_answer" / f"{model}.jsonl"


def rated(score):
    return Say(completion(f"Because. Rating: [[{score}]]"))


def by_category(body, n=0):
    """8 for writing, 2.5 for mathematics' first turn and 4 for its second, 6 for the rest."""
    asked = body["messages"][-1]["content"]
    if "2+2" in asked:
        return rated(4 if "3+3" in asked else 2.5)
    return rated(8 if "capitals" in asked or "{x}" in asked else 6)


def mt_bench(*arguments):
    return main(["mt-bench", *map(str, arguments)])


def judged(server, data, out, *more):
    judge = ("--judge-url", server.url, "--judge-model", "gpt-4", "--out", out)
    return mt_bench("--data", data, "--answers", answers(data), *judge, *more)


def scores(out):
    return json.loads((out / "scores.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_scores_are_flat_means_by_turn_and_category(data, tmp_path, capsys):
    with FakeServer(by_category) as server:
        assert judged(server, data, tmp_path / "out") == 0
    found = scores(tmp_path / "out")
    # 8 8, 2.5 4, 6 6 over three questions of two turns.
    assert found["average"] == pytest.approx(34.5 / 6, abs=1e-12)
    assert found["turn1"] == pytest.approx(16.5 / 3, abs=1e-12)
    assert found["turn2"] == pytest.approx(18 / 3, abs=1e-12)
    assert found["categories"] == {"writing": 8.0, "math": 3.25, "stem": 6.0}
    assert (found["n"], found["failed"], found["duplicates"]) == (6, 0, 0)
    assert found["estimates"]["average"]["n"] == 6
    # "one one {y}" and "one two", three times.
    assert found["length"]["characters"]["mean"] == 9.0
    assert found["length"]["words"]["mean"] == 2.5
    assert "tokens" not in found["length"]
    assert found["stamp"]["judge"] == "gpt-4"
    assert found["stamp"]["references"] == "official"
    shown = capsys.readouterr()
    assert "5.75" in shown.out
    assert "failed" in shown.out
    assert "6 judgments by gpt-4" in shown.err
    assert "MT-Bench, one" in (tmp_path / "out" / "results.md").read_text()


def test_a_call_is_as_published_and_needs_no_key(data, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeServer(by_category) as server:
        assert judged(server, data, tmp_path / "out") == 0
    assert len(server.calls) == 6
    for body in server.calls:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4", 0.0, 2048)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_files_go_both_ways(data, tmp_path):
    """What is written has FastChat's columns, and is read again by the same command."""
    with FakeServer(by_category) as server:
        judged(server, data, tmp_path / "out")
    rows = lines(tmp_path / "out" / "model_judgment" / "gpt-4_single.jsonl")
    assert set(rows[0]) == {
        *("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"),
        "served_by",
    }
    assert scores(tmp_path / "out")["stamp"]["judge_versions"] == ["m"]
    assert rows[0]["judge"] == ["gpt-4", "single-v1"]
    assert [(row["question_id"], row["turn"], row["score"]) for row in rows] == [
        *((81, 1, 8), (81, 2, 8), (111, 1, 2.5), (111, 2, 4), (141, 1, 6), (141, 2, 6))
    ]
    assert isinstance(rows[0]["score"], int)  # as FastChat writes whole scores
    copied = lines(tmp_path / "out" / "model_answer" / "one.jsonl")
    assert copied == lines(answers(data))
    again = tmp_path / "again"
    judgments = tmp_path / "out" / "model_judgment" / "gpt-4_single.jsonl"
    assert mt_bench("--data", data, "--judgments", judgments, "--out", again) == 0
    first, second = scores(tmp_path / "out"), scores(again)
    for name in ("average", "turn1", "turn2", "categories", "n", "failed", "stamp"):
        assert second[name] == first[name]


def test_the_same_command_again_asks_nothing_and_writes_the_same_bytes(data, tmp_path, capsys):
    out = tmp_path / "out"
    with FakeServer(by_category) as server:
        judged(server, data, out)
        before = {path: path.read_bytes() for path in out.rglob("*.json*")}
        judged(server, data, out)
        assert len(server.calls) == 6
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before
    assert "6 replies from the ledger, 0 new" in capsys.readouterr().err


def test_the_order_of_questions_is_the_files(data, tmp_path):
    rows = lines(answers(data))
    write_lines(answers(data), rows[::-1])
    with FakeServer(by_category) as server:
        judged(server, data, tmp_path / "out")
    judgments = lines(tmp_path / "out" / "model_judgment" / "gpt-4_single.jsonl")
    assert [row["question_id"] for row in judgments[::2]] == [81, 111, 141]


def test_an_unreadable_reply_is_asked_for_again_with_another_seed(data, tmp_path):
    def script(body, n):
        second = "3+3" in body["messages"][-1]["content"]
        return rated(70) if second and n < 2 else by_category(body)

    with FakeServer(script) as server:
        assert judged(server, data, tmp_path / "out") == 0
    found = scores(tmp_path / "out")
    assert (found["n"], found["failed"]) == (6, 0)
    assert found["categories"]["math"] == 3.25
    assert len(server.calls) == 8
    seeds = [call["seed"] for call in server.calls if "3+3" in call["messages"][-1]["content"]]
    assert len(set(seeds)) == 3


def test_what_stays_unreadable_is_failed_and_never_averaged(data, tmp_path, capsys):
    def script(body, n):
        return rated(70) if "3+3" in body["messages"][-1]["content"] else by_category(body)

    out = tmp_path / "out"
    with FakeServer(script) as server:
        assert judged(server, data, out) == 2
        said = capsys.readouterr().err
        assert "1 of 6 judgments failed" in said
        assert "70" in said
        assert not (out / "scores.json").exists()
        rows = lines(out / "model_judgment" / "gpt-4_single.jsonl")
        assert [row["score"] for row in rows if row["question_id"] == 111] == [2.5, -1]
        num_calls = len(server.calls)
        assert judged(server, data, out, "--allowed-failures", "0.2") == 0
        assert len(server.calls) == num_calls
    found = scores(out)
    assert (found["n"], found["failed"]) == (5, 1)
    assert found["average"] == pytest.approx((8 + 8 + 2.5 + 6 + 6) / 5, abs=1e-12)
    # Not the mean of the two turns, since one of them lost a row.
    assert found["categories"]["math"] == 2.5
    assert found["estimates"]["categories"]["math"]["num_failed"] == 1
    assert "1 without a score; the first: question 111, turn 2" in capsys.readouterr().out


def test_like_fastchat_averages_what_the_published_tool_would(data, tmp_path):
    def script(body, n):
        asked = body["messages"][-1]["content"]
        return (
            Say(completion("no verdict")) if "3+3" in asked else rated(70 if "2+2" in asked else 4)
        )

    with FakeServer(script) as server:
        assert judged(server, data, tmp_path / "out", "--like-fastchat") == 0
        assert len(server.calls) == 6
    found = scores(tmp_path / "out")
    assert found["average"] == pytest.approx((70 + 4 * 4) / 5, abs=1e-12)
    assert (found["n"], found["failed"]) == (5, 1)
    assert found["stamp"]["rule"] == "FastChat's"


def test_a_judge_that_never_answers_ends_it_early(tmp_path, capsys, monkeypatch):
    from starling.models import endpoint

    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.001)
    questions = [QUESTIONS[2] | {"question_id": n} for n in range(30)]
    data = write_bench(tmp_path / "data")
    write_lines(data / "question.jsonl", questions)
    write_lines(answers(data), [answer_row("one", n, ["a", "b"]) for n in range(30)])
    with FakeServer(lambda body, n: error(500, "down")) as server:
        assert judged(server, data, tmp_path / "out", "--concurrency", 4) == 2
    assert len(server.calls) < 60 * 6
    assert "none of the first 16 calls was answered" in capsys.readouterr().err


def test_rounds_show_the_judges_noise(data, tmp_path):
    def script(body, n):
        return rated(5 + 2 * n) if "mass" in body["messages"][-1]["content"] else rated(5)

    with FakeServer(script) as server:
        assert judged(server, data, tmp_path / "out", "--repeats", 3) == 0
        assert len(server.calls) == 18
    found = scores(tmp_path / "out")
    averages = [5, 5 + 4 / 6, 5 + 8 / 6]
    assert found["repeats"]["averages"] == pytest.approx(averages, abs=1e-12)
    assert found["repeats"]["average_sd"] == pytest.approx(statistics.stdev(averages), abs=1e-12)
    # Two of six answers vary as 5, 7, 9 do; the others not at all.
    assert found["repeats"]["judgment_sd"] == pytest.approx((2 * 4 / 6) ** 0.5, abs=1e-12)
    assert found["average"] == pytest.approx(statistics.mean(averages), abs=1e-12)
    assert found["n"] == 18


def test_canaries_are_rated_on_demand_and_count_for_nothing(data, tmp_path, capsys):
    def script(body, n):
        honest = "one one" in body["messages"][-1]["content"]
        return by_category(body) if honest else rated(9)

    with FakeServer(script) as server:
        assert judged(server, data, tmp_path / "without") == 0
        assert len(server.calls) == 6
        assert "No canaries were asked about" in capsys.readouterr().out
        assert judged(server, data, tmp_path / "with", "--canaries") == 0
        assert len(server.calls) == 6 + 6 + 1
    assert "Canaries: 1 of 1 cheating answers got the mean score" in capsys.readouterr().out
    found, without = scores(tmp_path / "with"), scores(tmp_path / "without")
    assert found["average"] == without["average"]
    assert (found["canaries"]["asked"], found["canaries"]["won"]) == (1, 1.0)
    assert found["canaries"]["highest"] == 9.0
    assert without["canaries"] is None


def refused(data, tmp_path, capsys, *more, model="one"):
    """What is said where nothing was asked."""
    with FakeServer(by_category) as server:
        judge = ("--judge-url", server.url, "--out", tmp_path / "out")
        assert mt_bench("--data", data, "--answers", answers(data, model), *judge, *more) == 2
        assert server.calls == []
    return capsys.readouterr().err


def test_a_missing_question_is_refused_by_name(data, tmp_path, capsys):
    write_lines(answers(data), answers_of("one")[:2])
    said = refused(data, tmp_path, capsys)
    assert "one has no answer to 1 of 3 questions: 141" in said


def test_an_extra_model_is_refused_until_one_is_chosen(data, tmp_path, capsys):
    write_lines(answers(data), answers_of("one") + answers_of("other"))
    assert "holds answers of one, other; choose one with --model" in refused(data, tmp_path, capsys)
    assert "no answers of 'neither', but of one, other" in refused(
        data, tmp_path, capsys, "--model", "neither"
    )
    with FakeServer(by_category) as server:
        assert judged(server, data, tmp_path / "out", "--model", "other") == 0
    assert scores(tmp_path / "out")["stamp"]["model"] == "other"
    assert all("other one" in call["messages"][-1]["content"] for call in server.calls)


def test_answers_with_one_turn_are_refused(data, tmp_path, capsys):
    rows = answers_of("one")
    rows[1]["choices"][0]["turns"] = ["only one"]
    write_lines(answers(data), rows)
    assert "question 111 has 2 turns, and one's answer to it 1" in refused(data, tmp_path, capsys)


def test_duplicated_answers_are_refused_or_resolved_by_name(data, tmp_path, capsys):
    twice = answer_row("one", 81, ["the later", "one"])
    write_lines(answers(data), [*answers_of("one"), twice])
    assert "more than one answer of one to question 81" in refused(data, tmp_path, capsys)
    for rule, expected in (("first", "one one {y}"), ("last", "the later")):
        out = tmp_path / rule
        with FakeServer(by_category) as server:
            assert judged(server, data, out, "--duplicates", rule) == 0
        assert lines(out / "model_answer" / "one.jsonl")[0]["choices"][0]["turns"][0] == expected
        assert scores(out)["duplicates"] == 1
    with FakeServer(by_category) as server:
        assert judged(server, data, tmp_path / "like", "--like-fastchat") == 0
    [first, *_] = lines(tmp_path / "like" / "model_answer" / "one.jsonl")
    assert first["choices"][0]["turns"][0] == "the later"


def test_a_file_half_written_is_refused_with_its_line(data, tmp_path, capsys):
    path = answers(data)
    path.write_bytes(path.read_bytes()[:-40])
    said = refused(data, tmp_path, capsys)
    assert "line 3" in said
    assert "broken JSON" in said


def test_blank_lines_are_no_rows(data, tmp_path):
    path = answers(data)
    path.write_text("\n\n" + path.read_text().replace("\n", "\r\n\n") + "\n")
    with FakeServer(by_category) as server:
        assert judged(server, data, tmp_path / "out") == 0
    assert scores(tmp_path / "out")["n"] == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which questions? Give --data DIR"),
        (("--data", "DATA"), "whose answers? Give --answers FILE, or --policy"),
        (("--data", "DATA", "--answers", "FILE"), "who judges? Give --judge-url"),
        (("--data", "nowhere", "--answers", "FILE", "--plan"), "there is no folder nowhere"),
        (("--data", "hf://models/x", "--answers", "FILE", "--plan"), "names no folder on the hub"),
        (("--data", "DATA", "--answers", "nothing.jsonl", "--plan"), "nothing.jsonl"),
        (("--data", "DATA", "--answers", "FILE", "--plan", "--repeats", "0"), "--repeats is 0"),
        (
            ("--data", "DATA", "--answers", "FILE", "--judge-url", "nonsense"),
            "--judge-url: found 'nonsense'; it must look like http://localhost:8000/v1",
        ),
        (
            ("--data", "DATA", "--answers", "FILE", "--judge-url", "http://me:secret@host/v1"),
            "--judge-url: it holds a user name or password",
        ),
        (
            ("--data", "DATA", "--answers", "FILE", "--judge-url", "http://x/v1", "--out", "FILE"),
            "cannot write to the folder",
        ),
        (
            ("--data", "DATA", "--answers", "FILE", "--plan", "--max-usd", "3"),
            "--max-usd needs the judge's price",
        ),
        (
            ("--data", "DATA", "--answers", "FILE", "--policy", "x", "--plan"),
            "give --answers or --policy, not both",
        ),
        (
            ("--data", "DATA", "--answers", "FILE", "--plan", "--mode", "pairwise"),
            "give the answers of at least two",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(data, capsys, arguments, said):
    named = {"DATA": str(data), "FILE": str(answers(data))}
    assert mt_bench(*(named.get(word, word) for word in arguments)) == 2
    assert said in capsys.readouterr().err


def test_a_folder_keeps_the_results_of_one_model(data, tmp_path, capsys):
    out = tmp_path / "out"
    with FakeServer(by_category) as server:
        judged(server, data, out)
        before = (out / "scores.json").read_bytes()
        judge = ("--judge-url", server.url, "--out", out)
        assert mt_bench("--data", data, "--answers", answers(data, "other"), *judge) == 2
        assert len(server.calls) == 6
    assert "holds the results of one, and this is other" in capsys.readouterr().err
    assert (out / "scores.json").read_bytes() == before


def test_a_plan_asks_nothing_and_writes_nothing(data, tmp_path, capsys):
    out = tmp_path / "out"
    price = ("--usd-per-million", "30", "60")
    assert mt_bench("--data", data, "--answers", answers(data), "--out", out, "--plan", *price) == 0
    # Six replies of 2048 tokens at most, at 60 dollars a million, and a little to read.
    assert "6 judgments by gpt-4" in (said := capsys.readouterr().out)
    assert "at most about $0.74" in said
    assert not out.exists()


def test_money_is_capped_and_what_was_bought_is_kept(data, tmp_path, capsys):
    out = tmp_path / "out"

    def script(body, n):
        return Say(completion("[[5]]", prompt_tokens=10**6, response_tokens=10))

    cap = ("--usd-per-million", "1", "1", "--max-usd", "2.5", "--concurrency", "1")
    with FakeServer(script) as server:
        assert judged(server, data, out, *cap) == 2
        assert len(server.calls) == 3
        assert "a cap is reached" in capsys.readouterr().err
        assert judged(server, data, out, *cap[:3]) == 0
        assert len(server.calls) == 6


def judgment(question_id, turn, score, model="one", judge="gpt-4", **more):
    return {
        "question_id": question_id,
        "model": model,
        "judge": [judge, "single-v1"],
        "user_prompt": "",
        "judgment": "",
        "score": score,
        "turn": turn,
        "tstamp": 1700000000.0,
    } | more


def all_judgments(score=6):
    return [judgment(row["question_id"], turn, score) for row in QUESTIONS for turn in (1, 2)]


def counted(data, tmp_path, rows, *more):
    path = write_lines(tmp_path / "judgments.jsonl", rows)
    status = mt_bench("--data", data, "--judgments", path, "--out", tmp_path / "out", *more)
    return status, scores(tmp_path / "out") if status == 0 else None


def test_duplicated_judgments_are_refused_resolved_or_averaged_as_fastchat_does(
    data, tmp_path, capsys
):
    rows = [*all_judgments(), judgment(81, 1, 9), judgment(81, 1, 3)]
    assert counted(data, tmp_path, rows)[0] == 2
    assert (
        "more than one judgment of question, turn and round (81, 1, 0)" in capsys.readouterr().err
    )
    for more, average in (
        (("--duplicates", "first"), 6),
        (("--duplicates", "last"), (5 * 6 + 3) / 6),
        (("--like-fastchat",), (6 * 6 + 9 + 3) / 8),
    ):
        _, found = counted(data, tmp_path, rows, *more)
        assert found["average"] == pytest.approx(average, abs=1e-12)
        assert found["duplicates"] == 2


def test_a_judgment_file_with_holes_says_so(data, tmp_path, capsys):
    assert counted(data, tmp_path, all_judgments())[0] == 0
    rows = all_judgments()[:-1]
    assert counted(data, tmp_path, rows)[0] == 2
    # The earlier score is not left lying as if it were these judgments'.
    assert not (tmp_path / "out" / "scores.json").exists()
    assert not (tmp_path / "out" / "results.md").exists()
    assert "question 141, turn 2: it was not judged" in capsys.readouterr().err
    _, found = counted(data, tmp_path, rows, "--allowed-failures", "0.5")
    assert (found["n"], found["failed"]) == (5, 1)
    failed = [*rows, judgment(141, 2, -1, judgment="$ERROR$")]
    _, found = counted(data, tmp_path, failed, "--allowed-failures", "0.5")
    assert (found["n"], found["failed"], found["average"]) == (5, 1, 6.0)


def test_scores_off_the_scale_are_failures_and_fractions_are_kept(data, tmp_path, capsys):
    rows = all_judgments(7.25)
    rows[0]["score"] = 70
    assert counted(data, tmp_path, rows)[0] == 2
    assert "the score is 70, and the scale is from 1 to 10" in capsys.readouterr().err
    _, found = counted(data, tmp_path, rows, "--allowed-failures", "0.5")
    assert (found["average"], found["failed"]) == (7.25, 1)
    _, found = counted(data, tmp_path, rows, "--like-fastchat")
    assert found["average"] == pytest.approx((5 * 7.25 + 70) / 6, abs=1e-12)


def test_judgments_of_others_are_told_apart(data, tmp_path, capsys):
    rows = [*all_judgments(), judgment(81, 1, 1, model="other")]
    assert counted(data, tmp_path, rows)[0] == 2
    assert "judgments of one, other; choose one with --model" in capsys.readouterr().err
    assert counted(data, tmp_path, rows, "--model", "one")[1]["average"] == 6
    rows = [
        *all_judgments(),
        *(row | {"judge": ["gpt-3", "single-v1"]} for row in all_judgments(2)),
    ]
    _, found = counted(data, tmp_path, rows)
    assert (found["average"], found["stamp"]["judge"]) == (6, "gpt-4")
    assert counted(data, tmp_path, rows, "--judge-model", "gpt-3")[1]["average"] == 2
    assert counted(data, tmp_path, rows, "--judge-model", "gpt-2")[0] == 2
    assert "judgments by gpt-3, gpt-4; choose one" in capsys.readouterr().err
    assert counted(data, tmp_path, [judgment(7, 1, 5)])[0] == 2
    assert "judgments of questions 7, which question.jsonl does not hold" in capsys.readouterr().err


def test_judgments_of_one_model_are_not_put_beside_anothers_answers(data, tmp_path, capsys):
    rows = all_judgments()
    assert counted(data, tmp_path, rows, "--answers", answers(data, "other"))[0] == 2
    assert "the judgments are of one, and the answers of other" in capsys.readouterr().err
    _, found = counted(data, tmp_path, rows, "--answers", answers(data))
    assert found["length"]["words"]["mean"] == 2.5


def first_seat(body, n=0):
    return Say(completion("[[A]]"))


def pairwise(server, data, out, *more):
    files = (answers(data, "one"), answers(data, "other"))
    judge = ("--judge-url", server.url, "--out", out, "--mode", "pairwise")
    return mt_bench("--data", data, "--answers", *files, *judge, *more)


def test_a_judge_that_always_prefers_the_first_seat_makes_ties_only(data, tmp_path, capsys):
    with FakeServer(first_seat) as server:
        assert pairwise(server, data, tmp_path / "out") == 0
        assert len(server.calls) == 12
    found = scores(tmp_path / "out")
    assert found["models"]["one"]["tie"] == 6
    assert found["models"]["one"]["win_rate_adjusted"]["mean"] == 0.5
    assert (found["first_seat"], found["inconsistent"]) == (1.0, 1.0)
    assert "the first seat wins 100%" in capsys.readouterr().out


def test_wins_losses_and_ties_are_counted_over_both_orders(data, tmp_path):
    def script(body, n):
        asked = body["messages"][-1]["content"]
        first = asked.index("one two" if "one two" in asked else "one one")
        second = asked.index("other two" if "other two" in asked else "other one")
        if "mass" in asked:
            return Say(completion("[[C]]"))
        if "2+2" in asked and "3+3" not in asked:
            return Say(completion("who knows"))
        wanted = first if "{x}" in asked else second
        return Say(completion("[[A]]" if wanted == min(first, second) else "[[B]]"))

    with FakeServer(script) as server:
        assert pairwise(server, data, tmp_path / "out", "--allowed-failures", "0.3") == 0
    found = scores(tmp_path / "out")
    one = found["models"]["one"]
    # Writing won twice, mathematics' second turn lost and its first unread, mass tied twice.
    assert (one["win"], one["loss"], one["tie"], one["failed"]) == (2, 1, 2, 1)
    assert one["win_rate_adjusted"]["mean"] == pytest.approx(3 / 5, abs=1e-12)
    assert found["models"]["other"]["win_rate_adjusted"]["mean"] == pytest.approx(2 / 5, abs=1e-12)
    assert (found["n"], found["failed"]) == (5, 1)
    rows = lines(tmp_path / "out" / "model_judgment" / "gpt-4_pair.jsonl")
    assert {row["g1_winner"] for row in rows if row["question_id"] == 81} == {"model_1"}
    assert rows[0]["g1_user_prompt"] != rows[0]["g2_user_prompt"]
    votes = lines(tmp_path / "out" / "votes.jsonl")
    assert [vote["winner"] for vote in votes] == ["model_a"] * 2 + ["model_b"] + ["tie"] * 2
    again = tmp_path / "again"
    judgments = tmp_path / "out" / "model_judgment" / "gpt-4_pair.jsonl"
    more = ("--mode", "pairwise", "--allowed-failures", "0.3", "--out", again)
    assert mt_bench("--data", data, "--judgments", judgments, *more) == 0
    assert scores(again)["models"] == found["models"]


def test_two_files_of_one_model_are_no_pair(data, tmp_path, capsys):
    files = (answers(data), answers(data))
    judge = ("--judge-url", "http://localhost:1/v1", "--out", tmp_path / "out")
    assert mt_bench("--data", data, "--answers", *files, *judge, "--mode", "pairwise") == 2
    assert "two of the answers files are of 'one'" in capsys.readouterr().err


def test_with_a_baseline_only_its_pairs_are_asked_about(data, tmp_path):
    write_lines(answers(data, "third"), answers_of("third"))
    files = [answers(data, name) for name in ("one", "other", "third")]
    for more, calls in (((), 36), (("--baseline", "other"), 24)):
        with FakeServer(first_seat) as server:
            judge = ("--judge-url", server.url, "--mode", "pairwise", *more)
            out = tmp_path / f"out{calls}"
            assert mt_bench("--data", data, "--answers", *files, *judge, "--out", out) == 0
            assert len(server.calls) == calls


def test_a_served_policy_answers_at_its_temperatures_on_top_of_its_own_answers(data, tmp_path):
    def policy(body, n):
        return Say(completion(f"  answer {len(body['messages'])}  \n"))

    out = tmp_path / "out"
    with FakeServer(policy) as answering, FakeServer(by_category) as server:
        who = ("--policy", "mine", "--policy-url", answering.url)
        judge = ("--judge-url", server.url, "--out", out)
        assert mt_bench("--data", data, *who, *judge) == 0
        assert mt_bench("--data", data, *who, *judge) == 0
        assert (len(answering.calls), len(server.calls)) == (6, 6)
    heats = {call["messages"][0]["content"]: call["temperature"] for call in answering.calls}
    assert heats == {"Write {x}.": 0.7, "What is 2+2?": 0.0, "What is mass?": 0.1}
    assert {call["max_tokens"] for call in answering.calls} == {1024}
    [second, *_] = [call for call in answering.calls if len(call["messages"]) == 3]
    assert second["messages"][1] == {"role": "assistant", "content": "answer 1"}
    rows = lines(out / "model_answer" / "mine.jsonl")
    assert rows[0]["choices"][0] == {
        "index": 0,
        "turns": ["answer 1", "answer 3"],
        "tokens": [3, 3],
    }
    assert scores(out)["length"]["tokens"]["mean"] == 3
    # The answers are FastChat's, and can be judged from the file.
    file = out / "model_answer" / "mine.jsonl"
    with FakeServer(by_category) as server:
        judge = ("--judge-url", server.url, "--out", tmp_path / "from-file")
        assert mt_bench("--data", data, "--answers", file, *judge) == 0
    assert scores(tmp_path / "from-file")["average"] == scores(out)["average"]


def test_a_policy_folder_answers_here(data, tmp_path, policy_folder):
    out = tmp_path / "out"
    with FakeServer(by_category) as server:
        who = ("--policy", policy_folder, "--device", "cpu", "--model", "tiny")
        judge = ("--judge-url", server.url, "--out", out)
        assert mt_bench("--data", data, *who, *judge) == 0
        before = (out / "model_answer" / "tiny.jsonl").read_bytes()
        assert mt_bench("--data", data, *who, *judge) == 0
        assert len(server.calls) == 6
    assert (out / "model_answer" / "tiny.jsonl").read_bytes() == before
    rows = lines(out / "model_answer" / "tiny.jsonl")
    assert [row["question_id"] for row in rows] == [81, 111, 141]
    assert all(len(row["choices"][0]["turns"]) == 2 for row in rows)


@pytest.mark.real_data
@pytest.mark.parametrize("model", ["phi-3-dpo", "mistral-orpo-trl", "functionary"])
def test_a_server_that_replays_gpt_4_gives_the_published_scores(test_data, tmp_path, model):
    folder = test_data / "mt_bench"
    recorded = {
        row["user_prompt"]: row["judgment"]
        for path in (folder / "model_judgment").glob("*.jsonl")
        for row in lines(path)
    }

    def replay(body, n):
        text = recorded.get(body["messages"][-1]["content"])
        return error(400, "an unknown prompt") if text is None else Say(completion(text))

    out = tmp_path / "out"
    with FakeServer(replay) as server:
        file = folder / "model_answer" / f"{model}.jsonl"
        judge = ("--judge-url", server.url, "--judge-model", "gpt-4", "--out", out)
        assert mt_bench("--data", folder, "--answers", file, *judge) == 0
        assert len(server.calls) == 160
    with (folder / "expected_scores.csv").open() as table:
        [expected] = [row for row in csv.DictReader(table) if row["model"] == model]
    found = scores(out)
    for name in ("turn1", "turn2", "average"):
        assert found[name] == pytest.approx(float(expected[name]), abs=1e-9)
    assert len(found["categories"]) == 8
    for name, value in found["categories"].items():
        assert value == pytest.approx(float(expected[name]), abs=1e-9)
    assert (found["n"], found["failed"]) == (160, 0)
