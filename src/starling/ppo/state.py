"""What PPO's loop carries from step to step beside weights, and what a checkpoint keeps of it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from starling.base.context import Context
from starling.base.errors import InputError
from starling.base.jsonl import write_records
from starling.ppo.config import PpoSection
from starling.ppo.health import Health
from starling.ppo.kl import KlController, k1, sequence_kl
from starling.ppo.rewards import RunningMoments
from starling.ppo.rollout import Rollout
from starling.ppo.select import Selection

logger = logging.getLogger(__name__)


@dataclass
class State:
    """Plain values; the weights and the optimizer's moments stand in the modules."""

    controller: KlController
    moments: RunningMoments
    health: Health
    selection: Selection

    @staticmethod
    def resume(
        extra: Mapping[str, Any], tensors: Mapping[str, Tensor], section: PpoSection
    ) -> "State":
        """As `plain` stored it; a new one from an empty state."""
        coef = extra.get("kl_coef", section.kl_coef)
        return State(
            KlController(coef, section.kl_target, section.kl_horizon),
            RunningMoments(**extra.get("moments", {})),
            Health.resume(extra.get("health", {}), section.guards, section.kl_target),
            Selection.resume(extra, tensors),
        )

    def plain(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint; the selected weights are saved beside it."""
        return {
            **self.selection.state(),
            "kl_coef": self.controller.coef,
            "moments": asdict(self.moments),
            "health": self.health.state(),
        }

    def may_learn(
        self, step: int, metrics: Mapping[str, float], rollout: Rollout, out: Path, context: Context
    ) -> bool:
        """Whether no guard speaks against this batch, or the recipe goes on all the same.

        A flagged batch is written.  Raises InputError where the recipe wants to stop.
        """
        flags = self.health.check(step, metrics)
        if not flags:
            return True
        action = self.health.guards.action
        if context.rank == 0:
            self.write_flags(out)
            write_records(out / "flagged" / f"step-{step:06d}.jsonl", rollout_rows(rollout))
        said = " ".join(flag.sentence for flag in flags)
        if action == "stop":
            raise InputError(
                f"a guard ended the run before the update of step {step}: {said} The batch is in "
                f"{out / 'flagged'}. Change the recipe, or set ppo.guards.action: warn"
            )
        logger.warning("step %d: %s", step, said)
        return action == "warn"

    def write_flags(self, out: Path) -> None:
        """All flags of the run, those of the last update included."""
        action = self.health.guards.action
        rows = [{**asdict(flag), "action": action} for flag in self.health.flags]
        write_records(out / "flags.jsonl", rows)

    def control(self, metrics: Mapping[str, float], section: PpoSection, *, step: int) -> None:
        """Move the KL coefficient by what was measured, once the policy learns."""
        if step >= section.critic_warmup:
            episodes = section.rollout_batch * section.samples_per_prompt
            self.controller = self.controller.updated(metrics["ppo/sequence_kl"], episodes=episodes)


def rollout_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """A batch for people: what was asked and answered, and what it was worth."""
    kl = sequence_kl(k1(rollout.old_logprobs, rollout.ref_logprobs), rollout.response_mask)
    return [
        {
            "messages": [message.model_dump(mode="json") for message in prompt.messages],
            "answer": text,
            "finished": bool(rollout.is_finished[row]),
            "score": rollout.scores[row].item(),
            "kl": kl[row].item(),
            "tokens": len(rollout.response_ids[row]),
        }
        for row, (prompt, text) in enumerate(zip(rollout.prompts, rollout.texts, strict=True))
    ]
