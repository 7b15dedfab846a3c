"""Load, save and read a causal language model: token logprobs and the states that predict them.

The next-token shift is made here and nowhere else (`predicting_states`).  Batches are padded on the
right, where causal attention needs no padding mask: no real token sees what follows it.

Shapes: B sequences, T token positions, D model width.  Masks: True = keep.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from starling.base.errors import ModelError
from starling.data.chat import FORMATS, ChatCodec, build_codec, jinja_template
from starling.data.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

# Starling shows one progress line of its own.
disable_progress_bar()

# Rows of logits held at once: the full vocabulary of a whole batch never is.
LOGIT_ROWS = 4096

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

    Logits are divided by `temperature`, as they were when the tokens were sampled.  They are made
    in chunks and at kept positions only.
    """
    states = predicting_states(hidden)[response_mask]  # [N, D]
    targets = token_ids[response_mask]  # [N]
    head: Any = model.get_output_embeddings()

    def chunk_logprobs(chunk: Tensor, wanted: Tensor) -> Tensor:
        logits = head(chunk).float() / temperature
        return torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0]

    chunks = []
    for start in range(0, len(targets), LOGIT_ROWS):
        pieces = states[start : start + LOGIT_ROWS], targets[start : start + LOGIT_ROWS]
        if len(targets) > LOGIT_ROWS and torch.is_grad_enabled():
            chunks.append(checkpoint(chunk_logprobs, *pieces, use_reentrant=False))
        else:
            chunks.append(chunk_logprobs(*pieces))
    result = torch.zeros(token_ids.shape, dtype=torch.float32, device=token_ids.device)
    return result.masked_scatter(response_mask, torch.cat(chunks)) if chunks else result


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
    reference: str, *, device: str = "cpu", chat_format: str | None = None
) -> LanguageModel:
    """Load a folder or hub id in float32 from safetensors; never remote code, never pickle.

    The chat format is `chat_format`, or the one stored with the model, or the one its special
    tokens show.  Raises ModelError with what to do.
    """
    config = load_config(reference)
    check_plain_logits(reference, config)
    model = load_weights(AutoModelForCausalLM, reference, config)
    codec = load_codec(reference, config, chat_format)
    check_vocabulary(reference, model, codec)
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


def load_config(reference: str) -> PretrainedConfig:
    """Read a model's config.json; raises ModelError when it is missing or of an unknown kind."""
    try:
        return AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{reference}: no usable config.json ({error})") from error


def load_weights(factory: Any, reference: str, config: PretrainedConfig, **options: Any) -> Any:
    """Load safetensors into `factory`'s model; raises ModelError for damaged or pickled weights."""
    from safetensors import SafetensorError

    folder = Path(reference)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(pickled)}, which are pickles" if pickled else "no weights"
        raise ModelError(f"{reference}: found {found}; save the model as safetensors")
    try:
        return factory.from_pretrained(
            reference,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{reference}: the weights cannot be read ({error}); copy or save the model again"
        ) from error


def load_codec(reference: str, config: PretrainedConfig, chat_format: str | None) -> ChatCodec:
    """The chat codec of a model folder or hub id."""
    tokenizer = load_tokenizer(reference)
    stops = config.eos_token_id
    # Many folders have no generation_config.json; then config.json's end of sequence stands.
    with contextlib.suppress(OSError):
        stops = GenerationConfig.from_pretrained(reference).eos_token_id or stops
    stop_ids = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    name = chat_format or getattr(config, "starling_chat_format", None) or guess_format(tokenizer)
    if name is None:
        raise ModelError(
            f"{reference}: the chat format is not known; set chat_format to one of "
            f"{', '.join(FORMATS)}"
        )
    return build_codec(name, tokenizer, stop_ids)


def guess_format(tokenizer: TextTokenizer) -> str | None:
    """The one format whose end marker is a special token of this vocabulary, if any."""
    for name, chat_format in FORMATS.items():
        if chat_format.end is not None and tokenizer.marker_id(chat_format.end) is not None:
            return name
    return None


def check_vocabulary(reference: str, model: PreTrainedModel, codec: ChatCodec) -> None:
    """Refuse a tokenizer with more entries than the embedding has rows."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(codec.tokenizer) > rows:
        raise ModelError(
            f"{reference}: the tokenizer has {len(codec.tokenizer)} entries and the embedding "
            f"{rows} rows; the tokenizer and the weights do not belong together"
        )


def save_model(folder: Path, model: PreTrainedModel, codec: ChatCodec) -> None:
    """Save a Hugging Face folder, whole or not at all: temporary folder, then rename."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    config: Any = model.config
    config.starling_chat_format = codec.format.name
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=codec.tokenizer.bos_id,
            eos_token_id=sorted(codec.stop_ids),
            pad_token_id=codec.tokenizer.pad_id,
        )
    model.save_pretrained(temporary)
    save_tokenizer(codec.tokenizer, temporary, template=jinja_template(codec.format))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
