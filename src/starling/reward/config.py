"""The recipe section of stage 2: rankings to a reward model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from starling.base.section import Section


class RewardSection(Section):
    """Stage 2: the K-wise (Plackett-Luce) reward model."""

    rankings: str | None = None
    """JSONL rankings; absent: those of the feedback stage."""
    base: str | None = None
    """Causal language model to start from; absent: the starting policy."""
    chat_format: str | None = None
    """Chat format of the reward model; absent: its base's own."""
    loss: Literal["plackett-luce", "bradley-terry", "adjacent-pairs", "best-of-k"] = "plackett-luce"
    """plackett-luce (Starling-RM): the whole ranking; the others are for comparison."""
    ties: Literal["efron", "breslow"] = "efron"
    """How plackett-luce counts answers of equal rank."""
    centring: float = Field(0.0, ge=0)
    """Penalty on the square of each prompt's sum of scores (Starling-RM: 0, advised for large)."""
    train: Literal["full", "top", "head", "lora"] = "full"
    """Which weights learn beside the head: all, the `top_layers`, none, or LoRA adapters."""
    top_layers: int = Field(4, ge=1)
    """Transformer blocks that learn with train: top."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters with train: lora; they are merged into the saved model."""
    lora_alpha: float = Field(32.0, gt=0)
    """Adapters count alpha / rank."""
    head_warmup: int = Field(0, ge=0)
    """First steps in which the head alone learns (Starling-RM: optional, on 1000 prompts)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; weights, optimizer and loss stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more time."""
    epochs: int = Field(1, ge=1)
    """Passes over the rankings (Starling-RM: 1)."""
    batch: int = Field(16, ge=1)
    """Prompts per optimizer step, over all processes; each brings its K answers."""
    tokens_per_forward: int | None = Field(None, ge=16)
    """Tokens of a micro-batch; changes memory and speed, not the result.  Absent: the device's."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate (Starling-RM-7B: 1e-5)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up (Starling-RM: constant)."""
    warmup_share: float = Field(0.05, ge=0, le=1)
    """Share of the steps that warm up linearly (Starling-RM: 0.05)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    max_length: int = Field(2000, ge=16)
    """Longest conversation in tokens; longer ones are cut, and counted (`truncate`)."""
    truncate: Literal["left", "right"] = "left"
    """left keeps the answer (Starling-RM); right cuts the answer's end and leaves it unfinished."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that accuracy is measured on."""
    policy_samples: int = Field(256, ge=0)
    """Answers of the starting policy that scores are normalised on; 0: the rankings' answers."""
    policy_tokens: int = Field(256, ge=1)
    """Longest of them; as ppo.max_response_tokens."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""


@dataclass(frozen=True)
class RewardInputs:
    """What the pipeline resolved; `base` and `policy` are folders or hub ids."""

    rankings: Path
    base: str
    policy: str | None = None
    """The starting policy, on whose answers scores are normalised; None: on the rankings'."""
    policy_format: str | None = None
    """Its chat format; None: its own."""
