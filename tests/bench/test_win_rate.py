"""Win rates against a baseline: both seats, one token's probabilities, and files of outputs."""

import json
import math
import re
from datetime import UTC, datetime

import pytest

from models.fake_server import FakeServer, Say, completion, error
from starling.base.context import single_process_context
from starling.base.errors import DataError, InputError
from starling.base.estimate import bootstrap_mean
from starling.bench import alpaca_eval
from starling.bench.alpaca_eval import WinRate, run_win_rate
from starling.bench.win_rate import Outcome, both_seats, compare, compare_logits, win_figures
from starling.data.records import Message
from starling.judging.build import build_judge
from starling.judging.config import JudgeSection
from starling.judging.judge import Comparison, Ranking, Unparsed, Vote
from starling.judging.preference import ask_preference

BLOCK = re.compile(r"<<answer (\w) (\w+)>>\n(.*?)\n<<end answer \1 \2>>", re.DOTALL)
CONTEXT = single_process_context(1, seed=0)


def asked(id, answers=("old", "new"), checks=None):
    return Comparison(id, (Message(role="user", content=f"Do {id}."),), answers, checks)


def vote(order, ranks, text=""):
    return Vote(order, text, ranks)


class Scripted:
    """Returns the verdicts by id."""

    def __init__(self, **verdicts):
        self.verdicts = verdicts

    def rank(self, comparisons):
        for each in comparisons:
            yield self.verdicts[each.id]

    def rate(self, answers):
        raise AssertionError("nobody asked for ratings")


# The model's answer is number 1: what each seat's call said, and what the two come to.
BOTH_SEATS = [
    ((1, 2), (1, 2), 0.5),  # the first seat both times
    ((2, 1), (1, 2), 1.0),  # the model both times
    ((1, 2), (2, 1), 0.0),  # the baseline both times
    ((1, 1), (1, 1), 0.5),
    ((2, 1), (1, 1), 0.5),  # one win, one tie
    ((2, 1), (2, 1), 0.5),  # the second seat both times
]


@pytest.mark.parametrize(("baseline_first", "model_first", "win"), BOTH_SEATS)
def test_a_win_is_one_in_both_seats_and_disagreement_or_a_tie_is_half(
    baseline_first, model_first, win
):
    votes = (vote((0, 1), baseline_first), vote((1, 0), model_first))
    # Whatever the judge made of its votes itself.
    outcome = compare([asked("a")], Scripted(a=Ranking("a", (1, 2), votes)))["a"]
    assert outcome.win == win
    assert outcome.model_first == (False, True)


def test_a_judge_that_says_nothing_of_its_calls_is_taken_by_its_verdict():
    verdicts = {"a": (2, 1), "b": (1, 1), "c": (1, 2)}
    judge = Scripted(**{id: Ranking(id, ranks, ()) for id, ranks in verdicts.items()})
    found = compare([asked(id) for id in verdicts], judge)
    assert [found[id].win for id in verdicts] == [1.0, 0.5, 0.0]
    figures = win_figures(list(found.items()), seed=0)
    assert (figures["inconsistent"], figures["first_seat"]) == (None, None)


def test_figures_by_hand():
    outcomes = [
        ("p", Outcome(1.0, (1.0, 1.0), (False, True))),
        ("p", Outcome(0.5, (0.0, 1.0), (False, True))),
        ("q", Outcome(0.0, (0.0, 0.0), (False, True))),
        ("q", Outcome(0.5)),
        ("r", Outcome(0.5, (0.5, 1.0), (False, True))),
        ("r", Outcome(None, reason="silence")),
    ]
    figures = win_figures(outcomes, seed=4)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (1, 3, 1)
    assert (figures["mean"], figures["n"], figures["num_failed"]) == (0.5, 5, 1)
    # Of four comparisons with two calls, two disagree.
    assert figures["inconsistent"] == 0.5
    # Of seven calls with a winner these prefer the second seat: p's first, and q's second.
    assert figures["first_seat"] == pytest.approx(5 / 7)
    expected = bootstrap_mean([1, 0.5, 0, 0.5, 0.5], seed=4, clusters=["p", "p", "q", "q", "r"])
    assert (figures["low"], figures["high"]) == (expected.low, expected.high)


