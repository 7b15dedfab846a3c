"""The recipe section of stage 0: conversations to a starting policy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from starling.base.section import Section


class Architecture(Section):
    """A new, randomly initialised model (Mistral's architecture) with a tokenizer of its own.

    For the demo and for tests; real recipes start from `sft.base`.
    """

    vocab_size: int = Field(512, ge=300)
    """Entries of the byte-level BPE, trained on the conversations."""
    hidden_size: int = Field(128, ge=8)
    """Model width."""
    intermediate_size: int = Field(384, ge=8)
    """Width of the feed-forward layer."""
    layers: int = Field(3, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    kv_heads: int = Field(2, ge=1)
    """Key-value heads (grouped-query attention)."""
    max_length: int = Field(512, ge=32)
    """Longest sequence, in tokens."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; narrow models learn faster from larger ones."""


class SftSection(Section):
    """Stage 0 (optional): cross-entropy on the assistant's tokens."""

    conversations: str
    """JSONL file of conversations that end with the assistant's turn."""
    base: str | None = None
    """Model to start from (folder or hub id); absent with `architecture`."""
    architecture: Architecture | None = None
    """Make a new small model instead of loading `base`."""
    chat_format: str | None = None
    """How messages become text: openchat, chatml, plain; absent: the base's own (new: openchat)."""
    train: Literal["full", "top", "head", "lora"] = "full"
    """Which weights learn: all, the `top_layers` and the head, the head, or LoRA adapters."""
    top_layers: int = Field(4, ge=1)
    """Transformer blocks that learn with train: top."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters with train: lora; they are merged into the saved model."""
    lora_alpha: float = Field(32.0, gt=0)
    """Adapters count alpha / rank."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; weights, optimizer and loss stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more time."""
    steps: int = Field(400, ge=1)
    """Optimizer steps."""
    batch: int = Field(64, ge=1)
    """Conversations per optimizer step, over all processes."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate; linear warm-up, then cosine decay to zero."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's beta2; lower follows a short run more closely."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    max_length: int = Field(512, ge=16)
    """Conversations longer than this many tokens are left out, and counted."""
    keep: tuple[int, ...] = ()
    """Also save the model after these steps, as `model-<step>/` (weaker candidates)."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _validate(self) -> "SftSection":
        if (self.base is None) == (self.architecture is None):
            found = "neither" if self.base is None else "both"
            raise ValueError(f"base: found {found} of base and architecture; name exactly one")
        for step in self.keep:
            if not 1 <= step <= self.steps:
                raise ValueError(f"keep: found {step}; allowed: 1 to sft.steps, {self.steps}")
        return self


@dataclass(frozen=True)
class SftInputs:
    """What the pipeline resolved for the stage; `base` is a folder, a hub id or None."""

    conversations: Path
    base: str | None
