"""Make scores comparable between reward models: mean 0, deviation 1 on the starting policy's own
answers, so that PPO's settings mean the same with each.

Source: Ziegler et al. 2019, released code (256 samples); on the answers of other models, the
policy's would start anywhere.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import torch

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.seeding import derive_seed, permutation
from starling.data.records import Message, RankingRow
from starling.models.interfaces import Request, Sampling
from starling.models.local import Local, load_local
from starling.models.reward_model import RewardModel, Scored
from starling.reward.config import RewardInputs, RewardSection
from starling.reward.dataset import answer_conversations

logger = logging.getLogger(__name__)


def normalised(
    reward_model: RewardModel,
    rankings: Sequence[RankingRow],
    inputs: RewardInputs,
    section: RewardSection,
    context: Context,
) -> RewardModel:
    """Store the mean and deviation of the scores of the policy's answers to the rankings' prompts.

    Without a policy, or with `policy_samples` 0, of the rankings' own answers.  Raises DataError
    when these scores do not differ.
    """
    items = list(_policy_answers(rankings, inputs, section, context))
    if not items:
        items = [item for row in rankings for item in answer_conversations(row)]
    raw = torch.tensor([found.raw_score for found in reward_model.score_each(items)])
    mean, std = float(raw.mean()), float(raw.std(correction=0))
    # Equal scores differ by their rounding; dividing by that would make noise a reward.
    if not std > 1e-5 * max(1.0, abs(mean)):
        raise DataError(
            f"the reward model gives the same score to all {len(items)} answers it is normalised "
            "on; give rankings that differ more, or look at reward.lr"
        )
    return dataclasses.replace(reward_model, mean=mean, std=std)


def _policy_answers(
    rankings: Sequence[RankingRow], inputs: RewardInputs, section: RewardSection, context: Context
) -> Iterator[Scored]:
    """`policy_samples` answers, the rankings' prompts taken in turn; too long ones are left out."""
    if inputs.policy is None or not section.policy_samples:
        return
    local = load_local(
        inputs.policy,
        context.device,
        dtype=section.precision,
        chat_format=inputs.policy_format,
    )
    asked = {row.messages: row for row in rankings if _fits(row, local, section.policy_tokens)}
    if not asked:
        logger.warning(
            "no prompt leaves the policy room for reward.policy_tokens: scores are normalised on "
            "the rankings' own answers"
        )
        return
    rows = list(asked.values())
    order = permutation(len(rows), context.seed, "reward/normalise", 0)
    requests = {}
    for number in range(section.policy_samples):
        row = rows[order[number % len(rows)]]
        seed = derive_seed(context.seed, f"reward/normalise/{number}")
        sampling = Sampling(section.policy_tokens, 1.0, seed)
        requests[str(number)] = Request(str(number), row.messages, sampling, mode=row.mode)
    replies = {reply.request_id: reply for reply in local.respond(requests.values())}
    for id, request in requests.items():
        answer = Message(role="assistant", content=replies[id].text)
        finished = replies[id].finish_reason == "stop"
        yield Scored((*request.messages, answer), request.mode, finished)


def _fits(row: RankingRow, policy: Local, tokens: int) -> bool:
    if policy.context_length is None:
        return True
    encoded = policy.codec.encode(row.messages, mode=row.mode, generation_prompt=True)
    return len(encoded.ids) + tokens <= policy.context_length
