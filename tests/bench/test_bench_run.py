"""The benchmark on scripted answers: every figure counted again from answers.jsonl."""

import json
import math
from collections import defaultdict

import pytest
import torch

from starling.base.context import single_process_context
from starling.base.errors import DataError
from starling.base.jsonl import write_records
from starling.bench import run as bench
from starling.bench.answers import Contestant, yardstick
from starling.bench.config import BenchInputs, BenchSection
from starling.bench.scores import category_figures, ratings, score_figures, win_rate
from starling.data.records import Question
from starling.judging.config import JudgeSection
from starling.judging.judge import Ranking, Rating, Unparsed, Vote
from starling.models.interfaces import Failure, Reply, Usage
from starling.models.reward_model import RewardModel
from tiny import tiny_policy_folder, tiny_reward_folder

ANIMALS = ("cat", "dog", "hen", "cow")


def questions():
    """Two turns each; the right answers are the animal and, after it, its plural."""
    return [
        Question(
            id=f"q-{animal}",
            category="pets" if animal in ("cat", "dog") else "farm",
            turns=(f"Name a {animal}.", "And two?"),
            checks=(
                {"contains_all": [animal], "max_words": 4},
                {"contains_all": [f"{animal}s"], "max_words": 4},
            ),
        )
        for animal in ANIMALS
    ]


class Script:
    """Answers by the animal, the turn and the temperature; remembers what it was asked."""

    identity = "script"
    commits_together = True

    def __init__(self, lines):
        self.lines = lines
        self.asked = []

    def respond(self, requests):
        # Last one first: nothing may depend on the order in which replies come.
        for request in reversed(list(requests)):
            self.asked.append(request)
            (animal,) = (a for a in ANIMALS if a in request.messages[0].content)
            turn = len(request.messages) // 2
            text = self.lines(animal, turn, request.sampling.temperature == 0)
            finish = "length" if text.endswith("...") else "stop"
            yield Reply(request.id, text, finish, Usage(9, len(text.split()) + 1))


def before(animal, turn, greedy):
    """Right for cats only; at length when sampled."""
    if animal == "cat":
        return "Sure, a cat." if turn == 0 else "Two cats."
    return "well um I guess that is something..." if not greedy else "No."


def after(animal, turn, greedy):
    """Right but for cows; the same words as before on the cat's first turn."""
    if animal == "cow":
        return "No."
    if animal == "cat" and turn == 0:
        return "Sure, a cat."
    return f"Gladly, two {animal}s." if turn else f"Gladly, a {animal}."


