"""The audit finds what is wrong with a judge, leaves a fair one alone, and claims no more."""

import json
import random
import re
from collections import defaultdict
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from starling.base.errors import DataError
from starling.data.nectar import dedup_key, write_nectar
from starling.data.records import Answer, Message, Prompt, RankedAnswer, RankingRow
from starling.feedback.audit import as_text, audit, audit_file, chi_square, critical_99
from starling.feedback.prompts import merge_duplicates
from starling.feedback.tallies import places, shares_of_win, tau_of_votes
from starling.judging.judge import Comparison
from starling.judging.llm_judge import LlmJudge
from starling.judging.rubric_responder import RubricResponder

ASKED = (Message(role="user", content="?"),)


def row(id, texts, ranks, *, models=None, finish_reason="stop", **fields):
    models = models or [f"m{n}" for n in range(len(texts))]
    answers = tuple(
        RankedAnswer(answer=text, model=model, rank=rank, finish_reason=finish_reason)
        for text, model, rank in zip(texts, models, ranks, strict=True)
    )
    messages = (Message(role="user", content=f"What about {id}?"),)
    return RankingRow(messages=messages, answers=answers, id=id, **fields)


def vote(presented, ranks, **fields):
    return {"presented": presented, "ranks": ranks, "text": "said", **fields}


def line(id, *votes, outcome="ranked", **fields):
    counts = {"failed": [], "empty": 0, "merged": 0, "dropped": 0}
    return {"id": id, "outcome": outcome, "votes": list(votes), **counts, **fields}


def canary(kind, ranks, index=0):
    return {"canary": kind, "id": "a", "index": index, "ranks": ranks, "votes": []}


def means(places, name):
    return [place[name]["mean"] for place in places.values()]


def some_rows(n=3):
    return [row(f"r{i}", ["x", "yy"], [1.0, 2.0]) for i in range(n)]


def findings(report, name):
    return [each for each in report["findings"] if each["name"] == name]


def only(report, name):
    [finding] = findings(report, name)
    return finding


def test_chi_square_is_pearsons():
    # (10-20)^2/20 + (20-20)^2/20 + (30-20)^2/20 = 5 + 0 + 5
    assert chi_square([10, 20, 30]) == pytest.approx(10.0)
    assert chi_square([7, 7, 7, 7]) == 0.0


@pytest.mark.parametrize(
    # From the printed tables of the chi-square distribution, upper 1 %.
    ("degrees", "tabled"),
    [(1, 6.635), (2, 9.210), (3, 11.345), (6, 16.812), (10, 23.209), (25, 44.314)],
)
def test_the_critical_value_is_the_tables_to_a_hundredth_of_itself(degrees, tabled):
    assert critical_99(degrees) == pytest.approx(tabled, rel=0.01)


@given(ranks=st.lists(st.integers(1, 4) | st.none(), min_size=2, max_size=7))
def test_places_are_scipys_average_ranks_with_the_unranked_last(ranks):
    expected = stats.rankdata([99 if rank is None else rank for rank in ranks], method="average")
    assert places(ranks) == pytest.approx(expected.tolist())


def test_tied_winners_share_the_win():
    assert shares_of_win([1, 1, 2, None]) == [0.5, 0.5, 0.0, 0.0]


@given(first=st.permutations(range(1, 6)), second=st.permutations(range(1, 6)))
def test_two_votes_agree_as_scipys_kendall_tau_says(first, second):
    # The second vote was shown the answers in reverse: places, not answers, are in its lists.
    votes = [vote([0, 1, 2, 3, 4], first), vote([4, 3, 2, 1, 0], second[::-1])]
    assert [*tau_of_votes(votes)] == pytest.approx([stats.kendalltau(first, second).statistic])


def test_votes_on_pairs_agree_where_both_orders_name_one_winner():
    # Pair (0, 1): both orders agree, +1. Pair (0, 2): they do not, -1. Pair (1, 2): asked once.
    votes = [vote([0, 1], [1, 2]), vote([1, 0], [2, 1]), vote([0, 2], [1, 2]), vote([2, 0], [1, 2])]
    assert [*tau_of_votes([*votes, vote([1, 2], [1, 2])])] == [0.0]
    assert [*tau_of_votes(votes[:2])] == [1.0]
    assert [*tau_of_votes(votes[:1])] == []


def judged(*, position_bias, noise=0.3, n=300):
    """What a rubric judge makes of four equally good answers, n times."""
    texts = ("It is 4.", "It is  4.", " It is 4.", "It is 4. ")
    judge = LlmJudge(
        RubricResponder(1, noise, position_bias), seed=1, max_tokens=9, temperature=0.0
    )
    comparisons = [Comparison(f"q{i}", ASKED, texts, {"contains_any": ["4"]}) for i in range(n)]
    rows, lines = [], []
    for verdict in judge.rank(comparisons):
        rows.append(row(verdict.id, texts, [float(rank) for rank in verdict.ranks]))
        votes = [vote(list(v.presented), list(v.ranks)) for v in verdict.votes]
        lines.append(line(verdict.id, *votes))
    return audit(rows, lines)


