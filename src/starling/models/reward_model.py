"""The reward model: one number for a whole conversation, and the only way to it.

Architecture: transformers' sequence classifier with one label, a bias-free linear layer on the
final hidden state of the last real token (Starling-RM's, and what vLLM serves).  The read-out
position comes from lengths, never from the pad id.  `row_scores` is the one forward of training and
of scoring; `RewardModel.score` is the one place where the stored normalisation is applied.

Shapes: N conversations, A answers of all rows, T token positions, D model width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from starling.base.errors import DataError, ModelError, some
from starling.data.chat import ChatCodec
from starling.data.records import Message
from starling.models.causal_lm import Batch, length_batches, save_model
from starling.models.loading import load_codec, load_config, load_weights
from starling.models.packing import (
    Packed,
    PackedRow,
    depends_on_longest,
    packed_batches,
    packed_ends,
    share_prompt,
    why_not_packed,
)

HEAD_NAMES = ("score", "classifier")
READ_OUTS = ("last_token", "published_padded")
HEAD_WEIGHTS = frozenset(f"{name}.{part}" for name in HEAD_NAMES for part in ("weight", "bias"))

Rows = Sequence[Sequence[Sequence[int]]]
"""Encoded conversations; those of one row had better begin alike, for what they share counts once.
"""


@dataclass(frozen=True)
class Scored:
    """A conversation to score; `finished=False` for an answer that was cut at its length."""

    messages: tuple[Message, ...]
    mode: str | None = None
    finished: bool = True
    id: str = ""
    """What an error calls it; absent, its number."""


class Score(NamedTuple):
    """A conversation's score, normalised and raw, and how much of it the model read."""

    score: float
    raw_score: float
    num_tokens: int
    was_cut: bool


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one label, its chat format, and its stored normalisation.

    `read_out` is `last_token`, or `published_padded`: as Starling-RM-7B-alpha's own snippet does,
    which pads to `max_length` with <unk>, takes the id of <s> for the pad's, and so reads the last
    slot, whatever stands in it.
    """

    model: PreTrainedModel
    codec: ChatCodec
    mean: float = 0.0
    std: float = 1.0
    max_length: int = 2048
    truncate: str = "left"
    read_out: str = "last_token"

    def __post_init__(self) -> None:
        if self.truncate not in ("left", "right"):
            raise ModelError(f"truncate is {self.truncate!r}; it must be left or right")
        if self.read_out not in READ_OUTS:
            raise ModelError(f"read_out is {self.read_out!r}; it must be {' or '.join(READ_OUTS)}")

    @staticmethod
    def load(reference: str, *, device: str = "cpu", dtype: str = "float32") -> "RewardModel":
        """Load a trained reward model; raises ModelError that says what else it found."""
        return RewardModel._load(reference, reward_config(reference), device, dtype)

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
        return RewardModel(model.to(device).eval(), codec, **stored_reading(config))

    def save(self, folder: Path) -> None:
        """Save for `AutoModelForSequenceClassification`; normalisation stands in config.json."""
        config: Any = self.model.config
        config.starling_reward_mean = self.mean
        config.starling_reward_std = self.std
        config.starling_max_length = self.max_length
        config.starling_truncate = self.truncate
        config.starling_read_out = self.read_out
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
        return torch.tensor([found.score for found in self.score_each(items)])

    def score_each(self, items: Iterable[Scored]) -> list[Score]:
        """As `score`, with what lies behind each number; DataError names those that are none."""
        items = list(items)
        encoded = [self.encode(item) for item in items]
        rows: dict[Any, list[int]] = {}
        for number, item in enumerate(items):
            rows.setdefault((item.messages[:-1], item.mode), []).append(number)
        found = self.raw_scores([[encoded[number][0] for number in row] for row in rows.values()])
        raw = [0.0] * len(items)
        for row, values in zip(rows.values(), found, strict=True):
            for number, value in zip(row, values, strict=True):
                raw[number] = value
        names = [item.id or str(number) for number, item in enumerate(items, start=1)]
        if broken := [
            name for name, value in zip(names, raw, strict=True) if not math.isfinite(value)
        ]:
            raise DataError(
                f"the scores of {len(broken)} of {len(items)} conversations are no finite numbers "
                f"({some(broken, 8)}); look at these and at the reward model's weights"
            )
        return [
            Score(self.normalised(value), value, len(ids), was_cut)
            for value, (ids, was_cut) in zip(raw, encoded, strict=True)
        ]

    def normalised(self, raw_score: float) -> float:
        """The stored normalisation; nothing else applies it."""
        return (raw_score - self.mean) / self.std

    @torch.no_grad()
    def raw_scores(self, rows: Rows) -> list[list[float]]:
        """Scores before normalisation, of every row's encoded conversations."""
        tokens, width = self.codec.tokenizer, self.max_length
        if self.read_out == "published_padded":
            flat = [ids for row in rows for ids in row]
            scores = iter(_padded_scores(self.model, flat, tokens.pad_id, width).tolist())
            return [[next(scores) for _ in row] for row in rows]
        found: list[list[float]] = [[] for _ in rows]
        if why_not_packed(self.model) is None:
            batches = packed_batches([_packed_row(row) for row in rows], self.device)
        else:
            batches = [list(range(len(rows)))]
        for batch in batches:
            chosen = [rows[number] for number in batch]
            scores = iter(row_scores(self.model, chosen, tokens.pad_id).tolist())
            for number, row in zip(batch, chosen, strict=True):
                found[number] = [next(scores) for _ in row]
        return found

    @property
    def device(self) -> str:
        return str(self.model.device)