def write_questions(path):
    write_records(path, questions())
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished stage: its folder, summary, the two scripts and the rows of answers.jsonl."""
    folder = tmp_path_factory.mktemp("bench")
    scripts = {"base": Script(before), "new": Script(after)}
    inputs = BenchInputs(
        write_questions(folder / "questions.jsonl"),
        "base",
        "new",
        None,
        JudgeSection(kind="rubric"),
    )
    section = BenchSection(questions="questions.jsonl", max_tokens=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "load_local", lambda reference, _device, **_: scripts[reference])
        summary = bench.run(section, inputs, folder, single_process_context(1, seed=0))
    rows = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    return folder, summary, scripts, rows


def average(numbers):
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def chosen(rows, policy, decoding, **fields):
    return [
        row
        for row in rows
        if row["policy"] == policy
        and row["decoding"] == decoding
        and all(row[key] == value for key, value in fields.items())
    ]


def test_every_answer_is_kept_with_what_it_answers(finished):
    _, _, _, rows = finished
    # Four questions, two turns, two policies, two decodings.
    assert len(rows) == 32
    assert {row["split"] for row in rows} == {"bench"}
    (row,) = chosen(rows, "ppo", "greedy", id="q-dog", turn=2)
    assert row["answer"] == "Gladly, two dogs."
    assert row["messages"] == [
        {"role": "user", "content": "Name a dog."},
        {"role": "assistant", "content": "Gladly, a dog."},
        {"role": "user", "content": "And two?"},
    ]


def test_the_second_turn_is_asked_on_top_of_the_policys_own_answer(finished):
    _, _, scripts, _ = finished
    for script, lines in ((scripts["base"], before), (scripts["new"], after)):
        second = [request for request in script.asked if len(request.messages) == 3]
        assert len(second) == 8
        for request in second:
            (animal,) = (a for a in ANIMALS if a in request.messages[0].content)
            greedy = request.sampling.temperature == 0
            assert request.messages[1].content == lines(animal, 0, greedy)


def test_both_policies_draw_the_same_numbers_and_turns_different_ones(finished):
    _, _, scripts, _ = finished
    drawn = [
        {(r.id, len(r.messages)): r.sampling for r in script.asked if r.sampling.temperature}
        for script in scripts.values()
    ]
    assert drawn[0] == drawn[1]
    assert len({sampling.seed for sampling in drawn[0].values()}) == 8
    assert {sampling.temperature for sampling in drawn[0].values()} == {1.0}
    assert {sampling.max_tokens for sampling in drawn[0].values()} == {12}


def test_gold_stands_beside_each_answer_by_part(finished):
    _, _, _, rows = finished
    (row,) = chosen(rows, "ppo", "sampled", id="q-dog", turn=1)
    # Right, kind, plain and in form, and three words of four.
    good = row["gold"]
    assert (good["correctness"], good["brevity"]) == (1.0, 1.0)
    assert good["style"] > 0.8
    (row,) = chosen(rows, "sft", "sampled", id="q-dog", turn=1)
    # Wrong, cut (no brevity, half of the style), three fillers.
    bad = row["gold"]
    assert (bad["correctness"], bad["brevity"]) == (0.0, 0.0)
    assert bad["style"] < 0.3
    for gold in (good, bad):
        parts = 0.5 * gold["correctness"] + 0.35 * gold["style"] + 0.15 * gold["brevity"]
        assert gold["total"] == pytest.approx(parts)


@pytest.mark.parametrize("part", ["total", "correctness", "style", "brevity"])
@pytest.mark.parametrize("decoding", ["sampled", "greedy"])
def test_gold_figures_are_means_over_the_answers_on_disk(finished, part, decoding):
    _, summary, _, rows = finished
    name = "gold" if part == "total" else f"gold_{part}"
    name += "" if decoding == "sampled" else "_greedy"
    for policy in ("sft", "ppo"):
        figure = summary.figures[name][policy]
        own = chosen(rows, policy, decoding)
        assert figure["mean"] == pytest.approx(average(row["gold"][part] for row in own))
        assert figure["n"] == 8
        assert figure["low"] <= figure["mean"] <= figure["high"]


def test_correctness_can_be_counted_from_the_answers_text(finished):
    _, summary, _, rows = finished
    wanted = {f"q-{animal}": (animal, f"{animal}s") for animal in ANIMALS}
    for policy, expected in (("sft", 2 / 8), ("ppo", 6 / 8)):
        own = chosen(rows, policy, "greedy")
        share = average(
            wanted[row["id"]][row["turn"] - 1] in row["answer"].strip(".").split() for row in own
        )
        assert share == expected
        assert summary.figures["gold_correctness_greedy"][policy]["mean"] == pytest.approx(share)


def test_tokens_are_those_of_sampled_answers(finished):
    _, summary, _, rows = finished
    for policy in ("sft", "ppo"):
        own = chosen(rows, policy, "sampled")
        assert summary.figures["tokens_per_answer"][policy]["mean"] == pytest.approx(
            average(len(row["answer"].split()) + 1 for row in own)
        )


def test_scores_are_the_noiseless_judges_ratings_on_a_scale_of_one_to_ten(finished):
    folder, summary, _, rows = finished
    for policy in ("sft", "ppo"):
        own = chosen(rows, policy, "sampled")
        expected = [round(1 + 9 * row["gold"]["total"], 1) for row in own]
        assert summary.figures["score"][policy]["mean"] == pytest.approx(average(expected))
        for turn in (1, 2):
            part = [s for s, row in zip(expected, own, strict=True) if row["turn"] == turn]
            figure = summary.figures[f"score_turn_{turn}"][policy]
            assert figure["mean"] == pytest.approx(average(part))
            assert (figure["n"], figure["num_failed"]) == (4, 0)
    judgments = [json.loads(line) for line in (folder / "judgments.jsonl").open()]
    assert len(judgments) == 16


def test_the_win_rate_counts_better_gold_as_a_win_and_the_same_answer_as_half(finished):
    _, summary, _, rows = finished
    gold = defaultdict(dict)
    for row in rows:
        if row["decoding"] == "sampled":
            gold[row["id"], row["turn"]][row["policy"]] = row
    wins = []
    for sides in gold.values():
        old, new = sides["sft"], sides["ppo"]
        if old["answer"] == new["answer"]:
            wins.append(0.5)
        else:
            wins.append(float(new["gold"]["total"] > old["gold"]["total"]))
    assert 0.5 in wins
    assert summary.figures["win_rate"]["mean"] == pytest.approx(average(wins))
    assert summary.figures["win_rate"]["n"] == 8


def test_categories_hold_the_same_figures_of_their_own_questions(finished):
    _, summary, _, rows = finished
    assert set(summary.figures["by_category"]) == {"pets", "farm"}
    for category, figures in summary.figures["by_category"].items():
        for policy in ("sft", "ppo"):
            own = chosen(rows, policy, "sampled", category=category)
            assert len(own) == 4
            mean = average(row["gold"]["total"] for row in own)
            assert figures["gold"][policy]["mean"] == pytest.approx(mean)
    whole = summary.figures["win_rate"]["mean"]
    parts = [figures["win_rate"]["mean"] for figures in summary.figures["by_category"].values()]
    assert average(parts) == pytest.approx(whole)


def test_scores_json_is_the_summary(finished):
    folder, summary, _, _ = finished
    assert json.loads((folder / "scores.json").read_text()) == json.loads(
        json.dumps(summary.figures)
    )


class ScriptedJudge:
    """Ranks by a function of the two answers, rates by one of the answer; None is no verdict."""

    def __init__(self, rank=None, rate=None):
        self._rank, self._rate = rank, rate

    def rank(self, comparisons):
        for comparison in comparisons:
            ranks = self._rank(comparison)
            yield (
                Unparsed(comparison.id, "it said nothing", "")
                if ranks is None
                else Ranking(comparison.id, ranks, ())
            )

    def rate(self, answers):
        for answer in answers:
            score = self._rate(answer)
            yield (
                Unparsed(answer.id, "it said nothing", "")
                if score is None
                else Rating(answer.id, score, "")
            )


def answered(lines_after=after, decodings=("sampled",)):
    """The answers of both policies."""
    return [
        answer
        for name, lines in (("sft", before), ("ppo", lines_after))
        for decoding in decodings
        for answer in Contestant(name, decoding, Script(lines), 12, 0).answer(questions())
    ]


def test_a_tie_of_the_judge_is_half_a_win_and_ranks_are_read_as_better_when_lower():
    verdicts = {"q-cat": (1, 1), "q-dog": (2, 1), "q-hen": (2, 1), "q-cow": (1, 2)}

    def rank(comparison):
        return verdicts[comparison.id.split("/")[1]]

    def other(animal, turn, greedy):
        return f"another {animal} {turn}"

    estimate, rows = win_rate(
        answered(lines_after=other), ScriptedJudge(rank), seed=0, allowed_failures=0.0
    )
    by_question = {(row["id"], row["turn"]): row["win"] for row in rows}
    assert by_question == {
        (question, turn): win
        for question, win in (("q-cat", 0.5), ("q-dog", 1.0), ("q-hen", 1.0), ("q-cow", 0.0))
        for turn in (1, 2)
    }
    assert estimate["mean"] == pytest.approx(0.625)


def test_seats_that_disagree_are_half_a_win_and_are_counted():
    def other(animal, turn, greedy):
        return f"another {animal} {turn}"

    class SeatJudge(ScriptedJudge):
        """Prefers the first seat, but for dogs the policy's answer in both."""

        def rank(self, comparisons):
            for each in comparisons:
                first = (2, 1) if "q-dog" in each.id else (1, 2)
                votes = (Vote((0, 1), "", first), Vote((1, 0), "", (1, 2)))
                yield Ranking(each.id, (1, 2), votes)

    answers = answered(lines_after=other)
    estimate, rows = win_rate(answers, SeatJudge(), seed=0, allowed_failures=0.0)
    assert estimate["mean"] == pytest.approx((1.0 + 3 * 0.5) / 4)
    assert (estimate["wins"], estimate["ties"], estimate["losses"]) == (2, 6, 0)
    # Six comparisons of eight disagree; the first seat has 14 of 16 calls.
    assert (estimate["inconsistent"], estimate["first_seat"]) == (6 / 8, 14 / 16)
    assert {row["win"] for row in rows if row["id"] == "q-dog"} == {1.0}


