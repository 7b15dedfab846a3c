"""Collect responses and everything about them that stays fixed while PPO learns from them.

Every process samples, scores and evaluates the responses to its own prompts, and then all have all
rows; of a frozen trunk's states each keeps those of its own rows, which it alone will compute.

Shapes: B rollouts, T response tokens (padded on the right).  Masks: True = keep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from starling.base.context import Context
from starling.data.chat import ChatCodec
from starling.data.records import Message, Prompt
from starling.models.causal_lm import padded_mask
from starling.models.interfaces import Engine, GenerationRequest, Sample, Sampling
from starling.models.parallel import Forward, filled_up, from_everyone
from starling.models.reward_model import Scored
from starling.models.trunk import Trunk, TrunkStates
from starling.ppo.actor_critic import Actors, Evaluated
from starling.ppo.bundles import Bundle, Ids, Reading, bundle, bundle_batches
from starling.ppo.config import PpoSection
from starling.ppo.scorer import Scorer

PerToken = Float[Tensor, "B T"]


class Row(NamedTuple):
    """One response with all that is known of it: plain values, which processes exchange."""

    prompt_ids: Ids
    response_ids: Ids
    sampler_logprobs: tuple[float, ...]
    text: str
    is_finished: bool
    scores: tuple[float, ...]
    """Combined, then each reward model's."""
    old_logprobs: tuple[float, ...] = ()
    ref_logprobs: tuple[float, ...] = ()
    old_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One iteration's frozen data, the same in every process but for `trunk` and `own`.

    Row i answers `prompts[i]`; rows with one `group` number answer the same prompt.
    """

    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[Ids, ...]
    response_ids: tuple[Ids, ...]
    texts: tuple[str, ...]
    is_finished: Bool[Tensor, " B"]
    group: Tensor  # [B] int
    scores: Float[Tensor, " B"]
    each_score: Float[Tensor, "M B"]
    response_mask: Bool[Tensor, "B T"]
    sampler_logprobs: PerToken
    old_logprobs: PerToken
    ref_logprobs: PerToken
    old_values: PerToken
    own: tuple[int, ...]
    """Rows that this process computes."""
    trunk: Mapping[Ids | int, TrunkStates] = field(default_factory=dict)
    """States by prompt, and by row of its response; empty where nothing is reused."""
    live: Evaluated | None = None
    """The evaluation with its graph, where the first optimizer step would only compute it again."""

    @property
    def response_tokens(self) -> Tensor:
        """Length of each response [B], its end marker included."""
        return self.response_mask.sum(dim=1)

    def bundles(self, rows: Sequence[int], *, most: int | None) -> list[Bundle]:
        """These rows, those of one prompt together."""
        return bundle(self.prompt_ids, self.response_ids, rows, most=most)

    def trunk_states(self, trunk: Trunk | None, bundles: Sequence[Bundle]) -> Tensor | None:
        """What the trunk made of these bundles [T, D], as they stand in a forward."""
        if trunk is None:
            return None
        parts = [key for each in bundles for key in (each.prompt, *each.rows)]
        return trunk.joined([self.trunk[key] for key in parts])


class Sampled(NamedTuple):
    """What an engine wrote."""

    prompt_ids: Ids
    sample: Sample
    text: str


@dataclass(frozen=True)
class Collector:
    """Everything that a rollout is made with; the weights inside change as the policy learns."""

    engine: Engine
    codec: ChatCodec
    scorer: Scorer
    actors: Actors
    forward: Forward
    section: PpoSection
    context: Context

    def collect(
        self, prompts: Sequence[Prompt], samplings: Sequence[Sampling], *, will_learn: bool = False
    ) -> Rollout:
        """One response for each prompt (neighbours may be equal), in the prompts' order."""
        context = self.context
        group = _groups(prompts, self.section.samples_per_prompt)
        own = [
            row for row in range(len(prompts)) if group[row] % context.world_size == context.rank
        ]
        sampled = sample_responses(
            self.engine, self.codec, [prompts[row] for row in own], [samplings[row] for row in own]
        )
        rows = self._score([prompts[row] for row in own], sampled)
        rows, trunk, live = self._evaluate(rows, own, will_learn=will_learn)
        by_place = {
            place: row
            for part in from_everyone(list(zip(own, rows, strict=True)), context)
            for place, row in part
        }
        ordered = [by_place[place] for place in range(len(prompts))]
        rollout = rollout_of(prompts, group, ordered, own=own, trunk=trunk, device=context.device)
        return replace(rollout, live=live)

    def _score(self, prompts: Sequence[Prompt], sampled: Sequence[Sampled]) -> list[Row]:
        """Scores of the responses, re-rendered from text in each reward model's own format."""
        found = self.scorer.score(
            [
                Scored(
                    (*prompt.messages, Message(role="assistant", content=each.text)),
                    prompt.mode,
                    each.sample.finish_reason == "stop",
                )
                for prompt, each in zip(prompts, sampled, strict=True)
            ]
        )
        scores = torch.stack([found.combined, *found.each]).T.tolist()
        return [
            Row(
                each.prompt_ids,
                each.sample.ids,
                each.sample.logprobs,
                each.text,
                each.sample.finish_reason == "stop",
                tuple(score),
            )
            for each, score in zip(sampled, scores, strict=True)
        ]

    @torch.no_grad()
    def _evaluate(
        self, rows: Sequence[Row], places: Sequence[int], *, will_learn: bool
    ) -> tuple[list[Row], dict[Ids | int, TrunkStates], Evaluated | None]:
        """Add the trainer's own logprobs, the reference's, and the values of response tokens.

        Where all of it is one forward and one minibatch, nothing changes before the first optimizer
        step, whose forward this then is.
        """
        section, device = self.section, self.context.device
        trunk, kept = self.actors.actor_critic.trunk, {}
        bundles = bundle(
            [row.prompt_ids for row in rows],
            [row.response_ids for row in rows],
            range(len(rows)),
            most=section.microbatch,
        )
        batches = bundle_batches(
            bundles, device, tokens=section.tokens_per_forward, most=section.microbatch
        )
        done = list(rows)
        is_alone = len(batches) == section.minibatches == self.context.world_size == 1
        live = None
        # A process without a row of its own computes something all the same.
        filler = batches[-1] if batches else [Bundle((0,), ((0,),), (0,))]
        for batch, counts in filled_up(batches, self.context, filler=filler):
            reading = Reading(batch, device)
            states = None if trunk is None else self.forward(trunk.states, reading.packed)
            given = reading, states, section.temperature
            with torch.set_grad_enabled(will_learn and is_alone):
                old = self._old(reading, states, rows)
                live = old if old.logprobs.requires_grad else None
            reference = self.forward(self.actors.reference_logprobs, *given)
            if not counts:
                continue
            if trunk is not None and states is not None:
                kept |= _kept(trunk, batch, states, places)
            sizes = [len(rows[row].response_ids) for row in reading.rows]
            columns = [
                [tuple(part.tolist()) for part in values.split(sizes)]
                for values in (old.logprobs, reference, old.values)
            ]
            for row, *found in zip(reading.rows, *columns, strict=True):
                done[row] = rows[row]._replace(
                    old_logprobs=found[0], ref_logprobs=found[1], old_values=found[2]
                )
        return done, kept, live

    def _old(self, reading: Reading, states: Tensor | None, rows: Sequence[Row]) -> Evaluated:
        """Logprobs that the ratios start from, and values, of the reading's response tokens."""
        actor_critic, section = self.actors.actor_critic, self.section
        if section.old_logprobs == "recomputed":
            return self.forward(actor_critic.evaluate, reading, states, section.temperature)
        values = self.forward(actor_critic.evaluate_values, reading, states).detach()
        own = [logprob for row in reading.rows for logprob in rows[row].sampler_logprobs]
        return Evaluated(torch.tensor(own, device=values.device), values)


