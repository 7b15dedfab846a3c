"""Which chat codec a name means."""

from pathlib import Path

from starling.data.chat import ChatCodec, build_codec
from starling.data.tokenizer import load_tokenizer


def find_codec(reference: str, chat_format: str | None) -> ChatCodec:
    """The chat codec of a model folder or hub id, without its weights; `openchat` needs neither."""
    if reference == "openchat" and not Path(reference).exists():
        return build_codec(chat_format or "openchat", load_tokenizer(reference), [])
    from starling.models.loading import load_codec, load_config  # it imports torch

    return load_codec(reference, load_config(reference), chat_format)