def test_a_judge_in_love_with_the_first_seat_finds_nobody_better():
    section = both_seats(JudgeSection(kind="rubric", position_bias=9.0))
    checks = {"contains_all": ["new"], "max_words": 4}
    comparisons = [asked(f"q{n}", checks=checks) for n in range(8)]
    with build_judge(section, seed=0, ledger=None, context=CONTEXT) as judge:
        found = compare(comparisons, judge)
    figures = win_figures(list(found.items()), seed=0)
    assert (figures["mean"], figures["ties"], figures["n"]) == (0.5, 8, 8)
    assert (figures["inconsistent"], figures["first_seat"]) == (1.0, 1.0)
    fair = both_seats(JudgeSection(kind="rubric"))
    with build_judge(fair, seed=0, ledger=None, context=CONTEXT) as judge:
        figures = win_figures(list(compare(comparisons, judge).items()), seed=0)
    assert (figures["mean"], figures["inconsistent"], figures["first_seat"]) == (1.0, 0.0, 0.5)


def test_the_logits_judge_is_left_as_it_is():
    section = JudgeSection(kind="logits", model="folder")
    assert both_seats(section) is section


def test_probabilities_of_both_seats_are_averaged():
    votes = (
        vote((0, 1), (2, 1), '{"A":0.1,"B":0.3}'),
        vote((1, 0), (2, 1), '{"A":0.2,"B":0.6}'),
    )
    nothing = (vote((0, 1), (1, 1), '{"A":0.0,"B":0.0}'), votes[1])
    judge = Scripted(
        a=Ranking("a", (1, 1), votes), b=Ranking("b", (1, 1), nothing), c=Unparsed("c", "too long")
    )
    found = compare_logits([asked(id) for id in "abc"], judge)
    assert found["a"].win == pytest.approx((0.75 + 0.25) / 2)
    assert found["a"].by_call == pytest.approx((0.75, 0.25))
    assert (found["b"].win, found["c"].win) == (None, None)
    assert "neither label" in found["b"].reason
    assert found["c"].reason == "too long"


INSTRUCTIONS = ("Name a cat.", "Sum 2 and 2.", "Say no.", "Say {yes}.")


def outputs(path, generator, texts, as_list=True, **more):
    rows = [
        {"dataset": "ours", "instruction": instruction, "output": text, "generator": generator}
        | more
        for instruction, text in zip(INSTRUCTIONS, texts, strict=True)
    ]
    return write(path, rows, as_list=as_list)


def write(path, rows, *, as_list=True):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows, indent=2) if as_list else lines)
    return path


@pytest.fixture
def files(tmp_path):
    new = outputs(tmp_path / "new.json", "new", ("good cat", "good 4", "no", "bad"))
    old = outputs(tmp_path / "old.jsonl", "old", ("cat", "4", "no", "good yes"), as_list=False)
    return new, old


def shown(body):
    """The answers by their names, as the judge sees them."""
    return {name: text for name, _, text in BLOCK.findall(body["messages"][-1]["content"])}


def prefers_good(body, n):
    answers = shown(body)
    order = sorted(answers, key=lambda name: "good" not in answers[name])
    return Say(completion(f"[[{', '.join(map(repr, order))}]]"))


def likely(*tokens, text="m"):
    body = json.loads(completion(text, finish_reason="length"))
    top = [{"token": token, "logprob": math.log(chance)} for token, chance in tokens]
    body["choices"][0]["logprobs"] = {"content": [{"token": text, "top_logprobs": top}]}
    return Say(json.dumps(body))


def thinks_good(body, n):
    """0.6 for the good answer and 0.2 for the other, the rest for what is no name."""
    answers = shown(body)
    assert set(answers) == {"m", "M"}
    chances = {name: 0.6 if "good" in answers[name] else 0.2 for name in answers}
    return likely(("m", chances["m"]), ("M", chances["M"]), ("Answer", 0.15), text="Answer")


def measure(files, server, out, context=CONTEXT, **options):
    section = JudgeSection(kind="endpoint", url=server.url, model="judge")
    table = run_win_rate(WinRate(*files, section, **options), out, context)
    return table, json.loads((out / "scores.json").read_text())