def sample_responses(
    engine: Engine, codec: ChatCodec, prompts: Sequence[Prompt], samplings: Sequence[Sampling]
) -> list[Sampled]:
    """One response per prompt, in the prompts' order."""
    encoded = [
        tuple(codec.encode(prompt.messages, mode=prompt.mode, generation_prompt=True).ids)
        for prompt in prompts
    ]
    requests = [
        GenerationRequest(str(row), ids, sampling)
        for row, (ids, sampling) in enumerate(zip(encoded, samplings, strict=True))
    ]
    by_row: dict[int, Sample] = {int(s.request_id): s for s in engine.generate(requests)}
    return [
        Sampled(ids, by_row[row], codec.decode_response(by_row[row].ids))
        for row, ids in enumerate(encoded)
    ]


def rollout_of(
    prompts: Sequence[Prompt],
    group: Sequence[int],
    rows: Sequence[Row],
    *,
    own: Sequence[int],
    trunk: Mapping[Ids | int, TrunkStates],
    device: str,
) -> Rollout:
    """All rows as tensors."""
    mask = padded_mask([[True] * len(row.response_ids) for row in rows], device)

    def padded(columns: Sequence[Sequence[float]]) -> Tensor:
        flat = torch.tensor([value for column in columns for value in column], device=device)
        return torch.zeros(mask.shape, device=device).masked_scatter(mask, flat)

    scores = torch.tensor([row.scores for row in rows], device=device).T
    return Rollout(
        prompts=tuple(prompts),
        prompt_ids=tuple(row.prompt_ids for row in rows),
        response_ids=tuple(row.response_ids for row in rows),
        texts=tuple(row.text for row in rows),
        is_finished=torch.tensor([row.is_finished for row in rows], device=device),
        group=torch.tensor(group, device=device),
        scores=scores[0],
        each_score=scores[1:],
        response_mask=mask,
        sampler_logprobs=padded([row.sampler_logprobs for row in rows]),
        old_logprobs=padded([row.old_logprobs for row in rows]),
        ref_logprobs=padded([row.ref_logprobs for row in rows]),
        old_values=padded([row.old_values for row in rows]),
        own=tuple(own),
        trunk=trunk,
    )


def sampling(section: PpoSection, seed: int) -> Sampling:
    """How rollouts and validation answers are drawn."""
    return Sampling(section.max_response_tokens, section.temperature, seed)


def _groups(prompts: Sequence[Prompt], samples: int) -> list[int]:
    """Numbers of the prompts: neighbours that are one object share one, so many at most.

    The same prompt may be the last of one pass over the file and the first of the next.
    """
    numbers: list[int] = []
    number, run = -1, samples
    for place, prompt in enumerate(prompts):
        is_new = run == samples or prompt is not prompts[place - 1]
        number, run = number + is_new, 1 if is_new else run + 1
        numbers.append(number)
    return numbers


def _kept(
    trunk: Trunk, batch: Sequence[Bundle], states: Tensor, places: Sequence[int]
) -> dict[Ids | int, TrunkStates]:
    """The trunk's states of a forward, by prompt and by row of the rollout."""
    sizes = [size for each in batch for size in (len(each.prompt), *map(len, each.read))]
    keys: list[Ids | int] = [
        key for each in batch for key in (each.prompt, *(places[row] for row in each.rows))
    ]
    pieces = states.split(sizes)
    return {key: trunk.kept(piece) for key, piece in zip(keys, pieces, strict=True)}
