"""What a run would ask and what that could cost, before anything is asked: `--plan`.

Prompts are prepared as the stage prepares them; nothing is written in the run folder.  Every answer
and every verdict is taken to be as long as its limit, and every call to work at once.  Tokens are
estimated at four characters each, as Nectar's authors did; Chinese, for one, has up to four times
as many.  So a figure is no bound, nor are calls that are repeated after a failure in it.
"""

from collections.abc import Iterator, Sequence
from math import comb
from pathlib import Path
from typing import NamedTuple

from starling.base.files import quarantine_elsewhere
from starling.base.jsonl import read_records
from starling.base.spending import Spending
from starling.data.records import Prompt, Question
from starling.feedback.config import MOST_ANSWERS, FeedbackInputs, FeedbackSection
from starling.feedback.prompts import prepare_prompts
from starling.judging import kwise
from starling.judging.canaries import num_canaries
from starling.judging.config import JudgeSection
from starling.judging.strategies import num_calls
from starling.models.config import EndpointSection
from starling.pipeline import pending_inputs
from starling.ppo.config import PpoSection
from starling.recipe import Recipe

CHARS_PER_TOKEN = 4
PROTOCOL_TOKENS = len(kwise.SYSTEM) // CHARS_PER_TOKEN + 100
"""The judge's instructions, and what stands between the blocks."""
BLOCK_TOKENS, PAIR_TOKENS = 16, 3
"""The fences of an answer or a turn, and a line of the walk through the pairs."""


class Calls(NamedTuple):
    """Calls of one kind to `model`, None where they are free; about so many tokens."""

    who: str
    model: str | None
    calls: int
    prompt_tokens: int
    response_tokens: int


def make_plan(recipe: Recipe, folder: Path, out: Path, *, only: str | None = None) -> str:
    """The calls of the stages, or of `only` one, a line each, and about what they cost in all."""
    prices = Spending(recipe.run.prices)
    lines, total, unpriced = [], 0.0, set[str]()
    num_paid = 0
    inputs = pending_inputs(recipe, folder, out, only)
    for name, calls in _planned(recipe, inputs):
        if calls.model is None:
            lines.append(f"{name}: {calls.who}: {calls.calls:,} answers, free")
            continue
        cost = prices.usd(calls.model, calls.prompt_tokens, calls.response_tokens)
        num_paid, total = num_paid + calls.calls, total + (cost or 0.0)
        unpriced |= {calls.model} if cost is None else set()
        lines.append(
            f"{name}: {calls.who}: {calls.calls:,} calls to {calls.model}, "
            f"{calls.prompt_tokens / 1e6:,.2f}M tokens read, {calls.response_tokens / 1e6:,.2f}M "
            f"written: {'no price known' if cost is None else f'about ${cost:,.2f}'}"
        )
    known = f"in all: {num_paid:,} calls to endpoints, about ${total:,.2f}"
    priced = ", ".join(recipe.run.prices) or "no model"
    named = f" and what {', '.join(sorted(unpriced))} cost (run.prices names {priced})"
    lines.append(f"{known}{named if unpriced else ''}, every reply at its limit")
    if recipe.run.max_usd is not None:
        lines.append(f"run.max_usd stops it at ${recipe.run.max_usd:,.2f}")
    if any((out / name / "calls.sqlite").exists() for name in inputs):
        lines.append("Replies that stand in calls.sqlite already are not bought again.")
    return "\n".join(lines)


def _planned(recipe: Recipe, inputs: dict) -> Iterator[tuple[str, Calls]]:
    judge = recipe.judge
    for stage, found in inputs.items():
        section = getattr(recipe, stage)
        calls: Iterator[Calls] = iter(())
        if stage == "feedback":
            calls = _feedback(section, found, seed=recipe.seed)
        elif stage == "ppo" and judge is not None:
            calls = _ppo(section, judge)
        elif stage == "bench" and judge is not None:
            calls = _bench(found.questions, section.max_tokens, judge)
        yield from ((stage, each) for each in calls)


def _feedback(section: FeedbackSection, inputs: FeedbackInputs, *, seed: int) -> Iterator[Calls]:
    with quarantine_elsewhere() as quarantine:
        prompts, _ = prepare_prompts(section, inputs, quarantine, seed=seed)
    read = sum(map(_prompt_tokens, prompts))
    for each in section.candidates:
        calls = len(prompts) * each.answers
        yield Calls(each.name, _priced(each), calls, read * each.answers, calls * each.max_tokens)
    yield _rankings(inputs.judge, section, prompts)


def _rankings(judge: JudgeSection, section: FeedbackSection, prompts: Sequence[Prompt]) -> Calls:
    new = sum(each.answers for each in section.candidates)
    new_tokens = sum(each.answers * each.max_tokens for each in section.candidates)
    calls = tokens = 0
    for number, prompt in enumerate(prompts):
        answers = new_tokens + sum(_tokens(answer.answer) for answer in prompt.answers)
        k = min(new + len(prompt.answers), MOST_ANSWERS)
        if k < 2:
            continue
        # Canaries are drawn among the prompts; which ones makes no difference to an estimate.
        times = 2 if number < min(section.canaries, len(prompts) // 10) else 1
        each = times * num_calls(judge.strategy, judge.repeats, k)
        shown = {"pairwise": 2, "pointwise": 1}.get(judge.strategy, k)
        blocks = BLOCK_TOKENS * (len(prompt.messages) + shown)
        fixed = PROTOCOL_TOKENS + blocks + _prompt_tokens(prompt) + PAIR_TOKENS * comb(shown, 2)
        calls += each
        tokens += each * (fixed + answers * shown // k)
    return _judging(judge, f"{judge.strategy} rankings", calls, tokens)


def _ppo(section: PpoSection, judge: JudgeSection) -> Iterator[Calls]:
    rounds = 1 + -(-section.steps // section.select_every)
    ratings = rounds * section.validation_prompts
    longest = PROTOCOL_TOKENS + section.max_prompt_tokens + section.max_response_tokens
    yield _judging(judge, "ratings of validation answers", ratings, ratings * longest)


def _bench(path: Path, max_tokens: int, judge: JudgeSection) -> Iterator[Calls]:
    with quarantine_elsewhere() as quarantine:
        questions = read_records(path, Question, quarantine=quarantine)
    turns = [turn for question in questions for turn in question.turns]
    # Before a later turn stand the earlier ones with their answers.
    tokens = len(turns) * (PROTOCOL_TOKENS + 2 * max_tokens) + 2 * sum(map(_tokens, turns))
    each = tokens // len(turns)
    cheating = num_canaries(len(turns))
    rated = 2 * len(turns) + cheating
    yield _judging(judge, "ratings and canaries", rated, rated * each)
    times = num_calls("pairwise", judge.repeats, 2)
    compared = times * (len(turns) + cheating)
    yield _judging(judge, "comparisons and canaries", compared, compared * (each + max_tokens))


def _judging(judge: JudgeSection, what: str, calls: int, prompt_tokens: int) -> Calls:
    who = f"judge ({judge.kind}), {what}"
    return Calls(who, _priced(judge), calls, prompt_tokens, calls * judge.max_tokens)


def _priced(asked: EndpointSection) -> str | None:
    """The name in the price table; None for what runs in this process."""
    return getattr(asked, "model", None) if asked.url is not None else None


def _prompt_tokens(prompt: Prompt) -> int:
    return sum(_tokens(message.content) for message in prompt.messages)


def _tokens(text: str) -> int:
    return -(-len(text) // CHARS_PER_TOKEN)
