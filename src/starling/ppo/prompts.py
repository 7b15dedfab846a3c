"""The prompts that PPO trains on, and the disjoint ones that checkpoints are selected on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.seeding import permutation
from starling.data.chat import ChatCodec
from starling.data.records import Prompt, Question
from starling.data.rows import read_rows
from starling.judging.instructions import InstructedPrompt
from starling.models.local import trim_turns
from starling.ppo.config import PpoInputs, PpoSection

logger = logging.getLogger(__name__)

SomePrompt = TypeVar("SomePrompt", bound=Prompt)


class HeldOut(NamedTuple):
    """What checkpoints are selected on."""

    prompts: tuple[Prompt, ...]
    instructed: tuple[InstructedPrompt, ...]
    """Prompts with verifiable instructions; none where the recipe names no file."""


def load_prompts(
    section: PpoSection, inputs: PpoInputs, codec: ChatCodec, out: Path, context: Context
) -> tuple[list[Prompt], HeldOut]:
    """Training prompts and held-out ones, trimmed to `max_prompt_tokens`; no prompt is in both.

    Without a validation file, `validation_prompts` of the prompts are drawn by the seed and kept
    apart.  Raises DataError when too few are left.
    """
    quarantine = context.own_path(out / "quarantine.jsonl")
    prompts = read_rows(inputs.prompts, Prompt, quarantine=quarantine)
    prompts = _fitting(prompts, section, codec, inputs.prompts)
    if inputs.validation is None:
        candidates = _distinct(prompts)
        order = permutation(len(candidates), context.seed, "ppo/validation", 0)
        apart = set(order[: section.validation_prompts])
        held_out = [prompt for i, prompt in enumerate(candidates) if i in apart]
    else:
        held_out = read_rows(inputs.validation, Prompt, quarantine=quarantine)
        held_out = held_out[: section.validation_prompts]
        held_out = _distinct(_fitting(held_out, section, codec, inputs.validation))
    instructed: list[InstructedPrompt] = []
    if inputs.instructions is not None:
        instructed = read_rows(inputs.instructions, InstructedPrompt, quarantine=quarantine)
        instructed = _fitting(instructed, section, codec, inputs.instructions)
    # Compared as they were trimmed: prompts that differ only in what is cut are the same here.
    apart_from = {prompt.messages for prompt in (*held_out, *instructed)}
    training = [prompt for prompt in prompts if prompt.messages not in apart_from]
    fewest = max(2, context.world_size)
    if not training or len(held_out) < fewest:
        raise DataError(
            f"{inputs.prompts}: {len(training)} training and {len(held_out)} validation prompts "
            "are left; give more prompts, or lower ppo.validation_prompts"
        )
    _refuse_questions([*training, *held_out, *instructed], inputs, quarantine)
    ids = [prompt.id for prompt in held_out]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two validation prompts share the id {twice!r}; give each its own")
    return training, HeldOut(tuple(held_out), tuple(instructed))


def _refuse_questions(prompts: Sequence[Prompt], inputs: PpoInputs, quarantine: Path) -> None:
    """Raise DataError for prompts that put a question of the bench: it would prove little."""
    if inputs.questions is None:
        return
    questions = read_rows(inputs.questions, Question, quarantine=quarantine)
    asked = {turn.strip() for question in questions for turn in question.turns}
    same = [prompt.id for prompt in prompts if prompt.messages[-1].content.strip() in asked]
    if same:
        raise DataError(
            f"{len(same)} of PPO's prompts put questions of {inputs.questions} (for example "
            f"{same[0]!r}); take them out of ppo.prompts, ppo.validation and ppo.instructions"
        )


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each text: the judge is asked about each once."""
    first = {prompt.messages: prompt for prompt in reversed(prompts)}
    return [prompt for prompt in prompts if first[prompt.messages] is prompt]


def _fitting(
    prompts: Sequence[SomePrompt], section: PpoSection, codec: ChatCodec, path: Path
) -> list[SomePrompt]:
    limit = section.max_prompt_tokens
    fitting = []
    for prompt in prompts:
        messages = trim_turns(prompt.messages, codec, limit=limit, mode=prompt.mode)
        encoded = codec.encode(messages, mode=prompt.mode, generation_prompt=True)
        if len(encoded.ids) <= limit:
            fitting.append(prompt.model_copy(update={"messages": messages}))
    if len(fitting) < len(prompts):
        logger.warning(
            f"{path}: {len(prompts) - len(fitting)} of {len(prompts)} prompts are longer than "
            f"ppo.max_prompt_tokens ({limit}) and are left out"
        )
    return fitting
