"""What PPO's loop carries from step to step beside weights, and what a checkpoint keeps of it."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from starling.base.checkpoint import Snapshot
from starling.base.context import Context
from starling.base.errors import CheckpointError, InputError
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
        try:
            controller = replace(new.controller, coef=extra["kl_coef"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's kl_coef is {extra['kl_coef']!r} ({error}); delete the stage's "
                "checkpoints to run the stage from its start"
            ) from error
        return State(
            controller,
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
        self._note([flag for flag in flags if flag.step == step], rollout, out, context)
        action = self.health.guards.action
        if flags and action == "stop":
            raise InputError(
                f"a guard ended the run before the update of step {step}: {_said(flags)} The batch "
                f"is in {out / 'flagged'}. Change the recipe, with which the stage begins again"
            )
        return not flags or action == "warn"

    def note_update(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollout: Rollout,
        out: Path,
        context: Context,
    ) -> None:
        """Say and write what an update went beyond; the next batch may pay for it."""
        self._note(self.health.check_update(step, metrics), rollout, out, context)

    def _note(self, flags: Sequence[Flag], rollout: Rollout, out: Path, context: Context) -> None:
        if not flags:
            return
        step = flags[0].step
        logger.warning("step %d: %s", step, _said(flags))
        if context.rank == 0:
            action = self.health.guards.action
            rows = [{**asdict(flag), "action": action} for flag in self.health.flags]
            write_records(out / "flags.jsonl", rows)
            write_records(out / "flagged" / f"step-{step:06d}.jsonl", rollout_rows(rollout))

    def control(self, metrics: Mapping[str, float], section: PpoSection, *, step: int) -> None:
        """Move the KL coefficient by what was measured, once the policy learns."""
        if step >= section.critic_warmup and math.isfinite(metrics["ppo/sequence_kl"]):
            episodes = section.rollout_batch * section.samples_per_prompt
            self.controller = self.controller.updated(metrics["ppo/sequence_kl"], episodes=episodes)


def _said(flags: Sequence[Flag]) -> str:
    return " ".join(flag.sentence for flag in flags)


def _number(value: Tensor) -> float | None:
    """What JSON can hold of it."""
    return value.item() if bool(value.isfinite()) else None


def rollout_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """A batch for people: what was asked and answered, and what it was worth."""
    kl = sequence_kl(k1(rollout.old_logprobs, rollout.ref_logprobs), rollout.response_mask)
    return [
        {
            "messages": [message.model_dump(mode="json") for message in prompt.messages],
            "answer": text,
            "finished": bool(rollout.is_finished[row]),
            "score": _number(rollout.scores[row]),
            "kl": _number(kl[row]),
            "tokens": len(rollout.response_ids[row]),
        }
        for row, (prompt, text) in enumerate(zip(rollout.prompts, rollout.texts, strict=True))
    ]
