"""Collect responses and everything about them that stays fixed while PPO learns from them.

Shapes: B rollouts, T token positions (prompt and response).  Masks: True = keep.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from starling.data.chat import ChatCodec
from starling.data.records import Message, Prompt
from starling.models.causal_lm import Batch, padded_mask
from starling.models.interfaces import Engine, GenerationRequest, Sample, Sampling
from starling.models.reward_model import RewardModel, Scored
from starling.ppo.actor_critic import ActorCritic, reference_logprobs
from starling.ppo.config import PpoSection


@dataclass(frozen=True)
class Samples:
    """Sampled responses with their prompts: tokens, masks and texts.

    Example: prompt ids [1, 7], response ids [9, 3] (3 ends the turn) give token_ids [1, 7, 9, 3]
    and response_mask [False, False, True, True].
    """

    token_ids: Int[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    sampler_logprobs: Float[Tensor, "B T"]
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    is_finished: tuple[bool, ...]

    @property
    def response_tokens(self) -> Float[Tensor, " B"]:
        """Length of each response, its end marker included."""
        return self.response_mask.sum(dim=1).float()


@dataclass(frozen=True)
class Rollout:
    """One iteration's frozen data.  `scores` [B]; everything else is per token [B, T]."""

    token_ids: Int[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    scores: Float[Tensor, " B"]
    old_logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    old_values: Float[Tensor, "B T"]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and response: a row ends with its response."""
        positions = torch.arange(1, self.response_mask.shape[1] + 1, device=self.scores.device)
        return torch.where(self.response_mask, positions, 0).amax(dim=1).tolist()

    def rows(self, indices: Sequence[int]) -> "Rollout":
        """These rows only, in this order, without the columns that none of them uses."""
        lengths = self.lengths
        width = max(lengths[i] for i in indices)
        index = torch.tensor(indices, device=self.scores.device)
        columns: dict[str, Any] = {
            f.name: getattr(self, f.name)[index, :width] for f in fields(self) if f.name != "scores"
        }
        return replace(self, scores=self.scores[index], **columns)


def sampling(section: PpoSection, seed: int) -> Sampling:
    """How rollouts and validation answers are drawn."""
    return Sampling(section.max_response_tokens, section.temperature, seed)


def sample_responses(
    engine: Engine,
    codec: ChatCodec,
    prompts: Sequence[Prompt],
    samplings: Iterable[Sampling],
    *,
    device: str,
) -> Samples:
    """One response per prompt, in the prompts' order."""
    encoded = [
        codec.encode(prompt.messages, mode=prompt.mode, generation_prompt=True).ids
        for prompt in prompts
    ]
    requests = [
        GenerationRequest(str(row), tuple(ids), sampling)
        for row, (ids, sampling) in enumerate(zip(encoded, samplings, strict=True))
    ]
    by_row: dict[int, Sample] = {int(s.request_id): s for s in engine.generate(requests)}
    samples = [by_row[row] for row in range(len(prompts))]
    sequences = [[*ids, *sample.ids] for ids, sample in zip(encoded, samples, strict=True)]
    masks = [
        [False] * len(ids) + [True] * len(sample.ids)
        for ids, sample in zip(encoded, samples, strict=True)
    ]
    response_mask = padded_mask(masks, device)
    sampled = torch.tensor([value for sample in samples for value in sample.logprobs])
    sampler_logprobs = torch.zeros(response_mask.shape, device=device)
    return Samples(
        token_ids=Batch(sequences, codec.tokenizer.pad_id, device).token_ids,
        response_mask=response_mask,
        sampler_logprobs=sampler_logprobs.masked_scatter(response_mask, sampled.to(device)),
        prompts=tuple(prompts),
        texts=tuple(codec.decode_response(sample.ids) for sample in samples),
        is_finished=tuple(sample.finish_reason == "stop" for sample in samples),
    )


def score_responses(
    reward_model: RewardModel, samples: Samples, section: PpoSection
) -> Float[Tensor, " B"]:
    """Normalised scores of the responses, re-rendered from text in the reward model's own format.

    A response that was cut at its length gets `missing_end_penalty` instead of a score (Ziegler et
    al. 2019), where there is one.  Clipping comes after normalisation.
    """
    rows = zip(samples.prompts, samples.texts, samples.is_finished, strict=True)
    scores = reward_model.score(
        Scored((*prompt.messages, Message(role="assistant", content=text)), prompt.mode, finished)
        for prompt, text, finished in rows
    )
    if section.reward_clip is not None:
        scores = scores.clamp(-section.reward_clip, section.reward_clip)
    if section.missing_end_penalty is not None:
        is_finished = torch.tensor(samples.is_finished)
        scores = torch.where(is_finished, scores, torch.tensor(section.missing_end_penalty))
    return scores.to(samples.token_ids.device)


@torch.no_grad()
def evaluate_rollout(
    actor_critic: ActorCritic,
    reference: PreTrainedModel,
    samples: Samples,
    scores: Float[Tensor, " B"],
    section: PpoSection,
) -> Rollout:
    """Add the trainer's own logprobs, the reference's, and the values of every response token."""
    temperature, microbatch = section.temperature, section.microbatch
    old_logprobs, ref_logprobs, values = [], [], []
    for start in range(0, len(scores), microbatch):
        tokens = samples.token_ids[start : start + microbatch]
        mask = samples.response_mask[start : start + microbatch]
        evaluated = actor_critic.evaluate(tokens, mask, temperature=temperature)
        old_logprobs.append(evaluated.logprobs)
        values.append(evaluated.values)
        ref_logprobs.append(reference_logprobs(reference, tokens, mask, temperature=temperature))
    return Rollout(
        token_ids=samples.token_ids,
        response_mask=samples.response_mask,
        scores=scores,
        old_logprobs=torch.cat(old_logprobs),
        ref_logprobs=torch.cat(ref_logprobs),
        old_values=torch.cat(values),
    )
