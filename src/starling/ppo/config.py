"""The recipe section of stage 3: a policy against a reward model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from starling.base.section import Section
from starling.judging.config import JudgeSection


class RewardSource(Section):
    """One of several reward models: a folder, or a server beside the folder that says how to read.

    Scores of each are normalised as its folder says, so that weights compare.
    """

    model: str
    """Reward model folder or hub id; with `url`, only its tokenizer, format and normalisation."""
    url: str | None = None
    """Server that holds the weights (vllm serve FOLDER --runner pooling)."""
    served_model: str | None = None
    """The model's name at the server; absent, the only one."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key."""
    weight: float = Field(default=1.0, gt=0)
    """Its share in the weighted mean."""


class Guards(Section):
    """Limits beyond which a rollout batch is not learned from; checked before the update.

    Those on an update speak after it, against the next batch.  null switches a guard off, but for
    max_sequence_kl's.  docs/metrics.md says what each figure is.
    """

    action: Literal["warn", "skip", "stop"] = "warn"
    """On a flag: go on, leave the batch out, or end the run; the batch is written in each case."""
    max_sequence_kl: float | None = Field(None, gt=0)
    """Mean KL to the reference, nats per sequence; absent: four times `kl_target`, if there is one.
    """
    min_sequence_kl: float | None = -0.5
    """A lower mean is no noise: padding, dropout or another temperature crept in."""
    max_sampler_mismatch: float | None = Field(0.1, gt=0)
    """Mean |sampler's - trainer's logprob| of a token, nats."""
    max_clip_fraction: float | None = Field(0.5, gt=0, le=1)
    """Share of tokens that the last update clipped."""
    max_ratio: float | None = Field(2.0, gt=1)
    """Mean ratio of new to old probability in the last update."""
    max_approx_kl: float | None = Field(0.5, gt=0)
    """How far the last update went from the policy that sampled, nats per token."""
    max_first_approx_kl: float | None = Field(0.01, gt=0)
    """The same before its first step, where old and new logprobs are of the same weights."""
    min_entropy: float | None = Field(0.01, ge=0)
    """Estimated entropy of the policy, nats per token."""
    min_explained_variance: float | None = -2.0
    """Of the critic, after `warmup` iterations."""
    min_end_rate: float | None = Field(0.5, ge=0, le=1)
    """Share of responses that ended by themselves, after `warmup` iterations."""
    max_length_ratio: float | None = Field(1.5, gt=1)
    """Mean response length over that of the first `warmup` iterations."""
    max_length_correlation: float | None = Field(0.9, gt=0, le=1)
    """Correlation of score and length within a batch, mean of the last `warmup` iterations."""
    min_score_std: float | None = Field(1e-4, ge=0)
    """Spread of the shaped scores in a batch: with none there is nothing to learn."""
    warmup: int = Field(5, ge=1)
    """Iterations that a start is averaged over, and after which all guards watch."""


