"""The prompts that PPO trains on, and the disjoint ones that checkpoints are selected on."""

import logging
from collections.abc import Sequence
from pathlib import Path

from starling.base.errors import DataError
from starling.base.seeding import permutation
from starling.data.chat import ChatCodec
from starling.data.records import Prompt
from starling.data.rows import read_rows
from starling.models.local import trim_turns
from starling.ppo.config import PpoInputs, PpoSection

logger = logging.getLogger(__name__)


def load_prompts(
    section: PpoSection, inputs: PpoInputs, codec: ChatCodec, out: Path, *, seed: int
) -> tuple[list[Prompt], tuple[Prompt, ...]]:
    """Training and validation prompts, trimmed to `max_prompt_tokens`; no prompt is in both.

    Without a validation file, `validation_prompts` of the prompts are drawn by the seed and kept
    apart.  Raises DataError when too few are left.
    """
    quarantine = out / "quarantine.jsonl"
    prompts = read_rows(inputs.prompts, Prompt, quarantine=quarantine)
    prompts = _fitting(prompts, section, codec, inputs.prompts)
    if inputs.validation is None:
        candidates = _distinct(prompts)
        order = permutation(len(candidates), seed, "ppo/validation", 0)
        apart = set(order[: section.validation_prompts])
        held_out = [prompt for i, prompt in enumerate(candidates) if i in apart]
    else:
        held_out = read_rows(inputs.validation, Prompt, quarantine=quarantine)
        held_out = held_out[: section.validation_prompts]
        held_out = _distinct(_fitting(held_out, section, codec, inputs.validation))
    # Compared as they were trimmed: prompts that differ only in what is cut are the same here.
    validated = {prompt.messages for prompt in held_out}
    training = [prompt for prompt in prompts if prompt.messages not in validated]
    if not training or len(held_out) < 2:
        raise DataError(
            f"{inputs.prompts}: {len(training)} training and {len(held_out)} validation prompts "
            "are left; give more prompts, or lower ppo.validation_prompts"
        )
    ids = [prompt.id for prompt in held_out]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two validation prompts share the id {twice!r}; give each its own")
    return training, tuple(held_out)


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each text: the judge is asked about each once."""
    first = {prompt.messages: prompt for prompt in reversed(prompts)}
    return [prompt for prompt in prompts if first[prompt.messages] is prompt]


def _fitting(
    prompts: Sequence[Prompt], section: PpoSection, codec: ChatCodec, path: Path
) -> list[Prompt]:
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
