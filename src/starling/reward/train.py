"""Stage 2: a K-wise (Plackett-Luce) reward model from rankings.

Shapes: B prompts, K answers of each.  Masks: True = keep.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.records import RankingRow
from starling.data.rows import read_rows
from starling.models.causal_lm import Batch, length_batches, padded_mask
from starling.models.reward_model import RewardModel, sequence_scores
from starling.models.training import Journal, adamw, batch_indices, constant, cosine, warmup_then
from starling.reward.config import RewardInputs, RewardSection
from starling.reward.dataset import RankedRow, encode_rankings
from starling.reward.evaluate import length_only_accuracy, pair_accuracy
from starling.reward.loss import UNRANKED, plackett_luce_loss


def run(section: RewardSection, inputs: RewardInputs, out: Path, context: Context) -> Summary:
    """Train on all but the held-out prompts, measure on those, store the normalisation, save."""
    rankings = read_rows(inputs.rankings, RankingRow, quarantine=out / "quarantine.jsonl")
    reward_model = RewardModel.from_language_model(
        inputs.base,
        device=context.device,
        chat_format=section.chat_format,
        seed=derive_seed(context.seed, "reward/head"),
    )
    limit = min(section.max_length, reward_model.max_length)
    reward_model = dataclasses.replace(reward_model, max_length=limit, truncate=section.truncate)
    rows = encode_rankings(rankings, reward_model, held_out=section.held_out, seed=context.seed)
    steps = max(1, section.epochs * len(rows.train) // section.batch)
    warmup_steps = round(section.warmup_share * steps)
    decay = cosine(steps, warmup_steps) if section.schedule == "cosine" else constant
    trainable = adamw("model", reward_model.model, section, warmup_then(decay, warmup_steps))
    with Journal(
        out, trainable, context, "reward", steps, every=section.checkpoint_every
    ) as journal:
        snapshot = journal.resume()
        losses: list[float] = snapshot.state["extra"].get("losses", [])
        for step in range(snapshot.step, steps):
            chosen = batch_indices(
                step, section.batch, len(rows.train), context.seed, "reward/order"
            )
            batch = [rows.train[i] for i in chosen]
            loss = ranking_loss(reward_model, batch).mean()
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss is {loss.item()} at step {step + 1}, on the rankings "
                    f"{', '.join(row.id for row in batch)}; lower reward.lr or look at these rows"
                )
            loss.backward()
            grad_norm = trainable.step(step)
            losses = [*losses, loss.item()][-20:]
            metrics = {"reward/loss": loss.item(), "reward/grad_norm": grad_norm}
            journal.log(step + 1, metrics, f"loss {loss.item():.3f}")
            journal.boundary(step + 1, {"losses": losses})
    trained = _normalised(reward_model, rows.held_out)
    trained.save(out / "model")
    accuracy = pair_accuracy(rows.held_out, _scores(trained, rows.held_out), seed=context.seed)
    length_only = length_only_accuracy(rows.held_out, seed=context.seed)
    figures = {
        "pair_accuracy": dataclasses.asdict(accuracy),
        "length_only_accuracy": dataclasses.asdict(length_only),
        "loss": sum(losses) / len(losses),
        "rankings": {"train": len(rows.train), "held_out": len(rows.held_out)},
        "answers": rows.num_answers,
        "answers_cut": rows.num_cut,
    }
    sentence = (
        f"Trained a reward model on {len(rows.train)} rankings: {accuracy.mean:.3f} of held-out "
        f"pairs in order, length alone {length_only.mean:.3f} -> {out / 'model'}"
    )
    return Summary(sentence, figures)


def ranking_loss(reward_model: RewardModel, rows: Sequence[RankedRow]) -> Tensor:
    """Plackett-Luce loss of each row [B]; answers of similar length share a forward."""
    sequences = [ids for row in rows for ids in row.sequences]
    flat = torch.zeros(len(sequences), device=reward_model.device)
    for indices in length_batches([len(ids) for ids in sequences], reward_model.device):
        chosen = [sequences[i] for i in indices]
        batch = Batch(chosen, reward_model.codec.tokenizer.pad_id, reward_model.device)
        index = torch.tensor(indices, device=flat.device)
        flat = flat.index_copy(0, index, sequence_scores(reward_model.model, batch))
    keep = padded_mask([[True] * len(row.sequences) for row in rows], reward_model.device)
    scores = torch.zeros(keep.shape, device=flat.device).masked_scatter(keep, flat)
    ranks = torch.full(keep.shape, UNRANKED, device=flat.device)
    for number, row in enumerate(rows):
        known = [UNRANKED if rank is None else rank for rank in row.ranks]
        ranks[number, : len(known)] = torch.tensor(known, device=flat.device)
    return plackett_luce_loss(scores, ranks, keep)


def _scores(reward_model: RewardModel, rows: Sequence[RankedRow]) -> list[list[float]]:
    flat = iter(reward_model.raw_scores([ids for row in rows for ids in row.sequences]).tolist())
    return [[next(flat) for _ in row.sequences] for row in rows]


def _normalised(reward_model: RewardModel, rows: Sequence[RankedRow]) -> RewardModel:
    """Store the mean and deviation of the held-out answers' scores, so that they are 0 and 1."""
    values = torch.tensor([score for row in _scores(reward_model, rows) for score in row])
    mean, std = float(values.mean()), float(values.std(correction=0))
    # Equal scores differ by their rounding; dividing by that would make noise a reward.
    if not std > 1e-5 * max(1.0, abs(mean)):
        raise DataError("the reward model gives every held-out answer the same score")
    return dataclasses.replace(reward_model, mean=mean, std=std)
