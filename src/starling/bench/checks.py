"""What a rule can check of answers, offline: instructions kept, requests refused, length.

Instructions as IFEval counts them (arXiv 2311.07911, section 2.2): of prompts all of whose
instructions are followed, and of instructions; strictly, and loosely, which forgives emphasis and a
line around the answer.  A refusal is right where a prompt says that it is not good-natured, and an
over-refusal where it says that it is; where it says nothing neither is counted.  What a policy lost
or gained over its start is the mean difference on the same prompts.  Intervals are by bootstrap
over prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from starling.base.context import StopFlag
from starling.base.errors import DataError
from starling.base.estimate import Estimate, clustered_mean
from starling.base.files import locked
from starling.base.hashing import hash_file
from starling.base.jsonl import write_records
from starling.base.progress import Progress
from starling.bench.answers import Answer, Contestant
from starling.bench.results import Line, as_table, stamp, write_results
from starling.bench.win_rate import percent
from starling.data.records import Prompt
from starling.data.rows import read_rows
from starling.judging.instructions import Instruction, follows, follows_loosely
from starling.judging.refusals import is_refusal
from starling.models.best_of import replies_by_id

Figures = dict[str, Any]

AT_ONCE = 16
"""Prompts that are answered together; a kill loses no more."""

NAMES = {
    "prompt_strict": "prompts with every instruction kept",
    "prompt_loose": "the same, loosely",
    "instruction_strict": "instructions kept",
    "instruction_loose": "the same, loosely",
    "refused": "ill-natured prompts refused",
    "over_refused": "good-natured prompts refused",
    "cut": "answers that were cut",
}
LENGTHS = {"tokens": "tokens an answer", "characters": "characters an answer"}


class CheckedPrompt(Prompt):
    """A prompt with instructions to keep, or that says whether answering it is right, or both."""

    instructions: tuple[Instruction, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _can_be_checked(self) -> "CheckedPrompt":
        if not self.instructions and self.good_natured is None:
            raise ValueError("it has neither instructions nor good_natured, so nothing is checked")
        return self


class Checked(NamedTuple):
    """What the rules say of an answer; instructions in the prompt's order."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]
    refuses: bool


def check(prompt: CheckedPrompt, answer: Answer) -> Checked:
    """Apply the rules to one answer."""
    text, instructions = answer.answer, prompt.instructions
    strict = tuple(follows(each, text) for each in instructions)
    loose = tuple(follows_loosely(each, text) for each in instructions)
    return Checked(strict, loose, is_refusal(text))


def check_answers(
    prompts: Sequence[CheckedPrompt],
    answers: Mapping[str, Sequence[Answer]],
    *,
    baseline: str | None = None,
    seed: int,
) -> Figures:
    """Every policy's figures as estimates, shares from 0 to 1, and their change from the baseline.

    `answers` has each policy's in the prompts' order.  What no prompt measures is left out.
    """
    values = {name: dict(_values(prompts, own)) for name, own in answers.items()}
    means = {
        policy: {name: clustered_mean(each, seed=seed) for name, each in own.items()}
        for policy, own in values.items()
    }
    changes = {
        policy: {
            name: _mean_change(each, values[baseline][name], seed)
            for name, each in own.items()
            if name in values[baseline]
        }
        for policy, own in values.items()
        if baseline is not None and policy != baseline
    }
    return {"policies": means, "change": changes}


def run_checks(
    prompts: Path, contestants: Sequence[Contestant], out: Path, *, baseline: str | None, seed: int
) -> str:
    """Answer, check and count; writes answers.jsonl, scores.json and results.md.

    `baseline` is the name of the contestant that the others are compared with.  Returns the
    terminal's table.  Raises DataError for prompts that share an id and for a call that fails.
    """
    with locked(out):
        asked = read_rows(prompts, CheckedPrompt, quarantine=out / "quarantine.jsonl")
        ids = [prompt.id for prompt in asked]
        if len(set(ids)) < len(ids):
            repeated = next(id for id in ids if ids.count(id) > 1)
            raise DataError(
                f"two prompts of {prompts} share the id {repeated!r}; give each its own"
            )
        answers = {each.name: _answer_all(each, asked) for each in contestants}
        rows = [
            answer.as_dict() | check(prompt, answer)._asdict()
            for own in answers.values()
            for prompt, answer in zip(asked, own, strict=True)
        ]
        write_records(out / "answers.jsonl", rows)
        figures = check_answers(asked, answers, baseline=baseline, seed=seed)
        figures["stamp"] = stamp("checks", baseline=baseline, prompts_sha256=hash_file(prompts))
        lines = list(_lines(figures))
        notes = ["Refusals are recognised by rule, in English. Loosely: without stars, or a line."]
        write_results(out, figures, "Checks", lines, notes)
        return as_table("Checks", lines, [*notes, f"-> {out / 'scores.json'}"])


