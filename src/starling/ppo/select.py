"""Choose a checkpoint by the judge on validation prompts, never by reward and never by gold.

The judge is the one that ranked the candidates.  Limits on length and KL come before its opinion,
since an over-optimised policy shows in both before it shows in the score.

Shapes: B validation prompts, T token positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from starling.base.errors import CheckpointError, DataError, some
from starling.base.estimate import bootstrap_mean
from starling.base.jsonl import write_records
from starling.base.seeding import derive_seed
from starling.base.training_state import check_names
from starling.data.records import Prompt
from starling.judging.instructions import InstructedPrompt, share_followed
from starling.judging.judge import GradedAnswer, Judge, Rating
from starling.judging.refusals import is_refusal
from starling.models.interfaces import Sampling
from starling.models.parallel import from_everyone
from starling.ppo.config import PpoSection
from starling.ppo.kl import k1, sequence_kl
from starling.ppo.rollout import Collector, Rollout, sample_responses, sampling


@dataclass(frozen=True)
class Validation:
    """One policy on the validation prompts, sampled at the rollouts' temperature."""

    step: int
    rating: float | None
    """Mean of the judge's 1 to 10; None without a judge."""
    kl: dict[str, Any]
    """Estimate of the sequence KL to the reference, in nats."""
    response_tokens: float
    followed: float | None = None
    """Share of verifiable instructions followed by greedy answers; None without any."""
    refused_good: float | None = None
    """Share of good-natured prompts whose answer opens with a refusal; None where none is known."""
    answered_ill: float | None = None
    """Share of the others whose answer does not; likewise."""