def test_each_turn_is_compared_after_the_baselines_conversation():
    seen = {}

    def rank(comparison):
        seen[comparison.id] = comparison
        return (1, 2)

    win_rate(answered(), ScriptedJudge(rank), seed=0, allowed_failures=0.0)
    comparison = seen["win/q-dog/2"]
    assert comparison.messages[1].content == before("dog", 0, False)
    assert comparison.answers == (before("dog", 1, False), after("dog", 1, False))
    assert comparison.finished == (False, True)
    # The same words need no judge.
    assert "win/q-cat/1" not in seen


def test_failed_verdicts_are_counted_and_left_out_of_the_mean():
    def rate(answer):
        return None if "q-cow" in answer.id else 4.0

    answers = answered()
    read = ratings(answers, ScriptedJudge(rate=rate), allowed_failures=0.25)
    assert len(read) == 12
    figure = score_figures(read, answers, 0)["score"]["ppo"]
    assert (figure["mean"], figure["n"], figure["num_failed"]) == (4.0, 6, 2)

    def rank(comparison):
        return None if "q-cow" in comparison.id else (2, 1)

    estimate, _ = win_rate(answers, ScriptedJudge(rank), seed=0, allowed_failures=0.25)
    # Five wins and the cat's half.
    assert (estimate["n"], estimate["num_failed"]) == (6, 2)
    assert estimate["mean"] == pytest.approx(5.5 / 6)


