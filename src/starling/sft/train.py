"""Stage 0: cross-entropy on the assistant's tokens of conversations.

Shapes: B conversations, T token positions.  Masks: True = keep, the assistant's text and its end.
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.base.masked import masked_sum
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.chat import ChatCodec, Encoded, written_text
from starling.data.records import Conversation
from starling.data.tokenizer import train_tokenizer
from starling.models.adapters import choose_parameters
from starling.models.causal_lm import (
    Batch,
    LanguageModel,
    hidden_states,
    length_batches,
    load_language_model,
    new_language_model,
    padded_mask,
    save_model,
    token_logprobs,
)
from starling.models.packing import (
    Packed,
    PackedRow,
    packed_batches,
    packed_states,
    why_not_packed,
)
from starling.models.parallel import Forward, parallel, share_batches, summed
from starling.models.training import Journal, adamw, batch_indices, cosine, warmup_then
from starling.sft.config import SftInputs, SftSection

logger = logging.getLogger(__name__)

Rows = Sequence[Encoded]


def run(section: SftSection, inputs: SftInputs, out: Path, context: Context) -> Summary:
    """Tune the base on the conversations and save `model/`, and `model-<step>/` for kept steps."""
    conversations = read_records(
        inputs.conversations,
        Conversation,
        quarantine=context.own_path(out / "quarantine.jsonl"),
    )
    language_model = _starting_model(section, inputs, conversations, context)
    model, codec = language_model.model, language_model.codec
    rows = _encode(conversations, codec, section)
    num_parameters = model.num_parameters()
    choose_parameters(model, section, seed=derive_seed(context.seed, "sft/adapters"))
    reason = why_not_packed(model)
    if reason is not None:
        logger.info(f"conversations are padded, not packed: {reason}")
    batched = packed_batched if reason is None else padded_batched
    pad_id = codec.tokenizer.pad_id
    forward = parallel(
        model,
        packed_loss if reason is None else partial(padded_loss, pad_id=pad_id),
        context,
        precision=section.precision,
        gradient_checkpointing=section.gradient_checkpointing,
    )
    schedule = warmup_then(cosine(section.steps, section.warmup_steps), section.warmup_steps)
    trainable = adamw("model", model, section, schedule, beta2=section.adam_beta2)
    every = section.checkpoint_every
    with Journal(out, trainable, context, "sft", section.steps, every) as journal:
        snapshot = journal.resume()
        loss_value = float(snapshot.state["extra"].get("loss", 0.0))
        for step in range(snapshot.step, section.steps):
            chosen = batch_indices(step, section.batch, len(rows), context.seed, "sft/order")
            batch = [rows[i] for i in chosen]
            loss_value = accumulate(forward, batched(batch, context.device), context)
            if not math.isfinite(loss_value):
                raise DataError(
                    f"the loss is {loss_value} at step {step + 1}; lower sft.lr, or look at the "
                    "weights of sft.base"
                )
            grad_norm = trainable.step(step)
            metrics = {"sft/loss": loss_value, "sft/grad_norm": grad_norm}
            journal.log(step + 1, metrics, f"loss {loss_value:.3f}")
            if step + 1 in section.keep:
                _save(forward, out / f"model-{step + 1}", codec)
            journal.boundary(step + 1, {"loss": loss_value})
    _save(forward, out / "model", codec)
    figures = {
        "loss": loss_value,
        "conversations": len(rows),
        "too_long": len(conversations) - len(rows),
        "parameters": num_parameters,
    }
    sentence = (
        f"Tuned a {num_parameters:,}-parameter policy on {len(rows)} conversations "
        f"-> {out / 'model'}"
    )
    return Summary(sentence, figures)


def accumulate(forward: Forward, batches: Sequence[Rows], context: Context) -> float:
    """Add the gradient of the mean cross-entropy per kept token (nats); returns that mean.

    Each process takes its share of the forwards; the gradient is that of one process with all.
    """
    num_tokens = sum(sum(row.response_mask) for rows in batches for row in rows)
    total = 0.0
    for rows, counts in share_batches(batches, context):
        loss = forward(rows) / num_tokens * counts
        # Several processes' gradients are averaged.
        (loss * context.world_size).backward()
        total += loss.item()
    return float(summed(torch.tensor(total, dtype=torch.float64), context))


def packed_batched(rows: Rows, device: str) -> list[list[Encoded]]:
    """The rows of each forward, which stand one behind the other."""
    packed = [PackedRow(tuple(row.ids)) for row in rows]
    return [[rows[i] for i in indices] for indices in packed_batches(packed, device)]


def packed_loss(model: PreTrainedModel, rows: Rows) -> Float[Tensor, ""]:
    """Sum of the cross-entropies (nats) of the rows' kept tokens."""
    packed = Packed([PackedRow(tuple(row.ids)) for row in rows], model.device)
    # A row's first token has nothing before it but another row.
    kept = [keep and place > 0 for row in rows for place, keep in enumerate(row.response_mask)]
    hidden = packed_states(model, packed)[None]
    return _loss(model, hidden, packed.token_ids, torch.tensor([kept], device=model.device))


def padded_batched(rows: Rows, device: str) -> list[list[Encoded]]:
    """The rows of each forward, similar lengths together."""
    lengths = [len(row.ids) for row in rows]
    return [[rows[i] for i in indices] for indices in length_batches(lengths, device)]


def padded_loss(model: PreTrainedModel, rows: Rows, *, pad_id: int) -> Float[Tensor, ""]:
    """As `packed_loss`, for an architecture that cannot be packed."""
    device = str(model.device)
    batch = Batch([row.ids for row in rows], pad_id, device)
    mask = padded_mask([row.response_mask for row in rows], device)
    return _loss(model, hidden_states(model, batch.token_ids), batch.token_ids, mask)


def _loss(model: PreTrainedModel, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return -masked_sum(token_logprobs(model, hidden, ids, mask), mask)


def _save(forward: Forward, folder: Path, codec: ChatCodec) -> None:
    """Save the model as it is now; every process calls it."""
    model = forward.whole()
    if model is not None:
        save_model(folder, model, codec)


def _starting_model(
    section: SftSection, inputs: SftInputs, conversations: Sequence[Conversation], context: Context
) -> LanguageModel:
    if inputs.base is not None:
        return load_language_model(
            inputs.base, device=context.device, chat_format=section.chat_format
        )
    assert section.architecture is not None, "the section names one of base and architecture"
    chat_format = section.chat_format or "openchat"
    # The format's own words are in what the vocabulary is trained on, so that they stay short.
    texts = [written_text(chat_format, m) for row in conversations for m in row.messages]
    tokenizer = train_tokenizer(texts, vocab_size=section.architecture.vocab_size)
    return new_language_model(
        section.architecture.model_dump(exclude={"vocab_size", "init_std"}),
        tokenizer,
        chat_format,
        seed=derive_seed(context.seed, "sft/weights"),
        init_std=section.architecture.init_std,
    )


def _encode(
    conversations: Sequence[Conversation], codec: ChatCodec, section: SftSection
) -> list[Encoded]:
    """The conversations that are not too long."""
    encoded = [codec.encode(row.messages) for row in conversations]
    rows = [row for row in encoded if len(row.ids) <= section.max_length]
    if len(rows) < len(encoded):
        logger.warning(
            f"{len(encoded) - len(rows)} of {len(encoded)} conversations are longer than "
            f"sft.max_length ({section.max_length} tokens) and are left out"
        )
    if not rows:
        raise DataError(
            f"every conversation is longer than sft.max_length ({section.max_length} tokens); "
            "raise it, or split the conversations"
        )
    return rows
