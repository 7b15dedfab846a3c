"""What PPO's loop carries from step to step beside weights, and what a checkpoint keeps of it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from starling.base.checkpoint import Snapshot
from starling.base.context import Context
from starling.base.errors import InputError
from starling.base.jsonl import write_records
from starling.base.training_state import check_names
from starling.ppo.config import PpoSection
from starling.ppo.health import Flag, Health
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
    def resume(snapshot: Snapshot, section: PpoSection) -> "State":
        """As `plain` stored it, or a new one; CheckpointError for a state of other fields."""
        new = State(
            KlController(section.kl_coef, section.kl_target, section.kl_horizon),
            RunningMoments(),
            Health(section.guards, section.kl_target),
            Selection(),
        )
        extra = snapshot.state["extra"]
        if snapshot.step == 0:
            return new
        check_names("state of ppo", new.plain(), extra)
        check_names("running moments", asdict(new.moments), extra["moments"])
        check_names("guards", new.health.state(), extra["health"])
        for flag in extra["health"]["flags"]:
            check_names("a flag", [field.name for field in fields(Flag)], flag)
        return State(
            replace(new.controller, coef=extra["kl_coef"]),
            RunningMoments(**extra["moments"]),
            Health.resume(extra["health"], section.guards, section.kl_target),
            Selection.resume(extra, snapshot.tensors),
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
