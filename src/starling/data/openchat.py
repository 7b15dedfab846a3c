"""The OpenChat tokenizer, built exactly from Mistral's SentencePiece file, and its four checks.

transformers' converter ranks merges by id; the pieces of repeated spaces have the lowest score of
all and must merge last, so its tokenizer is wrong on every indented line.  Here merges are ranked
by score, as SentencePiece does.
"""

import importlib.util
import json
import struct
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from starling.base.errors import ModelError
from starling.base.hashing import hash_file
from starling.data.tokenizer import TextTokenizer

END, END_ID, PAD = "<|end_of_turn|>", 32000, "<|pad_0|>"

# mistral_common/data/tokenizer.model.v1: Mistral-7B-v0.1's vocabulary, which OpenChat extends.
MISTRAL_FILE = "tokenizer.model.v1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"

# SentencePiece's piece types; GGUF numbers them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary; its id is its place in the list."""

    text: str
    score: float
    type: int


def sentencepiece_backend(
    pieces: Iterable[tuple[str, float, int]], *, prefix_space: bool = True
) -> Tokenizer:
    """A BPE backend that gives SentencePiece's ids; `<s>` stands first where the pieces have it.

    A piece is (text, score, type); its id is its place.  `prefix_space` is SentencePiece's
    add_dummy_prefix.
    """
    listed = [Piece(*piece) for piece in pieces]
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(listed)}
    unknown = next((piece.text for piece in listed if piece.type == UNKNOWN), None)
    bpe = models.BPE(
        vocabulary, _merges(listed), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix_space else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in listed:
        if piece.type in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.text, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.text, normalized=False, special=False)])
    if "<s>" in vocabulary:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return tokenizer


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Pairs by falling score; of equal scores the longer left part first.

    SentencePiece takes the leftmost of equally good pairs and goes on with it, so a run of spaces
    grows from the left.
    """
    known = {piece.text for piece in pieces if piece.type in (NORMAL, UNUSED)}
    ranked = [
        (-piece.score, -cut, token_id, piece.text[:cut], piece.text[cut:])
        for token_id, piece in enumerate(pieces)
        if piece.type == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in known and piece.text[cut:] in known
    ]
    return [(left, right) for _, _, _, left, right in sorted(ranked)]


def openchat_tokenizer(source: Path | None = None) -> TextTokenizer:
    """OpenChat's tokenizer from a `tokenizer.model`; None: the file inside mistral-common."""
    path = source or _mistral_file()
    digest = hash_file(path)
    if digest != MISTRAL_SHA256:
        raise ModelError(
            f"{path}: this is not Mistral's first vocabulary, which OpenChat's stands on (sha256 "
            f"{digest[:12]}..., expected {MISTRAL_SHA256[:12]}...); name a folder with the model's "
            "own tokenizer.json"
        )
    pieces, prefix_space = read_sentencepiece(path)
    pieces += [Piece(END, 0.0, CONTROL), Piece(PAD, 0.0, CONTROL)]
    saved = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_backend(pieces, prefix_space=prefix_space),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer = TextTokenizer(saved)
    check_openchat(tokenizer, str(path))
    return tokenizer


def _mistral_file() -> Path:
    # Found, not imported: the package would bring in a dozen others for this one file.
    found = importlib.util.find_spec("mistral_common")
    for folder in found.submodule_search_locations or () if found else ():
        path = Path(folder) / "data" / MISTRAL_FILE
        if path.is_file():
            return path
    raise ModelError(
        "the openchat tokenizer is built from a file of the package mistral-common, which is not "
        'installed: pip install "starling-rlaif[openchat]", or name a model folder'
    )


