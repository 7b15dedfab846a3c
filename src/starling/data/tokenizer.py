"""Text to token ids, with special tokens kept out of the text; and a small new tokenizer.

A model folder's tokenizer is loaded once for saving and marker names.  A second backend encodes:
there every marker has a secret name, so none can be typed, whatever the kind of tokenizer.  Markers
are the special tokens, and all that only a format may write: added tokens like `<|im_start|>`,
which some folders do not call special (they are saved as such), and those that a chat template
names, like `[INST]` (their flag stays).  Other added tokens (`<think>`, runs of spaces) are text.
(transformers' flag for this is not thread-safe, and leaves tokens that are in the vocabulary too.)
`tokenizer.json` is taken word for word: transformers' own classes for Llama and Mistral rebuild it
and place spaces differently.
"""

import json
import logging
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from starling.base.errors import DataError, ModelError

logger = logging.getLogger(__name__)

# OpenChat's special tokens, at the front of a new vocabulary; pad is never the end marker.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|end_of_turn|>", "<|pad_0|>")

# Tokens that may pad where none is named or the named one ends turns; `<unk>` is Starling-RM-7B's.
PADS = ("<|pad_0|>", "<pad>", "[PAD]", "<unk>")

_MARKER = re.compile(r"<\|[^|]+\|>")
# A template is full of words, roles among them: only what no word is counts as its marker.
_NO_WORD = re.compile(r"[^\w\s]")


class Whole(NamedTuple):
    """Ids of parts encoded as one string, and the part that each id belongs to."""

    ids: list[int]
    parts: list[int]