def test_a_judge_that_prefers_the_first_position_is_found_out():
    report = judged(position_bias=0.4)
    [table] = report["positions"].values()
    assert (len(table["places"]), table["verdicts"]) == (4, 300)
    assert table["is_biased"] is True
    assert table["chi_square"] > table["critical_99"]
    shares = means(table["places"], "winner_share")
    assert shares[0] > shares[3]
    ranks = means(table["places"], "mean_rank")
    assert ranks == sorted(ranks)
    finding = only(report, "position")
    assert finding["is_concern"]
    assert f"place 1 in {shares[0]:.1%} [" in finding["sentence"]
    assert finding["advice"]


def test_a_fair_judge_is_not_accused():
    report = judged(position_bias=0.0)
    [table] = report["positions"].values()
    assert table["is_biased"] is False
    assert sum(means(table["places"], "winner_share")) == pytest.approx(1.0)
    # Three standard errors of a quarter of 300.
    assert all(abs(mean - 0.25) < 0.075 for mean in means(table["places"], "winner_share"))
    assert not only(report, "position")["is_concern"]


def test_few_verdicts_are_said_to_be_few_however_one_sided():
    # Five winners expected at each of 4 places need 20 verdicts; here are 19.
    lines = [line(f"r{n}", vote([0, 1, 2, 3], [1, 2, 3, 4])) for n in range(19)]
    report = audit(some_rows(), lines)
    assert report["positions"]["4"]["is_biased"] is None
    assert "too few" in only(report, "position")["sentence"]
    assert audit(some_rows(), [*lines, lines[0]])["positions"]["4"]["is_biased"] is True


def test_positions_are_those_shown_and_each_number_of_answers_has_its_table():
    lines = [
        # Answer 1 won and stood first; then answer 0 won and stood last.
        line("a", vote([1, 0], [1, 2])),
        line("b", vote([1, 0], [2, 1])),
        line("c", vote([2, 0, 1], [2, 3, 1])),
        # A rating has no place to prefer, and what could not be read no ranks.
        line("d", {"presented": [0], "score": 7.0, "text": ""}),
        line("e", {"presented": [0, 1], "reason": "no", "text": ""}, outcome="unparsed", reason=""),
    ]
    positions = audit(some_rows(), lines)["positions"]
    assert list(positions) == ["2", "3"]
    two, three = (table["places"] for table in positions.values())
    assert positions["2"]["verdicts"] == 2
    assert (means(two, "winner_share"), means(two, "mean_rank")) == ([0.5, 0.5], [1.5, 1.5])
    assert means(three, "winner_share") == [0.0, 0.0, 1.0]
    assert means(three, "mean_rank") == [2.0, 3.0, 1.0]


def test_ten_places_stand_in_their_order():
    report = audit(some_rows(), [line("a", vote(list(range(10)), list(range(1, 11))))])
    assert means(report["positions"]["10"]["places"], "mean_rank") == list(range(1, 11))


def test_length_counts_pairs_of_different_rank_and_length():
    # Lengths 1, 2, 2, 4; ranks 2, 1, 3, 3.  Pairs: (1,2) longer wins; (1,2') shorter wins;
    # (1,4) shorter wins; (2,2') equally long; (2,4) shorter wins; (2',4) tied.
    report = audit([row("a", ["w", "xx", "yy", "zzzz"], [2.0, 1.0, 3.0, 3.0])])
    assert report["all"]["longer_wins"]["mean"] == pytest.approx(1 / 4)
    assert report["all"]["longer_wins"]["n"] == 4
    assert report["pairs"] == {"ordered": 5, "tied": 1}


def test_an_unranked_answer_is_worse_than_a_ranked_one_and_not_tied_with_another():
    report = audit([row("a", ["www", "xx", "y"], [1.0, None, None])])
    assert report["all"]["longer_wins"] == pytest.approx(
        {"mean": 1.0, "low": None, "high": None, "n": 2, "num_failed": 0}
    )
    assert report["pairs"] == {"ordered": 2, "tied": 0}
    # They won nothing, which is known; their place among those after the ranked ones is not.
    assert "mean_rank" not in report["models"]["m1"]
    assert report["models"]["m1"]["win_share"]["mean"] == 0.0
    assert "m1" in as_text(report)
    more = row("b", ["www", "xx"], [2.0, 1.0], good_natured=True)
    unranked = row("c", ["www", "xx", "y"], [None, 1.0, 2.0], good_natured=True)
    models = audit([row("a", ["www", "xx", "y"], [1.0, None, None]), more, unranked])["models"]
    means = [models["m0"][name] for name in ("mean_rank", "mean_rank_good_natured", "win_share")]
    assert [(each["n"], each["num_failed"]) for each in means] == [(2, 1), (1, 1), (3, 0)]
    assert [models["m1"]["mean_rank"][name] for name in ("n", "num_failed")] == [2, 1]
    assert models["m0"]["mean_rank"]["mean"] == 1.5