@dataclass(frozen=True)
class Validator:
    """Measures the policy as it stands; the same prompts and seeds at every step.

    Every process takes part in the sampling; rank 0 asks the judge and writes.
    """

    prompts: tuple[Prompt, ...]
    instructed: tuple[InstructedPrompt, ...]
    judge: Judge | None
    collector: Collector
    seed: int
    out: Path

    def measure(self, step: int) -> Validation:
        """Sample one response per validation prompt; measure KL and length, and ask the judge.

        The answers go to `validation/step-<step>.jsonl`, where the report reads them.
        """
        samplings = [
            sampling(self.collector.section, derive_seed(self.seed, "ppo/validation", row))
            for row in range(len(self.prompts))
        ]
        answers = self.collector.collect(self.prompts, samplings)
        kl = sequence_kl(k1(answers.old_logprobs, answers.ref_logprobs), answers.response_mask)
        context = self.collector.context
        # All decide from the same ratings: what follows is done by every process or by none.
        rated, *_ = from_everyone(self._rate(answers, step) if context.rank == 0 else {}, context)
        rows = zip(answers.prompts, answers.texts, answers.is_finished.tolist(), strict=True)
        write_records(
            context.own_path(self.out / "validation" / f"step-{step:06d}.jsonl"),
            [
                {"id": prompt.id, "category": prompt.category, "answer": text}
                | {"finished": finished, "checks": prompt.checks}
                | {"kl": kl[row].item(), "score": answers.scores[row].item()}
                | {"rating": rated.get(row)}
                for row, (prompt, text, finished) in enumerate(rows)
            ],
        )
        return Validation(
            step=step,
            rating=sum(rated.values()) / len(rated) if rated else None,
            kl=asdict(bootstrap_mean(kl.tolist(), seed=self.seed)),
            response_tokens=float(answers.response_tokens.float().mean()),
            followed=self._followed(),
            refused_good=_share(answers, good_natured=True, refused=True),
            answered_ill=_share(answers, good_natured=False, refused=False),
        )

    def _followed(self) -> float | None:
        """Mean share of instructions that greedy answers follow; None where there are none."""
        if not self.instructed:
            return None
        greedy = Sampling(self.collector.section.max_response_tokens, 0.0)
        sampled = sample_responses(
            self.collector.engine,
            self.collector.codec,
            self.instructed,
            [greedy] * len(self.instructed),
        )
        shares = share_followed(self.instructed, [each.text for each in sampled])
        return sum(shares) / len(shares)

    def _rate(self, samples: Rollout, step: int) -> dict[int, float]:
        """The judge's rating by row; {} without a judge.

        Raises DataError when the judge fails on more than a tenth: no checkpoint can be selected.
        """
        if self.judge is None:
            return {}
        answers = [
            GradedAnswer(f"{step}/{prompt.id}", prompt.messages, text, prompt.checks, finished)
            for prompt, text, finished in zip(
                samples.prompts, samples.texts, samples.is_finished.tolist(), strict=True
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


def _share(answers: Rollout, *, good_natured: bool, refused: bool) -> float | None:
    """Of the prompts of this nature, the share whose answer refuses, or does not."""
    rows = zip(answers.prompts, answers.texts, strict=True)
    found = [
        is_refusal(text) is refused for prompt, text in rows if prompt.good_natured is good_natured
    ]
    return sum(found) / len(found) if found else None


def is_eligible(candidate: Validation, start: Validation, section: PpoSection) -> bool:
    """Whether length, instructions and KL allow this checkpoint."""
    return not objections(candidate, start, section)


def objections(candidate: Validation, start: Validation, section: PpoSection) -> list[str]:
    """What speaks against this checkpoint, and what to do about it.

    Starling's own rule was at most 0.05 of IFEval lost; the KL is to be 0.5 to 1.5 of its target,
    where there is one.
    """
    longest = section.select_max_length_ratio * start.response_tokens
    lost = (start.followed or 0.0) - (candidate.followed or 0.0)
    kl, target = candidate.kl["mean"], section.kl_target
    found = (
        (
            candidate.response_tokens > longest,
            f"answers of {candidate.response_tokens:.1f} tokens, over {longest:.1f}: set "
            "ppo.length_penalty, or raise ppo.select_max_length_ratio",
        ),
        (
            lost > section.select_max_instruction_drop + 1e-12,
            f"{lost:.3f} fewer of the instructions followed: lower ppo.lr or raise ppo.kl_coef",
        ),
        (
            target is not None and kl > 1.5 * target,
            f"a KL of {kl:.2f} nats, over 1.5 times its target: lower ppo.lr or raise ppo.kl_coef",
        ),
        (
            target is not None and kl < 0.5 * target,
            f"a KL of {kl:.2f} nats, under half its target: raise ppo.lr or ppo.steps, or lower "
            "ppo.kl_coef",
        ),
    )
    return [text for is_so, text in found if is_so]


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
        """The selection that `state` and `weights` stored; CheckpointError for one that is torn."""
        for row in extra["validations"]:
            check_names("a validation", [field.name for field in fields(Validation)], row)
        validations = [Validation(**row) for row in extra["validations"]]
        selected = extra["best_step"]
        best = next((each for each in validations if each.step == selected), None)
        if selected is not None and best is None:
            raise CheckpointError(
                f"the checkpoint selected step {selected}, and validated only "
                f"{some([str(each.step) for each in validations], 8)}; delete the stage's "
                "checkpoints to run the stage from its start"
            )
        return Selection(validations, best, dict(weights))

    def state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint; `weights` is saved beside it."""
        return {
            "validations": [asdict(validation) for validation in self.validations],
            "best_step": None if self.best is None else self.best.step,
        }

    def add(
        self,
        validation: Validation,
        weights: Callable[[], Mapping[str, Tensor]],
        section: PpoSection,
    ) -> dict[str, float]:
        """Note a validation, keep its weights when it is the best, and return its metrics.

        The first one is the start's: it sets the length to compare with and is not a candidate.
        """
        self.validations.append(validation)
        is_start = len(self.validations) == 1
        eligible = not is_start and is_eligible(validation, self.validations[0], section)
        if eligible and is_better(validation, self.best):
            self.best = validation
            self.weights = {name: part.detach().clone() for name, part in weights().items()}
        metrics = {
            "ppo/validation_kl": float(validation.kl["mean"]),
            "ppo/validation_tokens": validation.response_tokens,
            "ppo/validation_eligible": int(eligible),
        }
        known = {
            "ppo/validation_rating": validation.rating,
            "ppo/validation_followed": validation.followed,
            "ppo/validation_refused_good": validation.refused_good,
            "ppo/validation_answered_ill": validation.answered_ill,
        }
        return metrics | {name: value for name, value in known.items() if value is not None}
