"""Stage 2: a K-wise (Plackett-Luce) reward model from rankings.

Shapes: B prompts, K answers of each.  Masks: True = keep.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from starling.base.context import Context
from starling.base.errors import DataError, some
from starling.base.jsonl import write_json, write_records
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.records import RankingRow
from starling.data.rows import read_rows
from starling.models.adapters import choose_parameters
from starling.models.causal_lm import padded_mask
from starling.models.codec import find_codec
from starling.models.packing import packed_batches, share_prompt, why_not_packed
from starling.models.parallel import Forward, parallel, share_batches, summed
from starling.models.reward_model import RewardModel, row_scores, score_head
from starling.models.training import (
    Journal,
    adamw,
    batch_indices,
    constant,
    cosine,
    warmup_then,
)
from starling.reward.config import RewardInputs, RewardSection
from starling.reward.dataset import RankedRow, encode_rankings
from starling.reward.evaluate import evaluate
from starling.reward.loss import (
    UNRANKED,
    best_of_k_loss,
    bradley_terry_loss,
    centring,
    plackett_luce_loss,
)
from starling.reward.normalise import normalised

logger = logging.getLogger(__name__)

RankingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores, ranks and mask [B, K] to each row's loss [B]."""


def run(section: RewardSection, inputs: RewardInputs, out: Path, context: Context) -> Summary:
    """Train on all but the held-out prompts, normalise, measure on the held-out ones, save."""
    quarantine = context.own_path(out / "quarantine.jsonl")
    rankings = read_rows(inputs.rankings, RankingRow, quarantine=quarantine)
    if inputs.policy is not None:
        find_codec(inputs.policy, inputs.policy_format)  # refused now, not after the training
    reward_model = RewardModel.from_language_model(
        inputs.base,
        device=context.device,
        chat_format=section.chat_format,
        seed=derive_seed(context.seed, "reward/head"),
    )
    limit = min(section.max_length, reward_model.max_length)
    reward_model = dataclasses.replace(reward_model, max_length=limit, truncate=section.truncate)
    rows = encode_rankings(rankings, reward_model, held_out=section.held_out, seed=context.seed)
    losses, model = train(section, reward_model, rows.train, out, context)
    if model is None:  # the first process alone measures and saves
        return Summary("")
    trained = dataclasses.replace(reward_model, model=model)
    trained = normalised(trained, rankings, inputs, section, context)
    trained.save(out / "model")
    figures = _measure(trained, rows.held_out, out, context.seed)
    accuracy, length_only = figures["pair_accuracy"], figures["length_only_accuracy"]
    sentence = (
        f"Trained a reward model on {len(rows.train)} rankings: {accuracy['mean']:.3f} of held-out "
        f"pairs in order, length alone {length_only['mean']:.3f} -> {out / 'model'}"
    )
    return Summary(
        sentence,
        figures
        | {
            "loss": sum(losses) / len(losses),
            "rankings": {"train": len(rows.train), "held_out": len(rows.held_out)},
            "answers": rows.num_answers,
            "answers_cut": rows.num_cut,
        },
    )


