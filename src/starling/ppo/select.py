"""Choose a checkpoint by the judge on validation prompts, never by reward and never by gold.

The judge is the one that ranked the candidates.  Limits on length and KL come before its opinion,
since an over-optimised policy shows in both before it shows in the score.

Shapes: B validation prompts, T token positions.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from starling.base.errors import DataError
from starling.base.estimate import bootstrap_mean
from starling.base.jsonl import write_records
from starling.base.seeding import derive_seed
from starling.data.chat import ChatCodec
from starling.data.records import Prompt
from starling.judging.judge import GradedAnswer, Judge, Rating
from starling.models.interfaces import Engine
from starling.models.reward_model import RewardModel
from starling.ppo.actor_critic import reference_logprobs
from starling.ppo.config import PpoSection
from starling.ppo.kl import k1, sequence_kl
from starling.ppo.rollout import Samples, sample_responses, sampling, score_responses


@dataclass(frozen=True)
class Validation:
    """One policy on the validation prompts, sampled at the rollouts' temperature."""

    step: int
    rating: float | None
    """Mean of the judge's 1 to 10; None without a judge."""
    kl: dict[str, Any]
    """Estimate of the sequence KL to the reference, in nats."""
    response_tokens: float


@dataclass(frozen=True)
class Validator:
    """Measures the policy as it stands; the same prompts and seeds at every step."""

    prompts: tuple[Prompt, ...]
    judge: Judge | None
    reward_model: RewardModel
    engine: Engine
    codec: ChatCodec
    reference: PreTrainedModel
    section: PpoSection
    seed: int
    out: Path

    def measure(self, policy: PreTrainedModel, step: int) -> Validation:
        """Sample one response per validation prompt; measure KL and length, and ask the judge.

        The answers go to `validation/step-<step>.jsonl`, where the report reads them.
        """
        section, device = self.section, str(policy.device)
        samplings = [
            sampling(section, derive_seed(self.seed, "ppo/validation", row))
            for row in range(len(self.prompts))
        ]
        samples = sample_responses(self.engine, self.codec, self.prompts, samplings, device=device)
        tokens, mask = samples.token_ids, samples.response_mask
        logprobs, ref_logprobs = (
            reference_logprobs(model, tokens, mask, temperature=section.temperature)
            for model in (policy, self.reference)
        )
        kl = sequence_kl(k1(logprobs, ref_logprobs), mask)
        rated = self._rate(samples, step)
        scores = score_responses(self.reward_model, samples, section)
        rows = zip(samples.prompts, samples.texts, samples.is_finished, strict=True)
        write_records(
            self.out / "validation" / f"step-{step:06d}.jsonl",
            [
                {"id": prompt.id, "category": prompt.category, "answer": text}
                | {"finished": finished, "checks": prompt.checks}
                | {"kl": kl[row].item(), "score": scores[row].item(), "rating": rated.get(row)}
                for row, (prompt, text, finished) in enumerate(rows)
            ],
        )
        return Validation(
            step=step,
            rating=sum(rated.values()) / len(rated) if rated else None,
            kl=asdict(bootstrap_mean(kl.tolist(), seed=self.seed)),
            response_tokens=float(samples.response_tokens.mean()),
        )

    def _rate(self, samples: Samples, step: int) -> dict[int, float]:
        """The judge's rating by row; {} without a judge.

        Raises DataError when the judge fails on more than a tenth: no checkpoint can be selected.
        """
        if self.judge is None:
            return {}
        answers = [
            GradedAnswer(f"{step}/{prompt.id}", prompt.messages, text, prompt.checks, finished)
            for prompt, text, finished in zip(
                samples.prompts, samples.texts, samples.is_finished, strict=True
            )
        ]
        verdicts = list(self.judge.rate(answers))
        read = {row: v.score for row, v in enumerate(verdicts) if isinstance(v, Rating)}
        failed = next((v for v in verdicts if not isinstance(v, Rating)), None)
        if failed is not None and len(read) < 0.9 * len(verdicts):
            raise DataError(
                f"the judge rated only {len(read)} of {len(verdicts)} validation answers (for "
                f"example: {failed.reason}); no checkpoint can be selected. Check the judge"
            )
        return read


def is_eligible(candidate: Validation, start: Validation, section: PpoSection) -> bool:
    """Whether length and KL allow this checkpoint: 0.5 to 1.5 of the target, where there is one."""
    is_short = candidate.response_tokens <= section.select_max_length_ratio * start.response_tokens
    if section.kl_target is None:
        return is_short
    return is_short and 0.5 <= candidate.kl["mean"] / section.kl_target <= 1.5


def is_better(candidate: Validation, best: Validation | None) -> bool:
    """Whether the judge rates the candidate above the best so far."""
    if candidate.rating is None:
        return False
    return best is None or best.rating is None or candidate.rating > best.rating


@dataclass
class Selection:
    """Every validation so far, the best eligible one, and the weights it was measured with."""

    validations: list[Validation] = field(default_factory=list)
    best: Validation | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def resume(extra: Mapping[str, Any], weights: Mapping[str, Tensor]) -> "Selection":
        """The selection that `state` and `weights` stored; an empty one from an empty state."""
        validations = [Validation(**row) for row in extra.get("validations", [])]
        best = next((v for v in validations if v.step == extra.get("best_step")), None)
        return Selection(validations, best, dict(weights))

    def state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint; `weights` is saved beside it."""
        return {
            "validations": [asdict(validation) for validation in self.validations],
            "best_step": None if self.best is None else self.best.step,
        }

    def add(
        self, validation: Validation, model: PreTrainedModel, section: PpoSection
    ) -> dict[str, float]:
        """Note a validation, keep its weights when it is the best, and return its metrics.

        The first one is the start's: it sets the length to compare with and is not a candidate.
        """
        self.validations.append(validation)
        is_start = len(self.validations) == 1
        eligible = not is_start and is_eligible(validation, self.validations[0], section)
        if eligible and is_better(validation, self.best):
            self.best = validation
            self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        metrics = {
            "ppo/validation_kl": float(validation.kl["mean"]),
            "ppo/validation_tokens": validation.response_tokens,
            "ppo/validation_eligible": int(eligible),
        }
        if validation.rating is not None:
            metrics["ppo/validation_rating"] = validation.rating
        return metrics
