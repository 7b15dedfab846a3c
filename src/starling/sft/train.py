"""Stage 0: cross-entropy on the assistant's tokens of conversations.

Shapes: B conversations, T token positions.  Masks: True = keep, the assistant's text and its end.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from starling.base.context import Context
from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.base.masked import masked_sum
from starling.base.seeding import derive_seed
from starling.base.stage import Summary
from starling.data.chat import ChatCodec, Encoded, written_text
from starling.data.records import Conversation
from starling.data.tokenizer import train_tokenizer
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
from starling.models.training import Journal, adamw, batch_indices, cosine, warmup_then
from starling.sft.config import SftInputs, SftSection

logger = logging.getLogger(__name__)


def run(section: SftSection, inputs: SftInputs, out: Path, context: Context) -> Summary:
    """Tune the base on the conversations and save `model/`, and `model-<step>/` for kept steps."""
    conversations = read_records(
        inputs.conversations, Conversation, quarantine=out / "quarantine.jsonl"
    )
    language_model = _starting_model(section, inputs, conversations, context)
    model, codec = language_model.model, language_model.codec
    rows = _encode(conversations, codec, section)
    schedule = warmup_then(cosine(section.steps, section.warmup_steps), section.warmup_steps)
    trainable = adamw("model", model, section, schedule, beta2=section.adam_beta2)
    every = section.checkpoint_every
    with Journal(out, trainable, context, "sft", section.steps, every) as journal:
        snapshot = journal.resume()
        loss_value = float(snapshot.state["extra"].get("loss", 0.0))
        for step in range(snapshot.step, section.steps):
            chosen = batch_indices(step, section.batch, len(rows), context.seed, "sft/order")
            loss_value = accumulate(language_model, [rows[i] for i in chosen])
            if not math.isfinite(loss_value):
                raise DataError(
                    f"the loss is {loss_value} at step {step + 1}; lower sft.lr, or look at the "
                    "weights of sft.base"
                )
            grad_norm = trainable.step(step)
            metrics = {"sft/loss": loss_value, "sft/grad_norm": grad_norm}
            journal.log(step + 1, metrics, f"loss {loss_value:.3f}")
            if step + 1 in section.keep:
                save_model(out / f"model-{step + 1}", model, codec)
            journal.boundary(step + 1, {"loss": loss_value})
    save_model(out / "model", model, codec)
    figures = {
        "loss": loss_value,
        "conversations": len(rows),
        "too_long": len(conversations) - len(rows),
        "parameters": model.num_parameters(),
    }
    sentence = (
        f"Tuned a {model.num_parameters():,}-parameter policy on {len(rows)} conversations "
        f"-> {out / 'model'}"
    )
    return Summary(sentence, figures)


def accumulate(language_model: LanguageModel, rows: Sequence[Encoded]) -> float:
    """Add the gradient of the mean cross-entropy per kept token (nats); returns that mean."""
    model, pad_id = language_model.model, language_model.codec.tokenizer.pad_id
    device = str(model.device)
    num_tokens = sum(sum(row.response_mask) for row in rows)
    total = 0.0
    for indices in length_batches([len(row.ids) for row in rows], device):
        batch = Batch([rows[i].ids for i in indices], pad_id, device)
        mask = padded_mask([rows[i].response_mask for i in indices], device)
        hidden = hidden_states(model, batch.token_ids)
        logprobs = token_logprobs(model, hidden, batch.token_ids, mask)
        loss = -masked_sum(logprobs, mask) / num_tokens
        loss.backward()
        total += loss.item()
    return total


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