def test_a_fifth_of_length_is_among_the_answers_of_one_prompt():
    # Five answers, one in each fifth, in another prompt all ten times longer; the longest won.
    texts = ["x" * n for n in (1, 2, 3, 4, 5)]
    ranks = [5.0, 4.0, 3.0, 2.0, 1.0]
    rows = [row("a", texts, ranks), row("b", [text * 10 for text in texts], ranks)]
    fifths = audit(rows)["length"]
    assert list(fifths) == [f"{n} of 5" for n in range(1, 6)]
    assert means(fifths, "mean_rank") == [5, 4, 3, 2, 1]
    assert means(fifths, "win_share") == [0, 0, 0, 0, 1]
    # Of two answers the shorter is in the second fifth, the longer in the fourth.
    two = audit([row("a", ["x", "yy"], [1.0, 2.0])])["length"]
    assert (list(two), means(two, "mean_rank")) == (["2 of 5", "4 of 5"], [1, 2])


@pytest.mark.parametrize(("best", "sign"), [(0, "shorter"), (1, "longer")])
def test_length_that_decides_is_of_concern_whichever_way(best, sign):
    rng = random.Random(0)
    rows = []
    for n in range(200):
        first = best if rng.random() < 0.75 else 1 - best
        rows.append(row(str(n), ["x", "yy"], [1.0 + (first == 1), 1.0 + (first == 0)]))
    finding = only(audit(rows), "length")
    assert finding["is_concern"]
    assert finding["sentence"].startswith(f"The {sign} of two answers")
    # Sixty of a hundred is no longer surely above 0.6: the interval has to be.
    even = [row(str(n), ["x", "yy"], [1.0, 2.0] if n % 5 < 2 else [2.0, 1.0]) for n in range(100)]
    assert not only(audit(even), "length")["is_concern"]


def test_mean_rank_by_model_counts_every_answer_and_is_split_by_good_nature():
    rows = [
        row(
            "a", ["x", "yy", "z"], [1.0, 2.0, 3.0], models=["old", "new", "new"], good_natured=True
        ),
        row("b", ["x", "yy"], [2.0, 1.0], models=["old", "new"], good_natured=False),
        row("c", ["x", "yy"], [1.0, 2.0], models=["old", "new"]),
    ]
    models = audit(rows)["models"]
    assert list(models) == ["new", "old"]
    assert models["new"]["mean_rank"]["mean"] == pytest.approx((2 + 3 + 1 + 2) / 4)
    assert models["new"]["mean_rank"]["n"] == 4
    assert models["new"]["win_share"]["mean"] == pytest.approx(1 / 4)
    assert models["new"]["mean_rank_good_natured"]["mean"] == pytest.approx(2.5)
    assert models["old"]["mean_rank_not_good_natured"]["mean"] == 2.0
    assert models["old"]["mean_rank_good_natured"]["n"] == 1


def test_models_are_called_best_and_worst_only_as_far_as_their_intervals_part():
    def rows(share):
        ranks = [[1.0, 2.0] if n < share * 100 else [2.0, 1.0] for n in range(100)]
        return [row(str(n), ["x", "y"], each, models=["p", "q"]) for n, each in enumerate(ranks)]

    assert "overlap" not in only(audit(rows(0.8)), "models")["sentence"]
    assert "p is the best" in only(audit(rows(0.8)), "models")["sentence"]
    assert "overlap" in only(audit(rows(0.52)), "models")["sentence"]
    alike = only(audit(rows(0.5)), "models")["sentence"]
    assert alike.startswith("The 2 frequent models have the same mean rank, 1.50 [1.4")
    assert "best" not in alike
    # One answer of a brilliant model makes it none of the frequent ones.
    rare = row("rare", ["x", "y", "z"], [2.0, 3.0, 1.0], models=["p", "q", "rare"])
    assert "rare" not in only(audit([*rows(0.8), rare]), "models")["sentence"]


@pytest.mark.parametrize("about", [{"own": ["q"], "judge": "x"}, {"own": [], "judge": "q"}])
def test_a_judge_that_puts_its_own_answers_first_is_named(about):
    rows = [
        row(str(n), ["x", "y", "z"], [3.0, 1.0, 2.0] if n % 4 else [1.0, 2.0, 3.0], models="pqr")
        for n in range(40)
    ]
    finding = only(audit(rows, [about]), "own answers")
    assert finding["is_concern"]
    assert "(q) at 1.25" in finding["sentence"]
    # (2.5 + 2.25) / 2
    assert "others at 2.38" in finding["sentence"]
    assert not findings(audit(rows, [{"own": [], "judge": "another"}]), "own answers")


def test_sources_and_categories_have_figures_of_their_own():
    rows = [
        row("a", ["x", "yy"], [1.0, 2.0], source=["s", "t"], category="math", good_natured=True),
        row("b", ["x", "yy"], [2.0, 1.0], source=["s"], good_natured=False),
    ]
    report = audit(rows)
    assert report["sources"]["s"]["rankings"] == 2
    assert report["sources"]["s"]["longer_wins"]["mean"] == 0.5
    assert report["sources"]["t"]["longer_wins"]["mean"] == 0.0
    assert report["categories"]["math"]["good_natured"]["mean"] == 1.0
    assert list(report["categories"]) == ["math"]