def reward_config(reference: str) -> Any:
    """The config of a trained reward model; raises ModelError that says what else it is."""
    config = load_config(reference)
    architectures = getattr(config, "architectures", None) or ["none"]
    if not architectures[0].endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ModelError(
            f"{reference}: found a {architectures[0]} with {config.num_labels} label(s); a "
            "reward model is a ...ForSequenceClassification with one. Train one with the "
            "reward stage, or convert a published one: "
            "python -m starling.models.published_reward"
        )
    return config


def stored_reading(config: Any) -> dict[str, Any]:
    """How config.json says that a reward model reads and normalises; RewardModel's fields."""
    limit = getattr(config, "max_position_embeddings", None) or 2048
    return {
        "mean": float(getattr(config, "starling_reward_mean", 0.0)),
        "std": float(getattr(config, "starling_reward_std", 1.0)),
        "max_length": min(int(getattr(config, "starling_max_length", limit)), limit),
        "truncate": getattr(config, "starling_truncate", "left"),
        "read_out": getattr(config, "starling_read_out", "last_token"),
    }


def score_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The scalar head, under whichever name the architecture gives it."""
    for name in HEAD_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear):
            return head
    raise ModelError(f"{type(model).__name__} has no linear score head")


def row_scores(model: PreTrainedModel, rows: Rows, pad_id: int) -> Float[Tensor, " A"]:
    """Raw float32 scores of all conversations, row by row: the forward of training and scoring.

    What a row's conversations have in common is computed once, where the architecture allows; else
    they are computed apart, similar lengths together.
    """
    if why_not_packed(model) is None:
        packed = Packed([_packed_row(row) for row in rows], model.device)
        return _read(model, packed_ends(model, packed))
    sequences = [ids for row in rows for ids in row]
    batches = length_batches([len(ids) for ids in sequences], str(model.device))
    if depends_on_longest(model.config):
        batches = [[number] for number in range(len(sequences))]
    scores = [
        sequence_scores(model, Batch([sequences[i] for i in batch], pad_id, str(model.device)))
        for batch in batches
    ]
    order = torch.tensor([index for batch in batches for index in batch], device=model.device)
    return torch.cat([*scores, torch.zeros(0, device=model.device)])[order.argsort()]


def _packed_row(row: Sequence[Sequence[int]]) -> PackedRow:
    return share_prompt(row) if len(row) > 1 else PackedRow((), (tuple(row[0]),))


def sequence_scores(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " N"]:
    """Raw float32 scores of a right-padded batch, read at each last real token."""
    backbone: Any = model.base_model
    hidden = backbone(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    last = torch.arange(len(batch.lengths), device=hidden.device), batch.lengths - 1
    return _read(model, hidden[last])


def _padded_scores(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int, width: int
) -> Float[Tensor, " N"]:
    """Raw scores read at the last of `width` slots, where shorter sequences have padding."""
    backbone: Any = model.base_model
    slots = torch.arange(width, device=model.device)
    scores = []
    for ids in sequences:
        batch = Batch([ids], pad_id, str(model.device))
        padded = pad(batch.token_ids, (0, width - len(ids)), value=pad_id)
        mask = (slots < len(ids))[None]
        hidden = backbone(input_ids=padded, attention_mask=mask, use_cache=False)
        scores.append(_read(model, hidden.last_hidden_state[:, -1]))
    return torch.cat(scores) if scores else torch.zeros(0)


def _read(model: PreTrainedModel, states: Float[Tensor, "A D"]) -> Float[Tensor, " A"]:
    """The head's value of each state."""
    # A sum of products, not the layer: autocast would round the scores to bfloat16, 0.03 at 4.
    return (states.float() * score_head(model).weight.float()).sum(dim=-1)