class TextTokenizer:
    """A tokenizer whose `encode_text` never yields a marker, whatever the text holds."""

    def __init__(self, saved: PreTrainedTokenizerFast, written: Iterable[int] = ()) -> None:
        self.saved = saved
        token: Any  # a class of tokenizers' that transformers does not name
        for token in saved.added_tokens_decoder.values():
            if not token.special and _MARKER.fullmatch(token.content):
                token.special = True
                saved.add_tokens([token], special_tokens=True)
        # Looked up for every piece of every message; the tokenizer would build its vocabulary anew.
        added = saved.added_tokens_decoder
        self._special = set(saved.all_special_ids) | {i for i in added if added[i].special}
        self._written = set(written) - self._special
        # Every marker's id by its exact text.
        self.markers: dict[str, int] = {
            str(added.get(token_id) or saved.convert_ids_to_tokens(token_id)): token_id
            for token_id in sorted(self._special | self._written)
        }
        # Private-use characters at both ends: no token of the vocabulary reaches into a name.
        nonce = secrets.token_hex(16)
        self._names = {token: f"\ue000{nonce}{token}\ue001" for token in self.markers.values()}
        names = {marker: self._names[token] for marker, token in self.markers.items()}
        self._text = _renamed(saved.backend_tokenizer, names)
        probe = self._text.encode("a", add_special_tokens=False)
        self.prepends_space = probe.tokens[0].startswith("\u2581")
        # Decoders of SentencePiece's kind take off the space that their encoder put before.
        self.decodes_space = self._text.decode(probe.ids).startswith(" ")
        whole = saved.backend_tokenizer.encode("a", add_special_tokens=True).ids
        self.adds_bos = self.bos_id is not None and whole[:1] == [self.bos_id]

    def speaking(self, template: str) -> "TextTokenizer":
        """The tokenizer for which also what the chat template `template` names is a marker."""
        written = [
            token_id
            for token_id, token in self.saved.added_tokens_decoder.items()
            if token.content in template and _NO_WORD.search(token.content)
        ]
        return self if self._special.issuperset(written) else TextTokenizer(self.saved, written)

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

    def encode_whole(self, parts: Sequence[str | int]) -> Whole:
        """Encode texts and special tokens (by id) as the one string that they make together.

        The ids are those of the whole string, so that merges across parts, and what the tokenizer
        does at the beginning of a string only, are exact; a marker typed in a text stays text.
        An id that spans parts belongs to the one that holds its last character.
        """
        texts = [self._names[part] if isinstance(part, int) else part for part in parts]
        starts = [0, *accumulate(len(text) for text in texts)]
        encoding = self._text.encode("".join(texts), add_special_tokens=False)
        places = (max(start, end - 1) for start, end in encoding.offsets)
        return Whole(encoding.ids, [bisect_right(starts, place) - 1 for place in places])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out; a template's other markers are text here."""
        text = self._text.decode([token for token in ids if token not in self._special])
        for marker, token_id in self.markers.items():
            if token_id in self._written:
                text = text.replace(self._names[token_id], marker)
        return text

    def decode_inside(self, ids: Iterable[int]) -> str:
        """Text of ids that other text stands before: a space at their beginning is kept."""
        before = self.encode_text("a")
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def marker_id(self, marker: str) -> int | None:
        """The id of a marker by its exact text; None if the tokenizer has none such."""
        return self.markers.get(marker)

    def choose_pad(self, end_id: int) -> None:
        """Pad with a token that ends nothing, or the ends would be masked out of training.

        Published copies of Starling name their end marker as the pad token.  Raises DataError
        where the vocabulary has no special token to spare.
        """
        named: Any = self.saved.pad_token
        if named is not None and self.saved.pad_token_id != end_id:
            return
        eos: Any = self.saved.eos_token_id
        taken = {end_id, eos, self.bos_id} | self._written
        others = sorted(self.markers, key=self.markers.__getitem__)
        for pad in (*PADS, *others):
            if self.markers.get(pad) is None or self.markers[pad] in taken:
                continue
            self.saved.pad_token = pad
            if named is not None:
                logger.warning(
                    "the tokenizer's pad token %s is also its end marker; padding with %s instead",
                    named,
                    pad,
                )
            return
        raise DataError(
            f"the pad token ({named or 'none named'}) is also an end marker, so ends would be "
            "masked as padding, and the vocabulary has no other special token; give the tokenizer "
            "a pad token"
        )


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy that knows special tokens under other names, in its vocabulary too."""
    content = json.loads(tokenizer.to_str())
    # A post-processor adds tokens, and trims the offsets that `encode_whole` reads.
    content["post_processor"] = None
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if not names.keys() & {*pair, "".join(pair)}
        ]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(content))


def load_tokenizer(reference: str | Path) -> TextTokenizer:
    """Load a folder's or hub id's tokenizer; `openchat` needs neither.

    `tokenizer.json` is loaded as it stands; a folder with `tokenizer.model` alone goes through
    our builder.  No remote code.  Raises ModelError, also for a vocabulary of OpenChat's family
    that does not give the ids that the model was trained with.
    """
    from starling.data import openchat  # it needs TextTokenizer

    if str(reference) == "openchat" and not Path("openchat").is_dir():
        return openchat.openchat_tokenizer()
    path = find_file(reference, "tokenizer.json")
    model = None if path else find_file(reference, "tokenizer.model")
    if path is None and model is None:
        here = "it has" if Path(reference).is_dir() else "no such folder, and on the hub was found"
        raise ModelError(
            f"{reference}: no tokenizer could be loaded ({here} neither tokenizer.json nor "
            "tokenizer.model); convert it, or name a folder or hub id that has one"
        )
    try:
        if model is None:
            saved = PreTrainedTokenizerFast.from_pretrained(reference, trust_remote_code=False)
            tokenizer = TextTokenizer(saved)
        else:
            # On the hub each file is fetched by its name.
            for name in ("added_tokens.json", "tokenizer_config.json"):
                find_file(reference, name)
            tokenizer = openchat.from_sentencepiece(Path(model))
    except ModelError:
        raise
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower for a damaged file
        raise ModelError(f"{reference}: no tokenizer could be loaded ({error})") from error
    if tokenizer.marker_id(openchat.END) == openchat.END_ID:
        openchat.check_openchat(tokenizer, str(reference))
    return tokenizer


def find_file(reference: str | Path, name: str) -> str | None:
    """A file of a folder or hub id; None if there is none."""
    try:
        return cached_file(reference, name)
    except (OSError, ValueError):
        return None


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
    markers as control tokens rather than as text that a user may type.  The class is transformers'
    generic one, which alone reads `tokenizer.json` as it stands.
    """
    saved = tokenizer.saved
    if template is not None:
        saved.chat_template = template
    saved.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    config["added_tokens_decoder"] = {
        str(token_id): {"content": str(token)} | {flag: getattr(token, flag) for flag in flags}
        for token_id, token in sorted(saved.added_tokens_decoder.items())
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