def test_good_nature_is_of_those_that_were_told():
    natures = [True, True, False, None]
    rows = [row(str(n), ["x", "y"], [1.0, 2.0], good_natured=g) for n, g in enumerate(natures)]
    report = audit(rows)
    assert report["all"]["good_natured"]["mean"] == pytest.approx(2 / 3)
    assert report["all"]["good_natured"]["n"] == 3
    assert report["all"]["good_natured"]["num_failed"] == 1
    assert "of 3 conversations" in only(report, "good-natured")["sentence"]


def test_everything_that_was_left_out_is_counted():
    lines = [
        {"judge": "j", "own": []},
        line("a", vote([0, 1], [1, 2]), merged=1, empty=2),
        line("b", vote([0], None, reason="?"), outcome="unparsed", reason="no ranking", dropped=4),
        line("c", outcome="too few answers", failed=["m: gone", "m: the model refused: no"]),
        line("d", outcome="answers alike", merged=2),
    ]
    cut = row(
        "a", ["I'm sorry, but I can't help with that.", "y"], [1.0, 2.0], finish_reason="length"
    )
    report = audit([cut], lines)
    expected = {"ranked": 1, "unparsed": 1, "too few answers": 1, "answers alike": 1}
    assert report["outcomes"] == expected
    # Of the two prompts that the judge was asked about.
    assert report["judge"]["unparsed"]["mean"] == 0.5
    assert report["judge"]["examples"] == [{"id": "b", "reason": "no ranking", "text": "said"}]
    assert report["candidates"] == {"merged": 3, "empty": 2, "dropped": 4, "failed": 2}
    assert report["failures"] == {"m: gone": 1, "m: the model refused: no": 1}
    answers = report["answers"]
    assert [answers[name] for name in ("given", "truncated", "refused")] == [2, 2, 1]
    assert report["models"]["m0"]["refused"] == 1
    assert answers["refusals"][0]["id"] == "a"


def test_duplicate_prompts_and_answers_are_counted():
    rows = [row("a", ["x", "x ", "y"], [1.0, 2.0, 3.0]), row("b", ["x", "y"], [1.0, 2.0])]
    again = rows[1].model_copy(
        update={"id": "c", "messages": (Message(role="user", content="what  ABOUT b!"),)}
    )
    report = audit([*rows, again])
    assert (report["all"]["repeated_prompts"], report["answers"]["repeated"]) == (1, 1)
    finding = only(report, "duplicates")
    assert finding["is_concern"]
    assert not only(audit(rows), "duplicates")["is_concern"]
    # What it advises does what it says.
    assert "duplicates: nectar makes one prompt of those" in finding["advice"]
    asked = [
        Prompt(id=each.id, messages=each.messages, answers=(Answer(answer=text, model="m"),))
        for each, text in ((rows[1], "one"), (again, "other"))
    ]
    [made], _, _ = merge_duplicates(asked, dedup_key)
    assert [each.answer for each in made.answers] == ["one", "other"]


NEAR = [[1, 2, 3], [2, 1, 3], [1, 3, 2], [1, 2, 3]]


def test_agreement_is_that_of_the_votes_and_low_agreement_is_of_concern():
    rng = random.Random(0)
    noisy = [
        line(str(n), *(vote([0, 1, 2], rng.sample([1, 2, 3], 3)) for _ in range(3)), agreement=0.4)
        for n in range(100)
    ]
    report = audit(some_rows(), noisy)
    assert report["judge"]["kendall_w"]["mean"] == pytest.approx(0.4)
    assert report["judge"]["kendall_tau"]["mean"] == pytest.approx(0.0, abs=0.1)
    assert only(report, "agreement")["is_concern"]
    sure = [line(str(n), *(vote([0, 1, 2], [1, 2, 3]) for _ in range(3))) for n in range(100)]
    assert not only(audit(some_rows(), sure), "agreement")["is_concern"]
    # Fair, Kendall's tau of about two in three: below always, above what is too little.
    fair = [
        line(str(n), *(vote([0, 1, 2], ranks) for ranks in ([1, 2, 3], rng.choice(NEAR))))
        for n in range(300)
    ]
    report = audit(some_rows(), fair)
    assert report["judge"]["kendall_tau"]["low"] > 0.55
    assert report["judge"]["kendall_tau"]["high"] < 0.8
    assert not only(report, "agreement")["is_concern"]
    assert not findings(audit(some_rows(), [line("a", vote([0, 1], [1, 2]))]), "agreement")


