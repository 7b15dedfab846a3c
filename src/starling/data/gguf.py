"""GGUF files: the metadata at their head, and the tokenizer that it describes.

The head is read here, not with the `gguf` package, which takes seconds for a large vocabulary and
brings packages of its own.  Source: docs/gguf.md in ggml-org/ggml.
"""

import mmap
import re
import struct
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from starling.base.errors import ModelError, some
from starling.data.openchat import CONTROL, USER_DEFINED, Piece, sentencepiece_backend
from starling.data.tokenizer import TextTokenizer

_NUMBERS: dict[int, str] = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_KEY = "tokenizer.ggml."
# Converters type a marker as user-defined when they find it in added_tokens.json alone.
_MARKER = re.compile(r"<\|[^|]+\|>")


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs at the head of a GGUF file; ModelError where it is none, or cut there."""
    place = 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(f"<{layout}", data, place)
        place += struct.calcsize(f"<{layout}")
        return values

    def value(kind: int) -> Any:
        if kind == _STRING:
            return take(f"{take('Q')[0]}s")[0].decode()
        if kind != _ARRAY:
            return take(_NUMBERS[kind])[0]
        item, count = take("IQ")
        if item in _NUMBERS:
            return list(take(f"{count}{_NUMBERS[item]}"))
        return [value(item) for _ in range(count)]

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, version, _, num_pairs = take("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            return {value(_STRING): value(take("I")[0]) for _ in range(num_pairs)}
    except (OSError, ValueError, KeyError, OverflowError, struct.error) as error:
        raise ModelError(f"{path}: not a whole GGUF file ({error}); download it again") from error


def gguf_tokenizer(path: Path, metadata: dict[str, Any]) -> TextTokenizer:
    """The tokenizer of the `tokenizer.json` beside the file, or else of its metadata.

    Special are control tokens, those that the metadata names, and whatever is written <|...|>: a
    marker that could be typed would end a turn.  Raises ModelError where the ids would be a guess.
    """
    try:
        return _tokenizer(path, metadata)
    except ModelError:
        raise
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower
        raise ModelError(
            f"{path}: the tokenizer in it or beside it is damaged ({error!r}); get it again"
        ) from error


def _tokenizer(path: Path, metadata: dict[str, Any]) -> TextTokenizer:
    pieces: list[str] = metadata.get(f"{_KEY}tokens", [])
    types: list[int] = metadata.get(f"{_KEY}token_type", [1] * len(pieces))
    named = {name: metadata.get(f"{_KEY}{name}_token_id") for name in ("bos", "eos", "unknown")}
    special = {i for i, kind in enumerate(types) if kind == CONTROL or _MARKER.fullmatch(pieces[i])}
    special |= {i for i in named.values() if i is not None}
    types = [CONTROL if i in special else kind for i, kind in enumerate(types)]
    beside = path.with_name("tokenizer.json")
    kind, cut = metadata.get(f"{_KEY}model"), metadata.get(f"{_KEY}pre")
    if beside.is_file():
        backend = _from_json(beside, pieces)
    elif kind == "llama":
        scores = metadata[f"{_KEY}scores"]
        space = metadata.get(f"{_KEY}add_space_prefix", True)
        backend = sentencepiece_backend(map(Piece, pieces, scores, types), prefix_space=space)
    elif kind == "gpt2" and cut == "gpt-2":
        vocab = {piece: i for i, piece in enumerate(pieces)}
        merges = [tuple(merge.split(" ")) for merge in metadata[f"{_KEY}merges"]]
        backend = Tokenizer(models.BPE(vocab, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if (bos := named["bos"]) is not None:
            opening = [(pieces[bos], bos)]
            backend.post_processor = processors.TemplateProcessing(
                [pieces[bos], "$A"], special_tokens=opening
            )
        typed = [piece for piece, type in zip(pieces, types, strict=True) if type == USER_DEFINED]
        backend.add_tokens([AddedToken(piece, normalized=False) for piece in typed])
    else:
        raise ModelError(
            f"{path}: its tokenizer is {kind!r} (words: {cut!r}); known are 'llama' and 'gpt2' "
            f"(words: 'gpt-2'). Put the model's tokenizer.json into {path.parent}"
        )
    backend.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in sorted(special)])
    ends = {named["bos"], *stop_ids(metadata)}
    # Nothing is padded here; but a pad token that ends turns would be refused.
    named["pad"] = next((i for i in sorted(special) if i not in ends), None)
    if not metadata.get(f"{_KEY}add_bos_token", True):
        named["bos"] = None
    names = {f"{name[:3]}_token": pieces[i] for name, i in named.items() if i is not None}
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    saved.chat_template = metadata.get("tokenizer.chat_template")
    return TextTokenizer(saved)


def stop_ids(metadata: dict[str, Any]) -> list[int]:
    """The model's own ends: of the sequence, and of a turn where the file names one."""
    ends = (metadata.get(f"{_KEY}{name}_token_id") for name in ("eos", "eot"))
    return [end for end in ends if end is not None]


def _from_json(beside: Path, pieces: list[str]) -> Tokenizer:
    backend = Tokenizer.from_file(str(beside))
    found = backend.get_vocab(with_added_tokens=True)
    if wrong := [text for text, i in found.items() if i >= len(pieces) or pieces[i] != text]:
        raise ModelError(
            f"{beside}: {some(wrong, 3)} stand elsewhere in the GGUF file's vocabulary; the two do "
            "not belong together: remove one"
        )
    return backend
