"""What `--plan` says is what a run would ask, and it leaves no trace."""

import json

import pytest

from starling.cli import main
from starling.data.records import Message
from starling.judging.judge import Comparison
from starling.judging.kwise import present

PROMPTS = [f"Tell me something about the number {n}, in a few words." for n in range(30)]


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """Runs `starling ... --plan` on a recipe of 30 prompts and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*options, judge="", answers=3, conversations=None):
        given = conversations or [(Message(role="user", content=text),) for text in PROMPTS]
        rows = [{"messages": [message.model_dump() for message in each]} for each in given]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / "mine.yaml").write_text(
            "judge: {kind: endpoint, url: 'http://localhost:1/v1', model: gpt-4-0613, "
            f"max_tokens: 1000{judge}}}\n"
            "feedback:\n"
            "  prompts: prompts.jsonl\n"
            "  candidates:\n"
            "    - {name: near, url: 'http://localhost:1/v1', model: small, max_tokens: 100, "
            f"answers: {answers}}}\n"
            "    - {name: far, url: 'http://localhost:1/v1', model: big, max_tokens: 200}\n"
            "run: {prices: {gpt-4-0613: {input: 30, output: 60}, small: {input: 0, output: 1}}}\n",
            encoding="utf-8",
        )
        assert main(["feedback", "mine.yaml", "--plan", *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("judge", "calls"),
    [
        # 30 prompts and a canary for one in ten: 33 questions about 4 answers, or 5 with a canary.
        ("", 33),
        (", strategy: kwise-repeated, repeats: 5", 33 * 8),
        (", strategy: pairwise", 33 * 12),
        (", strategy: pointwise", 33 * 4),
    ],
)
def test_each_strategys_calls_are_counted(plan, judge, calls):
    assert f"rankings: {calls:,} calls to gpt-4-0613" in plan(judge=judge)


def test_candidates_are_priced_by_their_models(plan):
    said = plan()
    # 30 prompts, 3 answers of 100 tokens at $1 a million: $0.009.
    assert "near: 90 calls to small, 0.00M tokens read, 0.01M written: about $0.01" in said
    assert "far: 30 calls to big" in said
    assert "no price known" in said
    assert "and what big cost (run.prices names gpt-4-0613, small)" in said


def test_the_judges_cost_is_a_bound_and_not_a_wild_one(plan):
    assert_bounded(plan, [(Message(role="user", content=text),) for text in PROMPTS], 3)


def test_many_answers_and_many_turns_are_bounded_too(plan):
    turns = [("user", "And then?"), ("assistant", "Then it rained.")] * 20 + [("user", "And?")]
    messages = tuple(Message(role=role, content=text) for role, text in turns)
    assert_bounded(plan, [messages], 25)


def assert_bounded(plan, conversations, answers):
    said = plan("--feedback.canaries", "0", answers=answers, conversations=conversations)
    [line] = [line for line in said.splitlines() if "rankings" in line]
    planned = float(line.rpartition("$")[2])
    written = len(conversations) * 1000 * 60 / 1e6
    longest = ("x" * 400,) * answers + ("x" * 800,)
    asked = [Comparison(str(n), each, longest) for n, each in enumerate(conversations)]
    chars = sum(len(m.content) for each in asked for m in present(each, 0).messages)
    read = chars / 4 * 30 / 1e6
    assert read + written - 0.005 <= planned <= 1.15 * (read + written)


def test_the_sum_counts_every_endpoint(plan):
    said = plan()
    assert "in all: 153 calls to endpoints, about $" in said  # 90 + 30 + 33
    assert "every reply at its limit" in said
    assert "at most" not in said


def test_a_cap_on_money_needs_every_price(plan, capsys):
    with pytest.raises(AssertionError):
        plan("--run.max-usd", "2.5")
    assert "run.prices: has none for 'big'" in capsys.readouterr().err


def test_nothing_is_written(plan, tmp_path):
    plan()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "prompts.jsonl"]
