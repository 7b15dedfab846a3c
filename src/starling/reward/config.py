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
    epochs: int = Field(1, ge=1)
    """Passes over the rankings (Starling-RM: 1)."""
    batch: int = Field(16, ge=1)
    """Prompts per optimizer step; each brings its K answers."""
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
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""


@dataclass(frozen=True)
class RewardInputs:
    """What the pipeline resolved; `base` is a folder or hub id."""

    rankings: Path
    base: str
