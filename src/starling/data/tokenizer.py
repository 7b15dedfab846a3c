"""Text to token ids, with special tokens kept out of the text; and a small new tokenizer.

A model folder's tokenizer is loaded once for saving and marker names, and a second backend object
encodes text with special tokens off: the flag lives on the backend and is not thread-safe.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from starling.base.errors import ModelError

# OpenChat's special tokens, at the front of a new vocabulary; pad is never the end marker.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|end_of_turn|>", "<|pad_0|>")


class TextTokenizer:
    """A tokenizer whose `encode_text` never yields a special token, whatever the text holds."""

    def __init__(self, saved: PreTrainedTokenizerFast) -> None:
        self.saved = saved
        self._text = Tokenizer.from_str(saved.backend_tokenizer.to_str())
        self._text.encode_special_tokens = True
        self._special = set(saved.all_special_ids) | {
            token_id for token_id, token in saved.added_tokens_decoder.items() if token.special
        }
        # Looked up for every piece of every message; the tokenizer would build its vocabulary anew.
        self._markers = {
            saved.convert_ids_to_tokens(token_id): token_id for token_id in self._special
        }
        probe = self._text.encode("a", add_special_tokens=False)
        self.prepends_space = probe.tokens[0].startswith("\u2581")
        # Decoders of SentencePiece's kind take off the space that their encoder put before.
        self.decodes_space = self._text.decode(probe.ids).startswith(" ")

    @property
    def bos_id(self) -> int | None:
        token_id: Any = self.saved.bos_token_id
        return token_id

    @property
    def pad_id(self) -> int:
        """The pad token's id; OpenChat's published tokenizer has the token and does not name it."""
        token_id: Any = self.saved.pad_token_id
        if token_id is None:
            token_id = self.marker_id("<|pad_0|>")
        if token_id is None:
            raise ModelError("the tokenizer has no pad token; add one that is not an end marker")
        return token_id

    def __len__(self) -> int:
        return len(self.saved)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: typed markers stay text, and no BOS is added."""
        return self._text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._text.decode([token for token in ids if token not in self._special])

    def marker_id(self, marker: str) -> int | None:
        """The id of a special token by its exact text; None if the tokenizer has none such."""
        return self._markers.get(marker)


def load_tokenizer(reference: str) -> TextTokenizer:
    """Load a folder's or hub id's fast tokenizer, never remote code; ModelError without one."""
    try:
        saved = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower for a damaged file
        raise ModelError(f"{reference}: no tokenizer could be loaded ({error})") from error
    if not isinstance(saved, PreTrainedTokenizerFast):
        raise ModelError(f"{reference}: the tokenizer has no tokenizer.json; convert it first")
    return TextTokenizer(saved)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE with OpenChat's special tokens; the same texts give the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end_of_turn|>",
        pad_token="<|pad_0|>",
    )
    return TextTokenizer(saved)


def save_tokenizer(tokenizer: TextTokenizer, folder: Path, *, template: str | None) -> None:
    """Save for `AutoTokenizer`, with the chat template and `added_tokens_decoder`.

    transformers 5 no longer writes `added_tokens_decoder`; GGUF converters need it to type the
    markers as control tokens rather than as text that a user may type.
    """
    saved = tokenizer.saved
    if template is not None:
        saved.chat_template = template
    saved.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(token_id): {"content": str(token), "special": token.special, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for token_id, token in sorted(saved.added_tokens_decoder.items())
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
