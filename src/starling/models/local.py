"""A language model in this process as a responder: messages in, text out, whole or as it comes."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from starling.base.hashing import hash_json, hash_tree
from starling.data.chat import ChatCodec
from starling.data.records import Message
from starling.models.causal_lm import LanguageModel, load_language_model
from starling.models.interfaces import Engine, GenerationRequest, Reply, Request, Sample, Usage
from starling.models.torch_engine import TorchEngine


class Local:
    """Answers conversations through an engine that speaks one chat format.

    `context_length` is how many tokens the model reads and writes in all; None: not known.
    """

    # Samples of one batch share their matrix products, so a batch is one unit.
    commits_together = True

    def __init__(
        self, engine: Engine, codec: ChatCodec, *, identity: str, context_length: int | None = None
    ) -> None:
        self.engine = engine
        self.codec = codec
        self.identity = identity
        self.context_length = context_length

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield each reply as its row ends; its text ends before a stop string."""
        asked = {request.id: request for request in requests}
        generations = {id: self.generation_request(request) for id, request in asked.items()}
        for sample in self.engine.generate(generations.values()):
            text = self.codec.decode_response(sample.ids)
            stop = asked[sample.request_id].sampling.stop
            yield _reply(generations[sample.request_id], sample, before_stop(text, stop))

    def stream(self, request: Request) -> Generator[str, None, Reply]:
        """Yield the answer piece by piece and return it; closing stops the decoding.

        No piece cuts a character, and what may become a stop string waits until it cannot.
        """
        generation = self.generation_request(request)
        stop = request.sampling.stop
        samples: list[Sample] = []
        ids: list[int] = []
        shown = ""

        def decoded() -> Generator[int]:
            samples.append((yield from self.engine.stream(generation)))

        with contextlib.closing(decoded()) as tokens:
            for token in tokens:
                ids.append(token)
                # A character whose bytes are still incomplete shows as U+FFFD.
                certain = self.codec.decode_response(ids).rstrip("\ufffd")
                certain = before_stop(certain, stop)
                certain = certain[: len(certain) - _stop_begun(certain, stop)]
                if len(certain) > len(shown):
                    yield certain[len(shown) :]
                    shown = certain
        text = before_stop(self.codec.decode_response(ids), stop)
        if len(text) > len(shown):
            yield text[len(shown) :]
        # What was shown stays shown: a later byte can make a decoder take back a character.
        return _reply(generation, samples[0], shown + text[len(shown) :])

    def generation_request(self, request: Request) -> GenerationRequest:
        """The request as token ids, with the assistant's prefix last."""
        encoded = self.codec.encode(request.messages, mode=request.mode, generation_prompt=True)
        return GenerationRequest(request.id, tuple(encoded.ids), request.sampling)


def before_stop(text: str, stop: Iterable[str]) -> str:
    """The text up to the first of the stop strings."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text


def _stop_begun(text: str, stop: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    begun = (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(begun, default=0)


def _reply(generation: GenerationRequest, sample: Sample, text: str) -> Reply:
    # Only who cancels sees "cancelled", and to a reader that answer was cut.
    return Reply(
        request_id=sample.request_id,
        text=text,
        finish_reason="stop" if sample.finish_reason == "stop" else "length",
        usage=Usage(len(generation.prompt_ids), len(sample.ids)),
        ids=sample.ids,
    )


def trim_turns(
    messages: tuple[Message, ...], codec: ChatCodec, *, limit: int, mode: str | None = None
) -> tuple[Message, ...]:
    """Drop whole exchanges from the beginning until the prompt fits `limit` tokens.

    A system message stays.  The last user turn is never dropped, so the result may not fit: the
    caller counts or refuses it.
    """
    while (shorter := drop_oldest(messages)) is not None:
        encoded = codec.encode(messages, mode=mode, generation_prompt=True)
        if len(encoded.ids) <= limit:
            break
        messages = shorter
    return messages


def drop_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The conversation without its oldest exchange; None when only the last turn is left."""
    first = 1 if messages[0].role == "system" else 0
    return None if len(messages) - first <= 2 else (*messages[:first], *messages[first + 2 :])


def load_local(
    reference: str, device: str = "cpu", *, dtype: str = "float32", chat_format: str | None = None
) -> Local:
    """Load a folder or hub id behind the in-process engine; its identity follows its content."""
    loaded = load_language_model(reference, device=device, dtype=dtype, chat_format=chat_format)
    folder = Path(reference)
    content = hash_tree(folder) if folder.is_dir() else reference
    said = {"model": content, "chat_format": loaded.codec.format.name}
    # The usual one goes unsaid: identities in ledgers that there are stay what they were.
    said |= {} if dtype == "float32" else {"dtype": dtype}
    return in_process(loaded, identity=hash_json(said))


def in_process(loaded: LanguageModel, *, identity: str) -> Local:
    """A loaded model behind the in-process engine."""
    codec = loaded.codec
    engine = TorchEngine(
        loaded.model,
        stop_ids=codec.stop_ids,
        pad_id=codec.tokenizer.pad_id,
        decode=codec.decode_response,
    )
    context_length = getattr(loaded.model.config, "max_position_embeddings", None)
    return Local(engine, codec, identity=identity, context_length=context_length)