def test_two_files_and_a_judge_make_a_win_rate(files, tmp_path):
    with FakeServer(prefers_good) as server:
        table, scores = measure(files, server, tmp_path / "out")
        # Three pairs differ, in two seats each; the equal one needs no judge. And a canary.
        assert len(server.calls) == 6 + 2
    assert (scores["canaries"]["asked"], scores["canaries"]["unread"]) == (1, 0)
    assert scores["win_rate"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert scores["win_rate"]["discrete"]["mean"] == scores["win_rate"]["mean"]
    assert (scores["win_rate"]["n"], scores["win_rate"]["num_failed"]) == (4, 0)
    assert (
        scores["win_rate"]["wins"],
        scores["win_rate"]["ties"],
        scores["win_rate"]["losses"],
    ) == (2, 1, 1)
    assert (scores["win_rate"]["inconsistent"], scores["win_rate"]["first_seat"]) == (0.0, 0.5)
    # The standard deviation of 1, 1, 0.5, 0 is sqrt(0.6875 / 3).
    assert scores["win_rate"]["standard_error"] == pytest.approx(math.sqrt(0.6875 / 3) / 2)
    assert scores["length"]["model"]["mean"] == pytest.approx((8 + 6 + 2 + 3) / 4)
    assert scores["length"]["baseline"]["mean"] == pytest.approx((3 + 1 + 2 + 8) / 4)
    assert scores["length"]["change"]["mean"] == pytest.approx(5 / 4)
    stamp = scores["stamp"]
    assert (stamp["model"], stamp["baseline"], stamp["judge"]) == ("new", "old", "judge")
    assert stamp["mode"] == "both seats"
    assert "Win rate of new over old" in table
    assert "62.50" in table
    assert "62.50" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(("weighted", "calls", "canaries"), [(False, 6, 2), (True, 3, 1)])
def test_a_plan_asks_nobody_and_writes_nothing(files, tmp_path, weighted, calls, canaries):
    out = tmp_path / "out"
    section = JudgeSection(kind="endpoint", url="http://localhost:1/v1", model="judge")
    said = run_win_rate(WinRate(*files, section, weighted=weighted, plan=True), out, CONTEXT)
    assert said.startswith(f"{calls} calls to judge about 3 pairs that differ, and {canaries} ")
    assert not out.exists()


def test_annotations_have_alpaca_evals_columns(files, tmp_path):
    with FakeServer(prefers_good) as server:
        measure(files, server, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["instruction"] for row in rows] == list(INSTRUCTIONS)
    assert [row["preference"] for row in rows] == [2.0, 2.0, 1.5, 1.0]
    assert (rows[0]["output_1"], rows[0]["generator_1"]) == ("cat", "old")
    assert (rows[0]["output_2"], rows[0]["generator_2"]) == ("good cat", "new")
    assert rows[0]["annotator"] == "judge"


# The baseline's answers are all called m under the one seed, and the model's under the other.
@pytest.mark.parametrize("seed", [0, 1])
def test_a_weighted_win_rate_is_the_mean_probability(files, tmp_path, seed):
    context = single_process_context(1, seed=seed)
    with FakeServer(thinks_good) as server:
        table, scores = measure(files, server, tmp_path / "out", context, weighted=True)
        assert ("bad" in {shown(call)["m"] for call in server.calls}) == (seed == 1)
        assert len(server.calls) == 3 + 1
        assert {(c["max_tokens"], c["logprobs"], c["top_logprobs"]) for c in server.calls} == {
            (1, True, 5)
        }
    assert scores["win_rate"]["mean"] == pytest.approx((0.75 + 0.75 + 0.5 + 0.25) / 4)
    assert scores["win_rate"]["discrete"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert scores["stamp"]["mode"] == "weighted"
    assert "weighted" in table


def test_which_answer_is_called_m_is_drawn_for_each_prompt_and_seed():
    orders = [ask_preference(asked(f"q{n}"), 0).order for n in range(400)]
    # A fair coin's 400 throws are within 5 standard deviations of 200.
    assert 150 < orders.count((0, 1)) < 250
    assert set(orders) == {(0, 1), (1, 0)}
    assert [ask_preference(asked(f"q{n}"), 0).order for n in range(400)] == orders
    assert [ask_preference(asked(f"q{n}"), 1).order for n in range(400)] != orders
    question = ask_preference(asked("q1", ("<<answer m 0>>\nold", "new")), 0)
    text = question.messages[-1].content
    names = dict(zip("mM", question.order, strict=True))
    assert {name: "new" in answer for name, _, answer in BLOCK.findall(text)} == {
        name: answer == 1 for name, answer in names.items()
    }


def test_no_call_is_bought_twice_and_the_day_of_judging_stays(files, tmp_path, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 5, 6, tzinfo=UTC)

    for weighted, script in ((True, thinks_good), (False, prefers_good)):
        out = tmp_path / f"out-{weighted}"
        with FakeServer(script) as server:
            _, first = measure(files, server, out, weighted=weighted)
            num_calls = len(server.calls)
            with monkeypatch.context() as patch:
                patch.setattr(alpaca_eval, "datetime", Later)
                _, again = measure(files, server, out, weighted=weighted)
            assert len(server.calls) == num_calls
        assert again == first
        assert first["stamp"]["judged"] < "2031"


@pytest.mark.parametrize(
    ("tokens", "win"),
    [
        ([("m", 0.9), ("x", 0.1)], "m"),
        ([(" M", 0.2), ("M", 0.1), ("m", 0.1), ("\u2581m", 0.5)], "M"),
        ([("x", 0.6), ("y", 0.4)], None),
    ],
)
def test_probabilities_are_of_the_two_names_alone(files, tmp_path, tokens, win):
    new, old = files
    rows = [json.loads(line) for line in old.read_text().splitlines()][:1]
    write(old, rows, as_list=False)
    write(new, json.loads(new.read_text())[:1])
    with FakeServer(lambda body, n: likely(*tokens, text="x")) as server:
        if win is None:
            with pytest.raises(DataError, match=r"1 of 1 comparisons failed.*neither m nor M"):
                measure(files, server, tmp_path / "out", weighted=True)
            return
        _, scores = measure(files, server, tmp_path / "out", weighted=True)
        is_model = shown(server.calls[0])[win] == "good cat"
    share = 1.0 if win == "m" else 0.3 / 0.4
    assert scores["win_rate"]["mean"] == pytest.approx(share if is_model else 1 - share)


def test_failed_comparisons_are_reported_and_left_out(files, tmp_path):
    def silent_on_cats(body, n):
        if "cat" in body["messages"][-1]["content"]:
            # One seat alone is read.
            is_first = shown(body)["A"] == "good cat"
            return prefers_good(body, n) if is_first else Say(completion("I cannot say."))
        return prefers_good(body, n)

    with FakeServer(silent_on_cats) as server:
        with pytest.raises(DataError, match="1 of 4 comparisons failed"):
            measure(files, server, tmp_path / "out")
        assert not (tmp_path / "out" / "scores.json").exists()
        table, scores = measure(files, server, tmp_path / "out", allowed_failures=0.25)
    assert (scores["win_rate"]["n"], scores["win_rate"]["num_failed"]) == (3, 1)
    assert scores["win_rate"]["mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert "1 without a verdict; the first: 1 of 2 votes could not be read" in table
    rows = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert rows[0]["preference"] is None


@pytest.mark.parametrize(
    "script",
    [
        lambda body, n: Say(completion("m", finish_reason="length")),
        lambda body, n: error(400, "logprobs are not supported by this model"),
    ],
)
def test_a_server_without_logprobs_is_refused_with_what_to_do(files, tmp_path, script):
    refused = pytest.raises(InputError, match="logprobs.*leave out --weighted")
    with FakeServer(script) as server, refused:
        measure(files, server, tmp_path / "out", weighted=True)


def test_a_judge_of_words_gives_no_weights(files, tmp_path):
    with pytest.raises(InputError, match="kind rubric gives none.*leave out --weighted"):
        run_win_rate(WinRate(*files, JudgeSection(kind="rubric"), weighted=True), tmp_path, CONTEXT)


def test_length_is_controlled_for_and_said_to_be(tmp_path):
    texts = [f"Do {n}." for n in range(60)]

    def rows(name, long):
        return [
            {"instruction": text, "output": "a" * long(n), "generator": name}
            for n, text in enumerate(texts)
        ]

    # The model's answers are longer in two of three, and the longer one is preferred.
    new = write(tmp_path / "new.json", rows("new", lambda n: 20 if n % 3 else 5))
    old = write(tmp_path / "old.json", rows("old", lambda n: 10))

    def prefers_long(body, n):
        answers = shown(body)
        order = sorted(answers, key=lambda name: -len(answers[name]))
        return Say(completion(f"[[{', '.join(map(repr, order))}]]"))

    with FakeServer(prefers_long) as server:
        table, scores = measure((new, old), server, tmp_path / "out", length_controlled=True)
    assert scores["win_rate"]["mean"] == pytest.approx(2 / 3)
    # Parted by length completely: nothing is left for the model but the sign at zero length.
    assert abs(scores["length_controlled"]["mean"] - 0.5) < 1 / 6
    assert scores["length_controlled"]["effects"]["length"] > 2
    assert scores["length_controlled"]["n"] == 60
    assert "not AlpacaEval's leaderboard number" in table
    with_difficulty = write(
        old,
        [
            row | {"instruction_difficulty": n / 60}
            for n, row in enumerate(rows("old", lambda n: 10))
        ],
    )
    with FakeServer(prefers_long) as server:
        files = (new, with_difficulty)
        _, scores = measure(files, server, tmp_path / "out2", length_controlled=True)
    assert scores["length_controlled"]["effects"]["difficulty"] is not None


def test_a_model_in_this_process_weighs_both_seats(files, tmp_path, policy_folder):
    section = JudgeSection(kind="logits", model=str(policy_folder))
    rates = {}
    for name, pair in (("there", files), ("back", files[::-1])):
        run_win_rate(WinRate(*pair, section, weighted=True), tmp_path / name, CONTEXT)
        rates[name] = json.loads((tmp_path / name / "scores.json").read_text())
    # Both seats are seen, so who is called the baseline makes no difference.
    assert rates["there"]["win_rate"]["mean"] == pytest.approx(
        1 - rates["back"]["win_rate"]["mean"], abs=1e-3
    )
    assert rates["there"]["stamp"]["judge"] == "logits"
    assert rates["there"]["win_rate"]["n"] == 4


def cut_short(new, old):
    new.write_text(new.read_text()[:-30])


def change(which, number, **fields):
    def apply(new, old):
        rows = json.loads(new.read_text()) if which == "new" else None
        path = new if which == "new" else old
        rows = rows or [json.loads(line) for line in old.read_text().splitlines()]
        rows[number] |= fields
        write(path, rows, as_list=which == "new")

    return apply


def drop(which):
    def apply(new, old):
        if which == "new":
            write(new, json.loads(new.read_text())[1:])
        else:
            old.write_text("".join(old.read_text().splitlines(keepends=True)[1:]))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("new"), "new: 1 instructions are missing, which the baseline has: 'Name a cat.'"),
        (drop("old"), "old: 1 instructions are missing, which the answers have: 'Name a cat.'"),
        (change("new", 1, instruction="Name a cat."), "1 instructions stand there twice: 'Name"),
        (change("old", 2, output=" \n"), "old.jsonl: 1 instructions have an empty output: 'Say no"),
        (change("new", 2, generator="newer"), "holds outputs of new, newer; give one model's file"),
        (change("new", 2, output=None), "1 of 4 rows of .*new.json are bad"),
        (cut_short, "new.json is damaged"),
        (lambda new, old: old.unlink(), "there is no .*old.jsonl"),
        (lambda new, old: old.write_text(""), "holds no rows"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_before_anybody_is_asked(
    files, tmp_path, spoil, message
):
    spoil(*files)
    with FakeServer(prefers_good) as server:
        with pytest.raises(DataError, match=message):
            measure(files, server, tmp_path / "out")
        assert server.calls == []


def test_blank_lines_and_unknown_columns_are_passed_over(files, tmp_path):
    new, old = files
    old.write_text("\n" + old.read_text().replace("\n", "\n\n"))
    new.write_text("\ufeff \n" + json.dumps([r | {"x": 1} for r in json.loads(new.read_text())]))
    with FakeServer(prefers_good) as server:
        _, scores = measure(files, server, tmp_path / "out")
    assert scores["win_rate"]["n"] == 4
