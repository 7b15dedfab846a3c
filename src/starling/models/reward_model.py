"""The reward model: one number for a whole conversation, and the only way to it.

Architecture: transformers' sequence classifier with one label, a bias-free linear layer on the
final hidden state of the last real token (Starling-RM's, and what vLLM serves).  The read-out
position comes from lengths, never from the pad id.

Shapes: N conversations, T token positions, D model width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from starling.base.errors import ModelError
from starling.data.chat import ChatCodec
from starling.data.records import Message
from starling.models.causal_lm import Batch, length_batches, save_model
from starling.models.loading import load_codec, load_config, load_weights

HEAD_NAMES = ("score", "classifier")
HEAD_WEIGHTS = frozenset(f"{name}.{part}" for name in HEAD_NAMES for part in ("weight", "bias"))


@dataclass(frozen=True)
class Scored:
    """A conversation to score; `finished=False` for an answer that was cut at its length."""

    messages: tuple[Message, ...]
    mode: str | None = None
    finished: bool = True


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one label, its chat format, and its stored normalisation."""

    model: PreTrainedModel
    codec: ChatCodec
    mean: float = 0.0
    std: float = 1.0
    max_length: int = 2048
    truncate: str = "left"

    def __post_init__(self) -> None:
        if self.truncate not in ("left", "right"):
            raise ModelError(f"truncate is {self.truncate!r}; it must be left or right")

    @staticmethod
    def load(reference: str, *, device: str = "cpu", dtype: str = "float32") -> "RewardModel":
        """Load a trained reward model; raises ModelError that says what else it found."""
        config = load_config(reference)
        architectures = getattr(config, "architectures", None) or ["none"]
        if not architectures[0].endswith("ForSequenceClassification") or config.num_labels != 1:
            raise ModelError(
                f"{reference}: found a {architectures[0]} with {config.num_labels} label(s); a "
                "reward model is a ...ForSequenceClassification with one. Train one with the "
                "reward stage, or convert a published one: "
                "python -m starling.models.published_reward"
            )
        return RewardModel._load(reference, config, device, dtype)

    @staticmethod
    def from_language_model(
        reference: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        chat_format: str | None = None,
        seed: int,
    ) -> "RewardModel":
        """Put a new head on a causal language model: N(0, 1/(D+1)), Stiennon et al. 2020."""
        config = load_config(reference)
        config.num_labels = 1
        if type(config) not in AutoModelForSequenceClassification._model_mapping:
            raise ModelError(
                f"{reference}: {config.model_type} has no sequence-classification class in "
                "transformers; use another base for the reward model"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reward_model = RewardModel._load(
                reference, config, device, dtype, chat_format=chat_format, new_weights=HEAD_WEIGHTS
            )
            head = score_head(reward_model.model)
            torch.nn.init.normal_(head.weight, std=1 / math.sqrt(head.weight.shape[1] + 1))
        return reward_model

    @staticmethod
    def _load(
        reference: str,
        config: Any,
        device: str,
        dtype: str,
        *,
        chat_format: str | None = None,
        new_weights: frozenset[str] = frozenset(),
    ) -> "RewardModel":
        codec = load_codec(reference, config, chat_format)
        model = load_weights(
            AutoModelForSequenceClassification, reference, config, dtype, new_weights=new_weights
        )
        head = score_head(model)
        if head.bias is not None:
            raise ModelError(f"{reference}: the reward head has a bias; the architecture has none")
        limit = getattr(config, "max_position_embeddings", None) or 2048
        return RewardModel(
            model.to(device).eval(),
            codec,
            mean=float(getattr(config, "starling_reward_mean", 0.0)),
            std=float(getattr(config, "starling_reward_std", 1.0)),
            max_length=min(int(getattr(config, "starling_max_length", limit)), limit),
            truncate=getattr(config, "starling_truncate", "left"),
        )

    def save(self, folder: Path) -> None:
        """Save for `AutoModelForSequenceClassification`; normalisation stands in config.json."""
        config: Any = self.model.config
        config.starling_reward_mean = self.mean
        config.starling_reward_std = self.std
        config.starling_max_length = self.max_length
        config.starling_truncate = self.truncate
        save_model(folder, self.model, self.codec)

    def encode(self, item: Scored) -> tuple[list[int], bool]:
        """Ids of one conversation, and whether they had to be cut to `max_length`.

        Cutting from the left keeps the answer; from the right it leaves the answer unfinished, and
        no end marker is put back.
        """
        ids, mask = self.codec.encode(item.messages, mode=item.mode, finished=item.finished)
        if item.finished and True in mask:
            # ChatML writes a newline after the end marker; Starling-RM-34B reads at the marker.
            ids = ids[: len(ids) - mask[::-1].index(True)]
        if len(ids) <= self.max_length:
            return ids, False
        return (
            ids[-self.max_length :] if self.truncate == "left" else ids[: self.max_length]
        ), True

    def score(self, items: Iterable[Scored]) -> Float[Tensor, " N"]:
        """Normalised scores, in order; the same whatever else is scored with them."""
        raw = self.raw_scores([self.encode(item)[0] for item in items])
        return (raw - self.mean) / self.std

    @torch.no_grad()
    def raw_scores(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, " N"]:
        """Scores before normalisation, of encoded conversations."""
        scores = torch.zeros(len(sequences), dtype=torch.float32)
        for indices in length_batches([len(ids) for ids in sequences], self.device):
            batch = Batch([sequences[i] for i in indices], self.codec.tokenizer.pad_id, self.device)
            scores[indices] = sequence_scores(self.model, batch).cpu()
        return scores

    @property
    def device(self) -> str:
        return str(self.model.device)


def score_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The scalar head, under whichever name the architecture gives it."""
    for name in HEAD_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear):
            return head
    raise ModelError(f"{type(model).__name__} has no linear score head")


def sequence_scores(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " N"]:
    """Raw float32 scores of a right-padded batch, read at each last real token."""
    backbone: Any = model.base_model
    hidden = backbone(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(batch.lengths), device=hidden.device), batch.lengths - 1]
    return score_head(model)(last).float()[:, 0]