def train(
    section: RewardSection,
    reward_model: RewardModel,
    rows: Sequence[RankedRow],
    out: Path,
    context: Context,
) -> tuple[list[float], PreTrainedModel | None]:
    """Train, or go on where a killed run stopped.

    Returns the losses of the last 20 steps, and the model: whole, plain, on the first process only.
    """
    model, pad_id = reward_model.model, reward_model.codec.tokenizer.pad_id
    if reason := why_not_packed(model):
        logger.warning("each answer is computed with its own copy of the prompt: %s", reason)
    steps = max(1, section.epochs * len(rows) // section.batch)
    warmup_steps = round(section.warmup_share * steps)
    decay = cosine(steps, warmup_steps) if section.schedule == "cosine" else constant
    choose_parameters(model, section, seed=derive_seed(context.seed, "reward/adapters"))
    function = partial(weighted_loss, pad_id=pad_id, ranking_loss=ranking_loss(section))
    forward = parallel(
        model,
        function,
        context,
        precision=section.precision,
        gradient_checkpointing=section.gradient_checkpointing,
    )
    trainable = adamw("model", model, section, warmup_then(decay, warmup_steps))
    every = section.checkpoint_every
    with Journal(out, trainable, context, "reward", steps, every=every) as journal:
        snapshot = journal.resume()
        losses: list[float] = snapshot.state["extra"].get("losses", [])
        for step in range(snapshot.step, steps):
            chosen = batch_indices(step, section.batch, len(rows), context.seed, "reward/order")
            batch = [rows[i] for i in chosen]
            loss = accumulate(forward, batch, context, section.tokens_per_forward)
            if step < section.head_warmup:
                keep_head_only(model)
            grad_norm = trainable.step(step)
            losses = [*losses, loss][-20:]
            metrics = {"reward/loss": loss, "reward/grad_norm": grad_norm}
            journal.log(step + 1, metrics, f"loss {loss:.3f}")
            journal.boundary(step + 1, {"losses": losses})
    return losses, forward.whole()


def accumulate(
    forward: Forward, rows: Sequence[RankedRow], context: Context, tokens: int | None = None
) -> float:
    """Add the gradient of the rows' weighted mean loss, in forwards of so many tokens; that mean.

    Each process takes its share of the forwards; the gradient is that of one process with all.
    """
    weight = sum(row.weight for row in rows)
    packed = [share_prompt(row.sequences) for row in rows]
    batches = packed_batches(packed, context.device, tokens=tokens)
    total = torch.zeros((), device=context.device)
    for indices, counts in share_batches(batches, context):
        loss = forward([rows[i] for i in indices]) * (counts / weight)
        # Several processes' gradients are averaged.
        (loss * context.world_size).backward()
        total += loss.detach()
    return float(summed(total, context))


def weighted_loss(
    model: PreTrainedModel, rows: Sequence[RankedRow], *, pad_id: int, ranking_loss: RankingLoss
) -> Float[Tensor, ""]:
    """Sum of the rows' losses times their weights; DataError for scores that are no numbers."""
    flat = row_scores(model, [row.sequences for row in rows], pad_id)
    keep = padded_mask([[True] * len(row.sequences) for row in rows], str(flat.device))
    scores = torch.zeros(keep.shape, device=flat.device).masked_scatter(keep, flat)
    is_number = scores.isfinite().all(dim=1)
    if not is_number.all():
        broken = [row.id for row, fine in zip(rows, is_number.tolist(), strict=True) if not fine]
        raise DataError(
            f"scores are not finite on the rankings {some(broken, 8)}; lower reward.lr, or look at "
            "these rows and at the weights of reward.base"
        )
    ranks = torch.full(keep.shape, UNRANKED, device=flat.device)
    for number, row in enumerate(rows):
        known = [UNRANKED if rank is None else rank for rank in row.ranks]
        ranks[number, : len(known)] = torch.tensor(known, device=flat.device)
    weights = torch.tensor([row.weight for row in rows], device=flat.device)
    return (weights * ranking_loss(scores, ranks, keep)).sum()


def ranking_loss(section: RewardSection) -> RankingLoss:
    """The recipe's loss of each row [B], from scores, ranks and mask [B, K]."""
    loss: RankingLoss = {
        "plackett-luce": partial(plackett_luce_loss, ties=section.ties),
        "bradley-terry": bradley_terry_loss,
        "adjacent-pairs": partial(bradley_terry_loss, adjacent=True),
        "best-of-k": best_of_k_loss,
    }[section.loss]
    if section.centring == 0:
        return loss
    return lambda scores, ranks, keep: (
        loss(scores, ranks, keep) + section.centring * centring(scores, keep)
    )


def keep_head_only(model: PreTrainedModel) -> None:
    """Drop every gradient but the head's; AdamW leaves weights without one as they are."""
    head = set(score_head(model).parameters())
    for parameter in model.parameters():
        if parameter not in head:
            parameter.grad = None


def _measure(
    reward_model: RewardModel, rows: Sequence[RankedRow], out: Path, seed: int
) -> dict[str, Any]:
    """Write evaluation.json and held_out.jsonl; the two figures that everything else shows."""
    raw = reward_model.raw_scores([row.sequences for row in rows])
    scores = [[reward_model.normalised(value) for value in values] for values in raw]
    evaluation = evaluate(rows, scores, seed=seed, scale=reward_model.std)
    write_json(out / "evaluation.json", evaluation)
    write_records(
        out / "held_out.jsonl",
        (
            {"id": row.id, "rank": rank, "score": score, "chars": chars, "source": row.source}
            for row, values in zip(rows, scores, strict=True)
            for rank, score, chars in zip(row.ranks, values, row.answer_chars, strict=True)
        ),
    )
    return {key: evaluation[key] for key in ("pair_accuracy", "length_only_accuracy")}