class PpoSection(Section):
    """Stage 3: PPO as in "Fine-Tuning Language Models from Human Preferences" (Ziegler 2019)."""

    policy: str | None = None
    """Starting policy; absent: the sft stage's model, or the recipe's `policy`."""
    chat_format: str | None = None
    """Chat format of the starting policy; absent: its own."""
    prompts: str | None = None
    """JSONL prompts; absent: those of the feedback stage."""
    reward_model: str | None = None
    """Reward model folder; absent: the reward stage's, or those of `reward_models`."""
    reward_models: tuple[RewardSource, ...] = ()
    """Several reward models, or a served one, instead of `reward_model`."""
    combine: Literal["mean", "minimum", "pessimistic"] = "mean"
    """Of several scores: weighted mean, minimum, or mean - `pessimism` x standard deviation."""
    pessimism: float = Field(1.0, ge=0)
    """Standard deviations that combine: pessimistic subtracts."""
    validation: str | None = None
    """Prompts for checkpoint selection; absent: `validation_prompts` of `prompts`, kept apart."""
    validation_prompts: int = Field(64, ge=2)
    """How many validation prompts each selection round judges."""
    instructions: str | None = None
    """Prompts with verifiable `instructions`, for selection's check; absent: no check."""
    steps: int = Field(100, ge=1)
    """PPO iterations: one rollout batch each."""
    rollout_batch: int = Field(64, ge=1)
    """Prompts per iteration, over all processes."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses sampled for each prompt."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over each rollout batch (Ziegler 2019: 4)."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass (Ziegler 2019: 1); a prompt's samples stay together."""
    microbatch: int | None = Field(None, ge=1)
    """Responses per forward pass at most; changes memory, not the result."""
    tokens_per_forward: int | None = Field(None, ge=16)
    """Tokens per forward pass; changes memory and speed, not the result.  Absent: the device's."""
    max_response_tokens: int = Field(64, ge=1)
    """Longest response."""
    max_prompt_tokens: int = Field(448, ge=1)
    """Longer prompts lose whole turns from their beginning."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of rollouts; logits are divided by it everywhere."""
    train: Literal["full", "top", "head", "lora"] = "full"
    """Which weights learn: all, the `top_layers` with norm and head, the head, or LoRA adapters."""
    top_layers: int = Field(4, ge=1)
    """Transformer blocks that learn with train: top (Starling-LM-7B-alpha: 4)."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters with train: lora; they are merged into the saved model."""
    lora_alpha: float = Field(32.0, gt=0)
    """Adapters count alpha / rank."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; weights, optimizer and losses stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more time."""
    objective: Literal["ppo", "apa"] = "ppo"
    """ppo: the clipped ratio; apa: regression on the advantage (Starling-LM-7B-alpha)."""
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs the critic; rloo and grpo compare the samples of one prompt and have none."""
    apa_lambda: float = Field(1.0, gt=0)
    """APA's temperature: the target is exp(A / lambda) (Starling-LM-7B-alpha: 1)."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "constant"] = "linear"
    """After warm-up: to zero (Ziegler 2019), or as it is."""
    warmup_steps: int = Field(0, ge=0)
    """Iterations of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's second decay rate; the first is 0.9."""
    adam_eps: float = Field(1e-5, gt=0)
    """AdamW epsilon (Ziegler 2019: 1e-5)."""
    adam_form: Literal["pytorch", "tensorflow"] = "pytorch"
    """Where epsilon stands: beside the corrected root, or the uncorrected one (Ziegler 2019)."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are clipped to this global norm; null: not clipped (Ziegler 2019)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation, keeping their mean (Ziegler 2019, style tasks)."""
    whiten_advantages: bool = True
    """GAE's advantages to mean 0 and variance 1 over the whole rollout batch."""
    clip_range: float = Field(0.2, gt=0)
    """Policy ratio clip."""
    value_clip_range: float | None = Field(0.2, gt=0)
    """Value clip around the rollout's values; null: not clipped."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    kl_coef: float = Field(0.05, ge=0)
    """KL penalty per nat, at the start when `kl_target` is set."""
    kl_target: float | None = Field(None, gt=0)
    """Target KL to the reference in nats per sequence; absent: `kl_coef` stays fixed."""
    kl_horizon: int = Field(10_000, ge=1)
    """Episodes over which the controller reacts (Ziegler 2019: 10000)."""
    missing_end_penalty: float | None = Field(-1.0, le=0)
    """For a response that was cut (Ziegler 2019: -1); null: scored as it is."""
    missing_end: Literal["replace", "add"] = "replace"
    """The penalty stands for the score (Ziegler 2019), or is added to it."""
    reward_centre: Literal["none", "running"] = "none"
    """Subtract the running mean of the scores; comes first."""
    reward_clip: float | None = Field(None, gt=0)
    """Clip normalised scores to this magnitude; comes second.  Absent: not clipped."""
    reward_scale: Literal["none", "running"] = "none"
    """Divide by the running deviation of the scores (Starling-LM-7B-alpha); comes third."""
    reward_shift: float = 0.0
    """Added after scaling: slightly above 0 holds length down (Starling's trick, with centring)."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted for each response token, after the shift."""
    critic: Literal["shared", "separate", "reward-model"] = "shared"
    """shared: a zero-initialised head on the policy's trunk (Ziegler 2019); separate: a copy of the
    policy; reward-model: a copy of the reward model, where the vocabularies are the same."""
    critic_warmup: int = Field(0, ge=0)
    """First iterations in which the critic alone learns."""
    critic_gate: float | None = Field(None, gt=0)
    """A minibatch whose value loss is above this moves by it alone (Starling-LM-7B-alpha: 1)."""
    old_logprobs: Literal["recomputed", "sampler"] = "recomputed"
    """Whose logprobs ratios start from: the trainer's, or the engine's own, which saves a forward
    and is right where both have the same weights and precision (see `ppo/first_approx_kl`)."""
    importance_cap: float | None = Field(None, ge=1)
    """Weigh tokens by min(cap, trainer's / sampler's probability), for engines that differ."""
    select_every: int = Field(10, ge=1)
    """Iterations between validation rounds, where a checkpoint may be selected by the judge."""
    select_max_length_ratio: float = Field(1.1, gt=0)
    """A selected checkpoint's answers are at most this many times as long as the start's."""
    select_max_instruction_drop: float = Field(0.05, ge=0)
    """Largest loss of followed instructions against the start (Starling: 0.05 of IFEval)."""
    guards: Guards = Guards.model_validate({})
    """When to speak up, skip or stop."""
    checkpoint_every: int = Field(10, ge=1)
    """Iterations between checkpoints."""

    @model_validator(mode="after")
    def _validate(self) -> "PpoSection":
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        episodes = self.rollout_batch * self.samples_per_prompt
        is_adaptive = self.kl_target is not None
        has_critic = self.advantages == "gae"
        from_reward = self.critic == "reward-model"
        served = [source for source in self.reward_models if source.url is not None]
        checks = (
            (
                self.rollout_batch % self.minibatches != 0,
                f"minibatches: {self.minibatches} does not divide {self.rollout_batch} prompts",
            ),
            (
                is_adaptive and self.kl_coef == 0,
                "kl_coef: 0 can never grow towards kl_target; set it above 0",
            ),
            (
                is_adaptive and 0.2 * episodes / self.kl_horizon >= 1,
                f"kl_horizon: {self.kl_horizon} is too short for {episodes} episodes an iteration: "
                f"the controller could multiply kl_coef by 0; set it above {episodes // 5}",
            ),
            (
                not has_critic and self.samples_per_prompt < 2,
                f"samples_per_prompt: {self.advantages} compares a prompt's samples; set 2 or up",
            ),
            (
                not has_critic and bool(self.critic_warmup or self.critic_gate),
                f"advantages: {self.advantages} has no critic to warm up or to gate",
            ),
            (
                not has_critic and (self.whiten_rewards or from_reward),
                f"advantages: {self.advantages} has no critic, nor rewards to whiten; leave "
                "whiten_rewards and critic out",
            ),
            (
                self.reward_model is not None and bool(self.reward_models),
                "reward_models: stands beside reward_model; name all models there",
            ),
            (
                from_reward and (len(self.reward_models) > 1 or bool(served)),
                "critic: reward-model needs one reward model, with its weights in this process; "
                "set shared or separate",
            ),
            (
                self.old_logprobs == "sampler" and self.importance_cap is not None,
                "importance_cap: compares the sampler with recomputed old logprobs; leave one out",
            ),
            (
                from_reward and self.train in ("top", "head"),
                f"critic: reward-model shares no trunk with train: {self.train}; set separate",
            ),
            (
                self.adam_form == "tensorflow" and bool(self.critic_warmup or self.critic_gate),
                "adam_form: tensorflow counts the steps of all weights together; leave out "
                "critic_warmup and critic_gate",
            ),
            (
                self.steps <= self.critic_warmup,
                f"critic_warmup: {self.critic_warmup} of {self.steps} steps leave the policy none",
            ),
        )
        return (problem for is_wrong, problem in checks if is_wrong)


@dataclass(frozen=True)
class PpoInputs:
    """What the pipeline resolved; without `judge` the last checkpoint is kept."""

    policy: str
    prompts: Path
    reward_models: tuple[RewardSource, ...]
    """Their folders found; one, or several."""
    validation: Path | None
    judge: JudgeSection | None
    instructions: Path | None = None
    questions: Path | None = None
    """The bench's, none of which may be trained or selected on."""