def test_more_failures_than_allowed_leave_no_score():
    def nothing(_):
        return None

    def one(answer):
        return None if answer.id == "ppo/q-cow/1" else 5.0

    answers = answered()
    with pytest.raises(DataError, match=r"1 of 16 ratings failed.*ppo/q-cow/1: it said nothing"):
        ratings(answers, ScriptedJudge(rate=one), allowed_failures=0.06)
    assert len(ratings(answers, ScriptedJudge(rate=one), allowed_failures=0.0625)) == 15
    with pytest.raises(DataError, match="7 of 8 comparisons failed"):
        win_rate(answers, ScriptedJudge(nothing), seed=0, allowed_failures=0.5)


def test_no_verdict_at_all_is_refused_whatever_is_allowed():
    def nothing(_):
        return None

    def other(animal, turn, greedy):
        return f"another {animal} {turn}"

    answers = answered(lines_after=other)
    with pytest.raises(DataError, match="16 of 16 ratings failed"):
        ratings(answers, ScriptedJudge(rate=nothing), allowed_failures=1.0)
    with pytest.raises(DataError, match="8 of 8 comparisons failed"):
        win_rate(answers, ScriptedJudge(nothing), seed=0, allowed_failures=1.0)


def test_a_category_without_a_single_rating_has_no_score_and_the_others_keep_theirs():
    def rate(answer):
        return None if "q-cow" in answer.id or "q-hen" in answer.id else 4.0

    answers = answered(decodings=("sampled", "greedy"))
    read = ratings(answers, ScriptedJudge(rate=rate), allowed_failures=0.5)
    figures = category_figures(answers, read, [], 0)
    assert figures["pets"]["score"]["ppo"]["mean"] == 4.0
    assert "score" not in figures["farm"]
    assert figures["farm"]["gold"]["ppo"]["n"] == 4


def test_a_question_that_got_no_answer_ends_the_stage():
    class Broken(Script):
        def respond(self, requests):
            for request in requests:
                yield Failure(request.id, "the server is gone")

    with pytest.raises(DataError, match="no answer to q-cat: the server is gone"):
        Contestant("sft", "sampled", Broken(before), 12, 0).answer(questions())


def test_questions_that_share_an_id_are_refused():
    twice = [*questions(), questions()[0]]
    with pytest.raises(DataError, match="q-cat"):
        Contestant("sft", "sampled", Script(before), 12, 0).answer(twice)


class Words(RewardModel):
    """Scores an answer by its number of words, and not at all when it was cut."""

    def score(self, items):
        return torch.tensor(
            [
                float(len(item.messages[-1].content.split())) if item.finished else -1.0
                for item in items
            ]
        )


def test_best_of_keeps_the_answer_that_the_reward_model_scores_highest():
    own = Contestant("sft", "sampled", Script(before), 12, 0).answer(questions())
    lines = {0: "one", 1: "one two three", 2: "one two", 3: "one two three four five..."}

    class Numbered(Script):
        def respond(self, requests):
            for request in reversed(list(requests)):
                self.asked.append(request)
                text = lines[int(request.id.split("/")[1])]
                finish = "length" if text.endswith("...") else "stop"
                yield Reply(request.id, text, finish, Usage(1, 7))

    script = Numbered(before)
    contestant = Contestant("sft", "sampled", script, 12, 0)
    best = yardstick(own, contestant, object.__new__(Words), samples=4)
    assert [answer.answer for answer in best] == ["one two three"] * 8
    assert {answer.policy for answer in best} == {"best_of_4"}
    assert {answer.tokens for answer in best} == {7}
    # Each stands on the baseline's own conversation, with a seed of its own.
    assert [answer.messages for answer in best] == [answer.messages for answer in own]
    assert len({request.sampling.seed for request in script.asked}) == 32


def test_a_run_on_models_from_disk_has_the_yardstick_beside_the_policies(tmp_path):
    base = tiny_policy_folder(tmp_path / "base")
    policy = tiny_policy_folder(tmp_path / "policy", seed=1)
    reward = tiny_reward_folder(tmp_path / "reward", base)
    inputs = BenchInputs(
        write_questions(tmp_path / "questions.jsonl"),
        str(base),
        str(policy),
        str(reward),
        JudgeSection(kind="rubric", noise=0.1),
    )
    section = BenchSection(questions="questions.jsonl", max_tokens=4, best_of=2)
    summary = bench.run(section, inputs, tmp_path / "out", single_process_context(1, seed=0))
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    best = chosen(rows, "best_of_2", "sampled")
    assert len(best) == 8
    figure = summary.figures["gold_best_of"]
    assert figure["samples"] == 2
    assert figure["mean"] == pytest.approx(average(row["gold"]["total"] for row in best))