@pytest.mark.parametrize(
    ("about", "position", "agreement"),
    [
        ({"judge": "gpt"}, "judge.strategy kwise-repeated or pairwise", "a stronger judge"),
        ({"judge": "gpt", "strategy": "kwise-repeated"}, "judge.repeats", "judge.repeats"),
        ({"judge": "gpt", "strategy": "pairwise"}, "a stronger judge", "a stronger judge"),
        ({"judge": "logits", "strategy": "kwise"}, "cancels", "cancels"),
        ({"judge": "x", "kind": "logits", "strategy": "kwise"}, "cancels", "cancels"),
        (
            {"judge": "logits", "kind": "endpoint", "strategy": "pairwise"},
            "a stronger judge",
            "a stronger judge",
        ),
    ],
)
def test_no_judge_is_told_to_do_what_it_does_or_what_its_recipe_refuses(about, position, agreement):
    lines = [line(str(n), vote([0, 1], [1, 2]), vote([1, 0], [1, 2])) for n in range(100)]
    lines += [line(str(n), outcome="unparsed", reason="?") for n in range(100)]
    report = audit(some_rows(), [about | {"own": []}, *lines])
    told = {name: only(report, name) for name in ("position", "agreement", "unparsed")}
    assert all(each["is_concern"] for each in told.values())
    assert position in told["position"]["advice"]
    assert agreement in told["agreement"]["advice"]
    is_logits = position == "cancels"
    assert ("max_tokens" in told["unparsed"]["advice"]) is not is_logits
    options = {"kwise": {"strategy"}, "kwise-repeated": {"repeats"}, "pairwise": set()}
    fit = set() if is_logits else options[about.get("strategy", "kwise")]
    for name in ("position", "agreement"):
        assert set(re.findall(r"judge\.(\w+)", told[name]["advice"])) <= fit


def test_agreement_that_is_none_counts_and_votes_that_cannot_be_compared_are_failures():
    both = [vote([0, 1], [1, 2]), vote([1, 0], [1, 2])]
    lines = [line("a", *both, agreement=0.0), line("b", *both, agreement=1.0)]
    lines.append(line("c", both[0], vote([1, 0], None), outcome="unparsed", reason="?"))
    judge = audit(some_rows(), [*lines, line("d", both[0])])["judge"]
    assert [judge["kendall_w"][name] for name in ("mean", "n", "num_failed")] == [0.5, 2, 1]
    assert [judge["kendall_tau"][name] for name in ("mean", "n", "num_failed")] == [-1.0, 2, 1]


def test_votes_that_could_not_be_read_are_failures_of_their_places():
    read = line("a", vote([0, 1], [1, 2]), vote([1, 2, 0], [1, 2, 3]))
    unread = line("b", vote([0, 1], None), vote([1, 0], None), outcome="unparsed", reason="?")
    positions = audit(some_rows(), [read, unread])["positions"]
    assert positions["2"]["verdicts"] == 1
    for place in positions["2"]["places"].values():
        assert [place[name]["num_failed"] for name in ("winner_share", "mean_rank")] == [2, 2]
    assert [each["winner_share"]["num_failed"] for each in positions["3"]["places"].values()] == [
        0, 0, 0,
    ]  # fmt: skip


def test_ratings_have_no_place_and_no_word_about_one():
    rated = [{"presented": [n], "score": 7.0, "text": ""} for n in range(2)]
    lines = [{"judge": "x", "strategy": "pointwise", "own": []}, line("a", *rated)]
    report = audit(some_rows(), lines)
    assert "positions" not in report
    assert not findings(report, "position")
    assert not findings(report, "agreement")


def test_the_share_of_the_shorter_is_its_own_where_its_spread_is_unknown():
    finding = only(audit([row("a", ["x", "yy"], [1.0, 2.0])]), "length")
    assert finding["sentence"] == (
        "The shorter of two answers is the better ranked one in 100.0% of the pairs."
    )


def cheated(*lines):
    report = audit(some_rows(), [line("r0", vote([0, 1], [1, 2])), *lines])
    return report, only(report, "canary")


def test_any_win_of_a_cheating_answer_is_of_concern_and_its_kind_is_named():
    lost = [canary("seen through", [3, 1, 2])] * 60
    report, finding = cheated(*lost, canary("fooled", [1, 2, 3]), canary("fooled", [3, 1, 2]))
    assert finding["is_concern"]
    assert "Of 62 answers that cheat, 1 won ('fooled' 1 of 2)." in finding["sentence"]
    assert "stronger" in finding["advice"]
    assert (report["canaries"]["fooled"]["wins"], report["canaries"]["fooled"]["questions"]) == (
        1,
        2,
    )
    # A win that is shared with one other is half of one.
    report, finding = cheated(*lost, canary("fooled", [1, 1, 2]))
    assert finding["is_concern"]
    assert "0.5 won ('fooled' 0.5 of 1)" in finding["sentence"]
    assert report["all_canaries"]["wins"] == 0.5


def test_cheating_answers_that_all_come_last_are_no_concern_but_what_could_be_missed_is_said():
    # 0.05 ** (1 / 28) is 0.8985, 0.05 ** (1 / 29) is 0.9019: 10 % can be missed up to 28.
    _, finding = cheated(*[canary("k", [3, 1, 2])] * 29)
    assert not finding["is_concern"]
    assert "Of 29 answers that cheat, 0 won." in finding["sentence"]
    assert "lets 10% of them win could still be missed (95 %)." in finding["sentence"]
    assert "at 1.00." in finding["sentence"]
    for few in (28, 1):
        _, finding = cheated(*[canary("k", [3, 1, 2])] * few)
        assert not finding["is_concern"]
        assert "too few were asked" in finding["sentence"]
    assert "lets 95% of them" in finding["sentence"]