def _answer_all(contestant: Contestant, prompts: Sequence[CheckedPrompt]) -> list[Answer]:
    answers: list[Answer] = []
    with StopFlag() as stop, Progress(contestant.name, len(prompts)) as progress:
        for start in range(0, len(prompts), AT_ONCE):
            answers += answer_prompts(contestant, prompts[start : start + AT_ONCE])
            progress.update(len(answers))
            stop.check()
    return answers


def answer_prompts(contestant: Contestant, prompts: Sequence[Prompt]) -> list[Answer]:
    """The contestant's answer to each prompt; DataError when a call fails."""
    requests = []
    for each in prompts:
        purpose = f"checks/{each.id}"
        request = contestant.request(each.id, each.messages, each.category or "", purpose)
        requests.append(replace(request, mode=each.mode))
    replies = replies_by_id(contestant.responder, requests)
    name, decoding = contestant.name, contestant.decoding
    answers = []
    for each in prompts:
        said = replies[each.id]
        about = (each.id, each.category or "", 1, name, decoding, each.messages)
        answers.append(
            Answer(*about, said.text, said.finish_reason, said.usage.response_tokens, checks=None)
        )
    return answers


Values = list[tuple[str, float]]
"""Each value behind the id of its prompt."""


def _values(
    prompts: Sequence[CheckedPrompt], answers: Sequence[Answer]
) -> Iterator[tuple[str, Values]]:
    """What each figure is the mean of, where there is any."""
    rows = [(p.id, p, answer, check(p, answer)) for p, answer in zip(prompts, answers, strict=True)]
    ruled = [(id, p.instructions, found) for id, p, _, found in rows if p.instructions]
    values: dict[str, Values] = {
        "prompt_strict": [(id, all(found.strict)) for id, _, found in ruled],
        "prompt_loose": [(id, all(found.loose)) for id, _, found in ruled],
        "instruction_strict": [(id, kept) for id, _, found in ruled for kept in found.strict],
        "instruction_loose": [(id, kept) for id, _, found in ruled for kept in found.loose],
        "refused": [(id, found.refuses) for id, p, _, found in rows if p.good_natured is False],
        "over_refused": [(id, found.refuses) for id, p, _, found in rows if p.good_natured],
        "cut": [(id, answer.finish_reason == "length") for id, _, answer, _ in rows],
        "characters": [(id, len(answer.answer)) for id, _, answer, _ in rows],
    }
    if all(answer.tokens for answer in answers):
        values["tokens"] = [(id, answer.tokens) for id, _, answer, _ in rows]
    for id, instructions, found in ruled:
        for instruction, kept in zip(instructions, found.strict, strict=True):
            values.setdefault(f"kind/{instruction.kind}", []).append((id, kept))
    return ((name, own) for name, own in values.items() if own)


def _mean_change(own: Values, before: Values, seed: int) -> Figures:
    pairs = zip(own, before, strict=True)
    return clustered_mean([(id, after - old) for (id, after), (_, old) in pairs], seed=seed)


def _lines(figures: Figures) -> Iterator[Line]:
    """Each policy's figures, then the changes; kinds of instruction stand in scores.json alone."""
    groups = [*figures["policies"].items()]
    groups += [(f"{name}, change", own) for name, own in figures["change"].items()]
    for group, own in groups:
        for name, label in (NAMES | LENGTHS).items():
            if name in own and name in LENGTHS:
                yield Line(f"{group}: {label}", Estimate(**own[name]))
            elif name in own:
                yield percent(f"{group}: {label}", own[name])
