"""What a run would ask and what that could cost, before anything is asked: `--plan`.

Prompts are prepared as the stage prepares them; nothing is written.  Tokens are estimated at four
characters each, as Nectar's authors did, and costs are upper bounds: every answer and every verdict
is taken to be as long as its limit.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from starling.base.jsonl import read_records
from starling.base.spending import Spending
from starling.data.records import Prompt, Question
from starling.feedback.config import MOST_ANSWERS, FeedbackSection
from starling.feedback.prompts import prepare_prompts
from starling.inputs import Paths, resolve_bench, resolve_feedback, resolve_ppo
from starling.judging.config import JudgeSection
from starling.judging.strategies import num_calls
from starling.pipeline import pending_paths
from starling.recipe import Recipe

CHARS_PER_TOKEN = 4
PROTOCOL_TOKENS = 600
"""The judge's instructions, fences included."""
PAIR_TOKENS = 5
"""A line of the walk through the pairs."""


@dataclass(frozen=True)
class Calls:
    """Calls of one kind; `model` is None where they are free, tokens are at most so many."""

    who: str
    model: str | None
    calls: int
    prompt_tokens: int
    response_tokens: int


def make_plan(recipe: Recipe, folder: Path, out: Path, *, only: str | None = None) -> str:
    """The calls of the stages, or of `only` one, a line each, and what they cost at most in all."""
    paths, stages = pending_paths(recipe, folder, out, only)
    lines, asked = [], []
    for name in stages:
        planned = {"feedback": _feedback, "ppo": _ppo, "bench": _bench}.get(name)
        for item in planned(recipe, paths) if planned is not None else ():
            asked.append(item)
            lines.append(f"{name}: {_line(item, recipe)}")
    paid = [calls for calls in asked if calls.model is not None]
    costs = [_usd(calls, recipe) for calls in paid]
    total = sum(cost for cost in costs if cost is not None)
    unknown = sorted({str(c.model) for c, cost in zip(paid, costs, strict=True) if cost is None})
    lines.append(
        f"in all: {sum(c.calls for c in paid):,} calls to endpoints, at most ${total:,.2f}"
        + (f" and what {', '.join(unknown)} cost (run.prices names no price)" if unknown else "")
    )
    if recipe.run.max_usd is not None:
        lines.append(f"run.max_usd stops it at ${recipe.run.max_usd:,.2f}")
    if any((out / name / "calls.sqlite").exists() for name in stages):
        lines.append("Replies that stand in calls.sqlite already are not bought again.")
    return "\n".join(lines)


def _feedback(recipe: Recipe, paths: Paths) -> Iterator[Calls]:
    section = recipe.feedback
    assert section is not None, "a stage that was chosen has its section"
    assert recipe.judge is not None, "the recipe's validation asks for one"
    inputs = resolve_feedback(section, recipe, paths)
    with tempfile.TemporaryDirectory() as scratch:
        quarantine = Path(scratch, "quarantine.jsonl")
        prompts, _ = prepare_prompts(section, inputs, quarantine, seed=recipe.seed)
    read = sum(map(_prompt_tokens, prompts))
    for each in section.candidates:
        calls = len(prompts) * each.answers
        model = each.model if each.url is not None else None
        yield Calls(each.name, model, calls, read * each.answers, calls * each.max_tokens)
    yield _rankings(recipe.judge, section, prompts)


def _rankings(judge: JudgeSection, section: FeedbackSection, prompts: Sequence[Prompt]) -> Calls:
    new = sum(each.answers for each in section.candidates)
    new_tokens = sum(each.answers * each.max_tokens for each in section.candidates)
    calls = tokens = 0
    for number, prompt in enumerate(prompts):
        answers = new_tokens + sum(_tokens(len(answer.answer)) for answer in prompt.answers)
        k = min(new + len(prompt.answers), MOST_ANSWERS)
        # Canaries are drawn among the prompts; which ones makes no difference to an estimate.
        times = 2 if number < min(section.canaries, len(prompts) // 10) else 1
        each = times * num_calls(judge.strategy, judge.repeats, k)
        shown = {"pairwise": 2, "pointwise": 1}.get(judge.strategy, k)
        fixed = PROTOCOL_TOKENS + _prompt_tokens(prompt) + PAIR_TOKENS * comb(shown, 2)
        calls += each
        tokens += each * (fixed + answers * shown // max(k, 1))
    return _judging(judge, f"{judge.strategy} rankings", calls, tokens)


def _ppo(recipe: Recipe, paths: Paths) -> Iterator[Calls]:
    section, judge = recipe.ppo, recipe.judge
    assert section is not None, "a stage that was chosen has its section"
    if judge is None:
        return
    resolve_ppo(section, recipe, paths)
    rounds = 1 + -(-section.steps // section.select_every)
    ratings = rounds * section.validation_prompts
    answer = section.max_response_tokens
    tokens = ratings * (PROTOCOL_TOKENS + answer + (section.max_prompt_tokens or answer))
    yield _judging(judge, "ratings of validation answers", ratings, tokens)


def _bench(recipe: Recipe, paths: Paths) -> Iterator[Calls]:
    section, judge = recipe.bench, recipe.judge
    assert section is not None, "a stage that was chosen has its section"
    assert judge is not None, "the recipe's validation asks for one"
    inputs = resolve_bench(section, recipe, paths)
    with tempfile.TemporaryDirectory() as scratch:
        questions = read_records(inputs.questions, Question, quarantine=Path(scratch, "bad"))
    turns = sum(len(question.turns) for question in questions)
    asked = sum(_tokens(len(turn)) for question in questions for turn in question.turns)
    # Before a later turn stand the earlier ones with their answers.
    tokens = turns * PROTOCOL_TOKENS + 2 * (asked + turns * section.max_tokens)
    yield _judging(judge, "ratings", 2 * turns, 2 * tokens)
    times = num_calls(judge.strategy, judge.repeats, 2)
    both = times * (tokens + turns * section.max_tokens)
    yield _judging(judge, "comparisons", times * turns, both)


def _judging(judge: JudgeSection, what: str, calls: int, prompt_tokens: int) -> Calls:
    model = judge.model if judge.url is not None else None
    who = f"judge ({judge.kind}), {what}"
    return Calls(who, model, calls, prompt_tokens, calls * judge.max_tokens)


def _line(calls: Calls, recipe: Recipe) -> str:
    if calls.model is None:
        return f"{calls.who}: {calls.calls:,} answers, free"
    cost = _usd(calls, recipe)
    return (
        f"{calls.who}: {calls.calls:,} calls to {calls.model}, "
        f"{calls.prompt_tokens / 1e6:,.2f}M tokens read, {calls.response_tokens / 1e6:,.2f}M "
        f"written: {'no price known' if cost is None else f'at most ${cost:,.2f}'}"
    )


def _usd(calls: Calls, recipe: Recipe) -> float | None:
    assert calls.model is not None
    spending = Spending(recipe.run.prices)
    return spending.usd(calls.model, calls.prompt_tokens, calls.response_tokens)


def _prompt_tokens(prompt: Prompt) -> int:
    return _tokens(sum(len(message.content) for message in prompt.messages))


def _tokens(chars: int) -> int:
    return -(-chars // CHARS_PER_TOKEN)