def test_cheating_answers_in_the_middle_are_of_concern_though_none_wins():
    # Second of three is half of the way; so is second and last of four, in the mean, not surely.
    assert cheated(*[canary("k", [2, 1, 3])] * 30)[1]["is_concern"]
    doubtful = [canary("k", [2, 1, 3, 4]), canary("k", [4, 1, 2, 3])] * 3
    report, finding = cheated(*doubtful)
    assert report["all_canaries"]["way_to_last"]["mean"] == pytest.approx(2 / 3)
    assert finding["is_concern"]
    assert not cheated(*doubtful * 10)[1]["is_concern"]
    # Third of four is two thirds of the way.
    assert not cheated(*[canary("k", [3, 1, 2, 4])] * 30)[1]["is_concern"]


def test_unread_questions_with_a_cheating_answer_are_counted_as_failures():
    unread = {"canary": "k", "id": "b", "index": 0, "reason": "?", "votes": []}
    report, finding = cheated(canary("k", [3, 1, 2]), unread, unread)
    for table in (report["all_canaries"], report["canaries"]["k"]):
        assert (table["questions"], table["unparsed"]) == (1, 2)
        assert [table["way_to_last"][name] for name in ("mean", "n", "num_failed")] == [1.0, 1, 2]
    assert "2 more got no ranking that could be read" in finding["sentence"]
    _, finding = cheated(unread)
    assert "Of 0 answers that cheat, 0 won. 1 more got" in finding["sentence"]
    assert not finding["is_concern"]


def unread_prompts(share):
    """One in a thousand is a tenth of what is allowed."""
    bad = int(share * 1000)
    lines = [line(str(n), vote([0, 1], [1, 2])) for n in range(1000 - bad)]
    return lines + [line(str(n), outcome="unparsed", reason="?") for n in range(bad)]


@pytest.mark.parametrize(("share", "expected"), [(0.014, False), (0.022, True)])
def test_unread_verdicts_are_of_concern_where_surely_more_than_one_in_a_hundred(share, expected):
    # Two standard errors of 0.014 of 1000 are 0.0074, of 0.022 they are 0.0093.
    report = audit(some_rows(), unread_prompts(share))
    assert only(report, "unparsed")["is_concern"] is expected


@pytest.mark.parametrize(("share", "expected"), [(0.62, False), (0.65, True)])
def test_length_is_of_concern_where_it_surely_decides_six_pairs_of_ten(share, expected):
    # Two standard errors of 1000 pairs are 0.03.
    ranks = [[2.0, 1.0] if n < share * 1000 else [1.0, 2.0] for n in range(1000)]
    report = audit([row(str(n), ["x", "yy"], each) for n, each in enumerate(ranks)])
    assert only(report, "length")["is_concern"] is expected


@pytest.mark.parametrize(("swaps", "tau"), [(3, 0.4), (2, 0.6)])
def test_agreement_is_of_concern_below_a_half(swaps, tau):
    # Of ten pairs, each that is turned takes 0.2.
    other = {2: [3, 1, 2, 4, 5], 3: [4, 1, 2, 3, 5]}[swaps]
    votes = [vote(list(range(5)), [1, 2, 3, 4, 5]), vote(list(range(5)), other)]
    report = audit(some_rows(), [line(str(n), *votes) for n in range(40)])
    assert report["judge"]["kendall_tau"]["mean"] == pytest.approx(tau)
    assert only(report, "agreement")["is_concern"] is (tau < 0.5)


def test_agreement_that_may_be_a_half_is_of_no_concern():
    votes = [
        (vote(list(range(5)), [1, 2, 3, 4, 5]), vote(list(range(5)), other))
        for other in [[4, 1, 2, 3, 5]] * 22 + [[3, 1, 2, 4, 5]] * 18
    ]
    report = audit(some_rows(), [line(str(n), *pair) for n, pair in enumerate(votes)])
    tau = report["judge"]["kendall_tau"]
    # (22 * 0.4 + 18 * 0.6) / 40, with a standard error of 0.016
    assert tau["mean"] == pytest.approx(0.49)
    assert tau["high"] > 0.5
    assert not only(report, "agreement")["is_concern"]


@pytest.mark.parametrize(("total", "expected"), [(20, False), (18, True)])
def test_more_than_one_answer_in_ten_refused_or_cut_is_of_concern(total, expected):
    def report(texts, reasons):
        rows = []
        for n in range(0, total, 2):
            one, other = (
                RankedAnswer(answer=texts[i], model="m", rank=i % 2 + 1.0, finish_reason=reasons[i])
                for i in (n, n + 1)
            )
            rows.append(row(str(n), ["x", "y"], [1.0, 2.0]))
            rows[-1] = rows[-1].model_copy(update={"answers": (one, other)})
        return audit(rows)

    fine, plain = ["stop"] * total, [f"It is {n}." for n in range(total)]
    refused = only(report(["I must decline."] * 2 + plain[2:], fine), "refused")
    cut = only(report(plain, ["length"] * 2 + fine[2:]), "truncated")
    assert [each["is_concern"] for each in (refused, cut)] == [expected] * 2
    assert f"2 of {total} answers" in refused["sentence"]


