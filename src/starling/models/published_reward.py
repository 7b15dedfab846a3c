"""Convert a published reward checkpoint into a folder that loads everywhere.

    python -m starling.models.published_reward CHECKPOINT --base BASE --out DIR

Starling-RM-7B-alpha and Starling-RM-34B are a causal backbone with a linear `v_head`, in .bin, .pt
or safetensors files whose names no class of transformers fits.  Config and tokenizer come from the
model that they were trained from (Llama-2-7B-Chat, Yi-34B-Chat).  Pickles are read by torch's
restricted unpickler, which builds tensors and runs nothing.
"""

import argparse
import logging
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from starling.base.errors import InputError, ModelError, some
from starling.data.chat import build_codec
from starling.data.tokenizer import load_tokenizer
from starling.models.loading import PICKLES, SIDE_FILES, check_vocabulary, empty_model, load_config
from starling.models.reward_model import READ_OUTS, RewardModel

logger = logging.getLogger(__name__)

# What the published scripts cut to, from the left.
MAX_LENGTH = 2048
# The published module reads its backbone as `transformer`, and may hold it again inside `model`.
_BACKBONE = re.compile(r"^(transformer|model\.model|model)\.")
_UNUSED = re.compile(r"(^|\.)lm_head\.weight$|rotary_emb\.inv_freq$")


def convert(
    checkpoint: Path,
    base: str,
    out: Path,
    *,
    chat_format: str | None = None,
    read_out: str = "last_token",
) -> str:
    """Convert a checkpoint (a file, or a folder of shards), save it, and say what was made.

    Without `chat_format` it is chatml where the base has ChatML's markers, else llama-2; `read_out`
    is RewardModel's.  Raises ModelError or DataError for a checkpoint and a base that do not fit
    each other.
    """
    if out.exists():
        raise ModelError(f"{out} exists already; give --out a new folder")
    config = load_config(base)
    tokenizer = load_tokenizer(base)
    check_vocabulary(base, config, tokenizer)
    # The published module pads with it; a base without it keeps its own.
    tokenizer.saved.pad_token = tokenizer.saved.unk_token or tokenizer.saved.pad_token
    name = "llama-2" if tokenizer.marker_id("<|im_end|>") is None else "chatml"
    codec = build_codec(chat_format or name, tokenizer, [])
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_id
    model = empty_model(AutoModelForSequenceClassification, "sequence classifier", config)
    weights = _classifier_weights(checkpoint, f"{model.base_model_prefix}.")
    _check_weights(checkpoint, weights, model.state_dict())
    model.load_state_dict(weights, assign=True)
    limit = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
    length = min(MAX_LENGTH, limit)
    RewardModel(model.eval(), codec, max_length=length, read_out=read_out).save(out)
    return f"a reward model of {model.num_parameters():,} parameters that reads {codec.format.name}"


def _classifier_weights(checkpoint: Path, backbone: str) -> dict[str, Tensor]:
    """The checkpoint's tensors under a classifier's names, each once."""
    found = [pair for file in _files(checkpoint) for pair in _tensors(file).items()]
    weights: dict[str, Tensor] = {}
    # `transformer` last: where copies differ, the one that the published module reads counts.
    for name, tensor in sorted(found, key=lambda pair: pair[0].startswith("transformer.")):
        if _UNUSED.search(name):
            continue
        new = "score.weight" if name == "v_head.weight" else _BACKBONE.sub(backbone, name)
        if new in weights and not torch.equal(weights[new], tensor):
            logger.warning("%s: two copies of %s differ; %s is used", checkpoint, new, name)
        weights[new] = tensor
    return weights


def _files(checkpoint: Path) -> list[Path]:
    """A file, or a folder's weights: its safetensors if it has any, else its pickles."""
    if checkpoint.is_file():
        return [checkpoint]
    files = sorted(path for path in checkpoint.glob("*") if path.name not in SIDE_FILES)
    for suffixes in ((".safetensors",), PICKLES):
        if chosen := [path for path in files if path.suffix in suffixes]:
            return chosen
    raise ModelError(f"{checkpoint}: found no .safetensors, .bin or .pt file there")


def _tensors(file: Path) -> Mapping[str, Tensor]:
    """One file's tensors, mapped rather than read; raises ModelError for anything else in it."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Before 1.6, torch wrote no zip files; those cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file}: damaged, or it holds more than tensors; nothing in it was run. Download it "
            "again, and do not trust it if this stays"
        ) from error
    except SafetensorError as error:
        raise ModelError(f"{file}: cannot be read ({error}); download it again") from error
    except Exception as error:  # whatever torch meets; its own words advise to trust the file
        raise ModelError(
            f"{file}: cannot be read: empty, cut or no checkpoint; download it again"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ModelError(f"{file}: found no table of tensors; give the checkpoint's weights")
    return content


def _check_weights(
    checkpoint: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Every tensor of the base's architecture, with its shape, and none besides."""
    advice = "is a file missing, or is it another --base?"
    if missing := sorted(expected.keys() - weights.keys()):
        raise ModelError(f"{checkpoint}: lacks {some(missing, 3)}; {advice}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ModelError(f"{checkpoint}: the base has no place for {some(unknown, 3)}; {advice}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ModelError(
                f"{checkpoint}: {name} is {list(weights[name].shape)} there and "
                f"{list(tensor.shape)} in the base; {advice}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(description="Convert a published reward checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a .bin, .pt or .safetensors file, or folder")
    parser.add_argument("--base", required=True, help="folder or hub id it was trained from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--chat-format", choices=("llama-2", "chatml"), help="default: by the base")
    parser.add_argument(
        "--read-out",
        choices=READ_OUTS,
        default="last_token",
        help="published_padded: where Starling-RM-7B-alpha's snippet reads, in the padding; "
        "default: %(default)s",
    )
    options = parser.parse_args(arguments)
    try:
        made = convert(
            options.checkpoint,
            options.base,
            options.out,
            chat_format=options.chat_format,
            read_out=options.read_out,
        )
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{options.out}: {made}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