def from_sentencepiece(path: Path) -> TextTokenizer:
    """The tokenizer of a folder that has `tokenizer.model` and no `tokenizer.json`.

    Tokens beyond the model's are read from `added_tokens.json` and `tokenizer_config.json` beside
    it; names of special tokens and the chat template from the latter.
    """
    pieces, prefix_space = read_sentencepiece(path)
    config = _read_json(path.with_name("tokenizer_config.json"))
    added = {
        token_id: AddedToken(text, normalized=False, special=True)
        for text, token_id in _read_json(path.with_name("added_tokens.json")).items()
    }
    for token_id, flags in (config.get("added_tokens_decoder") or {}).items():
        added[int(token_id)] = AddedToken(
            flags["content"], normalized=False, special=bool(flags.get("special", True))
        )
    for token_id, token in sorted(added.items()):
        kind = CONTROL if token.special else USER_DEFINED
        if token_id < len(pieces) and pieces[token_id].type != UNKNOWN:
            pieces[token_id] = Piece(token.content, pieces[token_id].score, kind)
        elif token_id == len(pieces):
            pieces.append(Piece(token.content, 0.0, kind))
        elif token_id > len(pieces):
            raise ModelError(
                f"{path}: the added token {token.content!r} has the id {token_id}, but the "
                f"vocabulary ends at {len(pieces) - 1}; copy the model's folder again"
            )
    names = {
        key: value["content"] if isinstance(value, dict) else value
        for key in ("unk_token", "bos_token", "eos_token", "pad_token")
        if (value := config.get(key)) is not None
    }
    saved = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_backend(pieces, prefix_space=prefix_space),
        add_bos_token=bool(config.get("add_bos_token", True)),
        chat_template=config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | names),
    )
    return TextTokenizer(saved)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_sentencepiece(path: Path) -> tuple[list[Piece], bool]:
    """Pieces of a `tokenizer.model`, and whether a space goes before every text.

    Raises ModelError for a model that is no BPE, or that rewrites its text.
    Source of the field numbers: sentencepiece_model.proto.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                fields = dict(_fields(value))
                [score] = struct.unpack("<f", fields.get(2, bytes(4)))
                pieces.append(Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ModelError(f"{path}: not a SentencePiece model ({error}); copy it again") from error
    is_bpe, rewrites = trainer.get(3) == 2, bool(normalizer.get(2)) or bool(normalizer.get(4, 1))
    if not is_bpe or rewrites or not trainer.get(35, 0):
        raise ModelError(
            f"{path}: only SentencePiece models like Llama's and Mistral's are read (BPE with byte "
            "fallback, no normalisation); save the tokenizer as tokenizer.json"
        )
    return pieces, bool(normalizer.get(3, 1))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one protobuf message: ints, or bytes as they stand."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        size, place = _varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
        if place + size > len(data):
            raise ValueError("the file ends within a field")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


# The model card's three id lists, and the indented line that id-ordered merges get wrong.
CARD: dict[str, list[int]] = json.loads(
    (resources.files("starling.data") / "openchat_card.json").read_text("utf-8")
)
INDENTED = "def f(x):\n    if x:\n"
INDENTED_TOKENS = "\u2581def \u2581f ( x ): <0x0A> \u2581\u2581\u2581 \u2581if \u2581x : <0x0A>"


def check_openchat(tokenizer: TextTokenizer, reference: str = "openchat") -> None:
    """Raise ModelError unless the tokenizer gives OpenChat's ids: the model is lost otherwise."""
    checks: list[tuple[str, list[Any], Any]] = [
        (text, expected, tokenizer.saved(text).input_ids) for text, expected in CARD.items()
    ]
    tokens = tokenizer.saved.convert_ids_to_tokens(
        tokenizer.saved(INDENTED, add_special_tokens=False).input_ids
    )
    checks.append((INDENTED, INDENTED_TOKENS.split(), tokens))
    failed = [check for check in checks if check[1] != check[2]]
    if failed:
        text, expected, found = failed[0]
        raise ModelError(
            f"{reference}: not OpenChat's tokenizer: {len(failed)} of {len(checks)} checks fail. "
            f"{text!r} must give {expected}; found {found}. The model would see other tokens than "
            "it was trained with: use the published tokenizer.json, or a tokenizer.model alone"
        )