def test_answers_that_do_not_say_how_they_ended_are_not_called_whole():
    def truncated(*reasons):
        rows = [
            row(f"r{n}", ["x", "y"], [1.0, 2.0], finish_reason=reason)
            for n, reason in enumerate(reasons)
        ]
        return only(audit(rows), "truncated")

    assert truncated("stop")["sentence"] == "0 of 2 answers (0.0%) were cut by their limit."
    unknown = truncated(None, None)
    assert (
        unknown["sentence"] == "Whether answers were cut is not known; 4 do not say how they ended."
    )
    assert not unknown["is_concern"]
    # One in nine rows that say it; of all rows it is one in twelve.
    some = truncated("length", *["stop"] * 8, *[None] * 3)
    assert some["is_concern"]
    assert some["sentence"] == (
        "2 of 18 answers (11.1%) were cut by their limit; 6 do not say how they ended."
    )


@pytest.mark.parametrize(("tied", "expected"), [(2, False), (3, True)])
def test_ties_are_of_concern_where_they_are_more_than_half_of_the_pairs(tied, expected):
    rows = [row(f"r{n}", ["x", "y"], [1.0, 1.0 if n < tied else 2.0]) for n in range(4)]
    finding = only(audit(rows), "ties")
    assert finding["is_concern"] is expected
    assert f"{tied} of 4 pairs of answers ({tied / 4:.1%}) are ties." == finding["sentence"]
    assert "ties" not in only(audit(rows), "duplicates")["sentence"]
    about = {"judge": "x", "strategy": "pointwise", "own": []}
    assert ("strategy kwise" in only(audit(rows, [about]), "ties")["advice"]) is expected
    assert "strategy" not in only(audit(rows, [about | {"strategy": "kwise"}]), "ties")["advice"]


@pytest.mark.parametrize(("wins", "expected"), [(55, False), (70, True)])
def test_a_judges_own_answers_are_of_concern_only_where_they_surely_rank_higher(wins, expected):
    ranks = [[1.0, 2.0] if n < wins else [2.0, 1.0] for n in range(100)]
    rows = [row(str(n), ["x", "y"], each, models="pq") for n, each in enumerate(ranks)]
    assert only(audit(rows, [{"own": ["p"]}]), "own answers")["is_concern"] is expected
    assert not only(audit(rows, [{"own": ["q"]}]), "own answers")["is_concern"]


def test_where_no_preference_is_seen_what_could_be_missed_is_said():
    ranks = [[1, 2] if n % 2 else [2, 1] for n in range(40)]
    report = audit(some_rows(), [line(str(n), vote([0, 1], each)) for n, each in enumerate(ranks)])
    finding = only(report, "position")
    assert not finding["is_concern"]
    share = report["positions"]["2"]["places"]["1"]["winner_share"]
    assert f"50.0% [{share['low']:.1%} to {share['high']:.1%}]" in finding["sentence"]
    assert "none seen, though the interval leaves room for one." in finding["sentence"]


def test_shares_stay_within_nought_and_one():
    for n in range(3, 30):
        lines = [line(str(i), vote([0, 1, 2], [1, 2, 3] if i else [2, 1, 3])) for i in range(n)]
        for place in audit(some_rows(), lines)["positions"]["3"]["places"].values():
            assert 0 <= place["winner_share"]["low"] <= place["winner_share"]["high"] <= 1


def test_rankings_alone_say_what_cannot_be_known_from_them():
    report = audit(some_rows())
    assert "positions" not in report
    assert "are not known" in only(report, "unknown")["sentence"]
    for name in ("position", "canary", "agreement", "unparsed"):
        assert not findings(report, name)


def test_values_that_are_all_alike_claim_no_certainty():
    # An interval of width zero would.
    assert "[" not in only(audit(some_rows(40)), "length")["sentence"]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_a_file_is_audited_with_the_judgments_beside_it_and_again_the_same(tmp_path):
    path = tmp_path / "rankings.jsonl"
    rows = some_rows(5)
    path.write_text("".join(each.model_dump_json() + "\n" for each in rows))
    assert audit_file(path) == audit(rows)
    lines = [{"judge": "j", "own": []}, *(line(each.id, vote([0, 1], [1, 2])) for each in rows)]
    write_lines(tmp_path / "judgments.jsonl", lines)
    assert audit_file(path) == audit_file(path) == audit(rows, lines)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["judgments.jsonl", "rankings.jsonl"]
    with (tmp_path / "judgments.jsonl").open("a") as file:
        file.write('{"id": ')
    with pytest.raises(DataError, match="line 7"):
        audit_file(path)


