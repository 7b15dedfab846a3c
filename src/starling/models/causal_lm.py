"""Load, save and read a causal language model: token logprobs and the states that predict them.

The next-token shift is made here and nowhere else (`predicting_states`).  Batches are padded on the
right, where causal attention needs no padding mask: no real token sees what follows it.

Shapes: B sequences, T token positions, D model width.  Masks: True = keep.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from starling.base.errors import ModelError
from starling.data.chat import ChatCodec, build_codec, jinja_template
from starling.data.tokenizer import TextTokenizer, save_tokenizer
from starling.models.loading import load_codec, load_config, load_weights

# Logits held at once, 256 MiB of them: the full vocabulary of a whole batch never is.
MOST_LOGITS = 2**26

# Padded tokens per forward; changes memory and speed, not the result.  A core is busy with few, and
# few similar lengths carry little padding; a GPU wants many.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16_384}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with the chat format it speaks."""

    model: PreTrainedModel
    codec: ChatCodec


class Batch:
    """Token sequences of different lengths, padded on the right."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], pad_id: int, device: str = "cpu"
    ) -> None:
        self.lengths = torch.tensor([len(ids) for ids in sequences], device=device)  # [B]
        width = int(self.lengths.max())
        rows = [[*ids, *[pad_id] * (width - len(ids))] for ids in sequences]
        self.token_ids = torch.tensor(rows, dtype=torch.long, device=device)  # [B, T]


def length_batches(lengths: Sequence[int], device: str) -> list[list[int]]:
    """Indices in batches that suit the device, similar lengths together and the longest first."""
    tokens = TOKENS_PER_BATCH[device.partition(":")[0]]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        widest = lengths[batches[-1][0]] if batches else 0
        if not batches or widest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def padded_mask(masks: Sequence[Sequence[bool]], device: str = "cpu") -> Bool[Tensor, "B T"]:
    """Pad boolean rows with False on the right."""
    width = max(len(mask) for mask in masks)
    rows = [[*mask, *[False] * (width - len(mask))] for mask in masks]
    return torch.tensor(rows, dtype=torch.bool, device=device)


def hidden_states(model: PreTrainedModel, token_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """Final-norm'd hidden states of right-padded sequences; padded positions hold no meaning."""
    backbone: Any = model.get_decoder()
    return backbone(input_ids=token_ids, use_cache=False).last_hidden_state


def predicting_states(hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Shift states so that position t holds the one that predicts token t; position 0 zeros."""
    return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)


def token_logprobs(
    model: PreTrainedModel,
    hidden: Float[Tensor, "B T D"],
    token_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "B T"]:
    """Log-probability (nats, float32) of each kept token given what stands before it; 0 elsewhere.

    Logits are divided by `temperature`, as they were when the tokens were sampled.
    """
    states = predicting_states(hidden)[response_mask]  # [N, D]
    head: Any = model.get_output_embeddings()
    found = state_logprobs(head, states, token_ids[response_mask], temperature=temperature)
    result = torch.zeros(token_ids.shape, dtype=torch.float32, device=token_ids.device)
    return result.masked_scatter(response_mask, found)


def state_logprobs(
    head: nn.Module,
    states: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """Log-probability (nats, float32) of each target under the state that predicts it.

    Logits are made in chunks.  Where one chunk is not enough, each is made again for the backward
    pass, so that no more than one is ever held.
    """

    def chunk_logprobs(chunk: Tensor, wanted: Tensor) -> Tensor:
        return _ChosenLogprobs.apply(head(chunk), wanted, temperature)

    weight: Any = head.weight
    rows = max(1, MOST_LOGITS // weight.shape[0])
    chunks = []
    for start in range(0, len(targets), rows):
        pieces = states[start : start + rows], targets[start : start + rows]
        if len(targets) > rows and torch.is_grad_enabled():
            chunks.append(checkpoint(chunk_logprobs, *pieces, use_reentrant=False))
        else:
            chunks.append(chunk_logprobs(*pieces))
    return torch.cat(chunks) if chunks else states.new_zeros(0, dtype=torch.float32)


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) at one target a row, in float32.

    Autograd's own would keep and pass over the vocabulary four times more.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        total = scaled.logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, total)
        ctx.temperature = temperature
        return scaled.gather(1, targets[:, None])[:, 0] - total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, total = ctx.saved_tensors
        inner = torch.div(logits.float(), ctx.temperature).sub_(total[:, None]).exp_()
        # d/dz of z_target - logsumexp(z) is onehot - softmax.
        scale = gradients[0] / ctx.temperature
        inner.mul_(-scale[:, None])
        inner.scatter_add_(1, targets[:, None], scale[:, None])
        return inner.to(logits.dtype), None, None


def new_language_model(
    shape: Mapping[str, int],
    tokenizer: TextTokenizer,
    chat_format: str,
    *,
    seed: int,
    init_std: float = 0.02,
) -> LanguageModel:
    """A randomly initialised Mistral of the given shape, with tied embeddings."""
    codec = build_codec(chat_format, tokenizer, [])
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["max_length"],
        initializer_range=init_std,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=codec.end_id,
        pad_token_id=tokenizer.pad_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MistralForCausalLM(config)
    return LanguageModel(model.eval(), codec)


def load_language_model(
    reference: str, *, device: str = "cpu", dtype: str = "float32", chat_format: str | None = None
) -> LanguageModel:
    """Load a folder or hub id from safetensors; never remote code, never pickle.

    `dtype` is float32, bfloat16, float16, or auto (as stored).  The chat format is `chat_format`,
    or what `load_codec` finds.  Raises ModelError with what to do.
    """
    config = load_config(reference)
    [architecture, *_] = config.architectures or [""]
    if architecture.endswith("ForSequenceClassification"):
        raise ModelError(f"{reference}: this is a reward model; name a language model")
    check_plain_logits(reference, config)
    codec = load_codec(reference, config, chat_format)
    model = load_weights(AutoModelForCausalLM, reference, config, dtype)
    return LanguageModel(model.to(device).eval(), codec)


def check_plain_logits(reference: str, config: PretrainedConfig) -> None:
    """Refuse models that scale or cap their logits after the head, which `token_logprobs` reads."""
    plain = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
    for key, value in plain.items():
        found = getattr(config, key, value)
        if found not in (None, value):
            raise ModelError(
                f"{reference}: {config.model_type} changes its logits after the head ({key} is "
                f"{found}), which is not supported yet; use another model"
            )


def save_model(folder: Path, model: PreTrainedModel, codec: ChatCodec) -> None:
    """Save a Hugging Face folder, whole or not at all: temporary folder, then rename."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    config: Any = model.config
    config.starling_chat_format = codec.format.name
    ends = [codec.end_id, *sorted(codec.stop_ids - {codec.end_id})]
    special = {"bos_token_id": codec.tokenizer.bos_id, "pad_token_id": codec.tokenizer.pad_id}
    saved: Any = codec.tokenizer.saved
    saved.eos_token = saved.convert_ids_to_tokens(codec.end_id)
    # config.json names the one end marker; programs that read a list find it in the other file.
    config.update(special | {"eos_token_id": codec.end_id})
    if model.can_generate():
        model.generation_config = GenerationConfig(**special, eos_token_id=ends)
    model.save_pretrained(temporary)
    save_tokenizer(codec.tokenizer, temporary, template=jinja_template(codec.format))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
