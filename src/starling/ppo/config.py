"""The recipe section of stage 3: a policy against a reward model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from starling.base.section import Section
from starling.judging.config import JudgeSection


class PpoSection(Section):
    """Stage 3: PPO as in "Fine-Tuning Language Models from Human Preferences" (Ziegler 2019)."""

    policy: str | None = None
    """Starting policy; absent: the sft stage's model, or the recipe's `policy`."""
    chat_format: str | None = None
    """Chat format of the starting policy; absent: its own."""
    prompts: str | None = None
    """JSONL prompts; absent: those of the feedback stage."""
    reward_model: str | None = None
    """Reward model folder; absent: the reward stage's."""
    validation: str | None = None
    """Prompts for checkpoint selection; absent: `validation_prompts` of `prompts`, kept apart."""
    validation_prompts: int = Field(64, ge=2)
    """How many validation prompts each selection round judges."""
    steps: int = Field(100, ge=1)
    """PPO iterations: one rollout batch each."""
    rollout_batch: int = Field(64, ge=1)
    """Prompts per iteration."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses sampled for each prompt."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over each rollout batch (Ziegler 2019: 4)."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass (Ziegler 2019: 1)."""
    microbatch: int = Field(64, ge=1)
    """Responses per forward pass; changes memory, not the result."""
    max_response_tokens: int = Field(64, ge=1)
    """Longest response."""
    max_prompt_tokens: int = Field(448, ge=1)
    """Longer prompts lose whole turns from their beginning."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of rollouts; logits are divided by it everywhere."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate; decays linearly to zero (Ziegler 2019)."""
    warmup_steps: int = Field(0, ge=0)
    """Iterations of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    adam_eps: float = Field(1e-5, gt=0)
    """AdamW epsilon (Ziegler 2019: 1e-5)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    clip_range: float = Field(0.2, gt=0)
    """Policy ratio clip."""
    value_clip_range: float = Field(0.2, gt=0)
    """Value clip around the rollout's values."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    kl_coef: float = Field(0.05, ge=0)
    """KL penalty per nat, at the start when `kl_target` is set."""
    kl_target: float | None = Field(None, gt=0)
    """Target KL to the reference in nats per sequence; absent: `kl_coef` stays fixed."""
    kl_horizon: int = Field(10_000, ge=1)
    """Episodes over which the controller reacts (Ziegler 2019: 10000)."""
    missing_end_penalty: float | None = -1.0
    """Replaces the score of a response that was cut (Ziegler 2019: -1); null: scored as it is."""
    reward_clip: float | None = Field(None, gt=0)
    """Clip normalised scores to this magnitude; absent: not clipped."""
    critic: Literal["shared", "separate"] = "shared"
    """shared: a zero-initialised head on the policy's trunk (Ziegler 2019); separate: a copy."""
    select_every: int = Field(10, ge=1)
    """Iterations between validation rounds, where a checkpoint may be selected by the judge."""
    select_max_length_ratio: float = Field(1.1, gt=0)
    """A selected checkpoint's answers are at most this many times as long as the start's."""
    checkpoint_every: int = Field(10, ge=1)
    """Iterations between checkpoints."""

    @model_validator(mode="after")
    def _validate(self) -> "PpoSection":
        episodes = self.rollout_batch * self.samples_per_prompt
        if episodes % self.minibatches:
            raise ValueError(f"minibatches: {self.minibatches} does not divide {episodes} episodes")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_coef: 0 can never grow towards kl_target; set it above 0")
        if self.kl_target is not None and 0.2 * episodes / self.kl_horizon >= 1:
            raise ValueError(
                f"kl_horizon: {self.kl_horizon} is too short for {episodes} episodes an iteration: "
                f"the controller could multiply kl_coef by 0; set it above {episodes // 5}"
            )
        return self


@dataclass(frozen=True)
class PpoInputs:
    """What the pipeline resolved; without `judge` the last checkpoint is kept."""

    policy: str
    prompts: Path
    reward_model: str
    validation: Path | None
    judge: JudgeSection | None