def test_parquet_is_audited_like_jsonl(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [row(f"r{n}", ["x", "yy"], [1.0, 2.0], source=["s"]) for n in range(4)]
    reports = []
    for name in ("rankings.jsonl", "rankings.parquet"):
        write_nectar(tmp_path / name, rows)
        reports.append(audit_file(tmp_path / name))
    assert reports[0] == reports[1]
    assert reports[0]["all"]["rankings"] == 4


def test_a_file_without_rankings_is_refused(tmp_path):
    (tmp_path / "rankings.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        audit_file(tmp_path / "rankings.jsonl")


def test_the_text_fits_a_terminal_and_tells_what_is_of_concern_first():
    long = "a-model-with-a-very-long-name-indeed-of-billions"
    texts = ["I am sorry, but I cannot assist with that request of yours.", "y"]
    rows = [
        row(
            f"r{n}", texts, [1.0, 2.0], models=[long, f"q{n}"], source=["s" * 70], good_natured=True
        )
        for n in range(30)
    ]
    lines = [line(f"r{n}", vote([0, 1], [1, 2])) for n in range(30)]
    report = audit(rows, lines)
    text = as_text(report)
    shown = text.splitlines()
    assert max(map(len, shown)) <= 80
    marks = [each[0] for each in shown[: shown.index("")] if each[0] in "!-"]
    assert marks == sorted(marks)
    assert {"!", "-"} == set(marks)
    for finding in report["findings"]:
        assert finding["sentence"][:40] in text
    assert "place, of 2" in text
    # The one frequent model stands among the first twenty, and the rest is counted.
    assert long[:26] in text
    assert "and 11 more" in text


@pytest.mark.real_data
def test_what_is_known_about_nectar_is_found(test_data):
    path = test_data / "nectar" / "rankings.jsonl"
    ranks = defaultdict(list)
    won = total = 0
    for text in path.read_text().splitlines():
        answers = json.loads(text)["answers"]
        for each in answers:
            ranks[each["model"]].append(each["rank"])
        for one, other in combinations(answers, 2):
            lengths = len(one["answer"]), len(other["answer"])
            if lengths[0] != lengths[1]:
                total += 1
                won += (lengths[0] > lengths[1]) == (one["rank"] < other["rank"])
    report = audit_file(path)
    found = {name: model["mean_rank"]["mean"] for name, model in report["models"].items()}
    assert found == pytest.approx({name: sum(each) / len(each) for name, each in ranks.items()})
    assert report["all"]["longer_wins"]["mean"] == pytest.approx(won / total)
    assert report["all"]["longer_wins"]["n"] == total
    # As published: about 2.8 and 6.0, and these in between in this order.
    assert 2.5 < found["gpt-4-0613"] < 3.1
    assert 5.8 < found["anthropic"] < 6.4
    assert found["gpt-4"] < found["gpt-3.5-turbo-instruct"]
    assert found["gpt-4"] < found["mistral-7b-instruct-v0.1"]
    frequent = only(report, "models")["sentence"]
    assert "gpt-4-0613 is the best" in frequent
    assert "anthropic the worst" in frequent
    assert only(report, "length")["is_concern"]


@pytest.mark.real_data
def test_long_answers_win_where_they_are_known_to(test_data):
    report = audit_file(test_data / "rankings_k7" / "rankings.jsonl")
    wins = report["all"]["longer_wins"]
    assert wins["mean"] == pytest.approx(0.72, abs=0.01)
    assert only(report, "length")["is_concern"]
    fifths = means(report["length"], "mean_rank")
    assert fifths == sorted(fifths, reverse=True)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('{"outcome": "ranked"}', "line 1: id: Field required"),
        ("[1]", "line 1: not a JSON object but list"),
        ("ranked", "line 1: broken JSON"),
        ('{"canary": "first"}', "line 1: index: Field required"),
        ('{"judge": "j"}\n{"a": 1}', "line 2: judge: Field required"),
    ],
)
def test_a_file_of_verdicts_that_another_program_wrote_is_refused_by_its_line(
    tmp_path, written, reason
):
    rows = "\n".join(each.model_dump_json(by_alias=True) for each in some_rows())
    (tmp_path / "rankings.jsonl").write_text(rows)
    (tmp_path / "judgments.jsonl").write_text(written)
    with pytest.raises(DataError, match=reason):
        audit_file(tmp_path / "rankings.jsonl")
    (tmp_path / "judgments.jsonl").write_text("")
    assert (
        "No verdict stands in"
        in only(audit_file(tmp_path / "rankings.jsonl"), "unknown")["sentence"]
    )


def test_bad_rows_of_an_audited_file_go_where_they_were_asked_to(tmp_path):
    path, bad = tmp_path / "rankings.jsonl", tmp_path / "out" / "bad.jsonl"
    good = "".join(each.model_dump_json() + "\n" for each in some_rows(150))
    path.write_text(f"{good}nonsense\n")
    assert audit_file(path, quarantine=bad)["all"]["rankings"] == 150
    assert json.loads(bad.read_text())["text"] == "nonsense"
    assert sorted(tmp_path.iterdir()) == [bad.parent, path]
