"""A language model in this process as a responder: messages in, text out."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from starling.base.hashing import hash_json, hash_tree
from starling.data.chat import ChatCodec
from starling.data.records import Message
from starling.models.causal_lm import load_language_model
from starling.models.interfaces import Engine, GenerationRequest, Reply, Request, Usage
from starling.models.torch_engine import TorchEngine


class Local:
    """Answers conversations through an engine that speaks one chat format."""

    # Samples of one batch share their matrix products, so a batch is one unit.
    commits_together = True

    def __init__(self, engine: Engine, codec: ChatCodec, *, identity: str) -> None:
        self.engine = engine
        self.codec = codec
        self.identity = identity

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield each reply as its row ends."""
        pending = {request.id: self.generation_request(request) for request in requests}
        for sample in self.engine.generate(pending.values()):
            prompt_tokens = len(pending[sample.request_id].prompt_ids)
            yield Reply(
                request_id=sample.request_id,
                text=self.codec.decode_response(sample.ids),
                finish_reason=sample.finish_reason,
                usage=Usage(prompt_tokens, len(sample.ids)),
                ids=sample.ids,
            )

    def generation_request(self, request: Request) -> GenerationRequest:
        """The request as token ids, with the assistant's prefix last."""
        encoded = self.codec.encode(request.messages, mode=request.mode, generation_prompt=True)
        return GenerationRequest(request.id, tuple(encoded.ids), request.sampling)


def trim_turns(
    messages: tuple[Message, ...], codec: ChatCodec, *, limit: int, mode: str | None = None
) -> tuple[Message, ...]:
    """Drop whole exchanges from the beginning until the prompt fits `limit` tokens.

    A system message stays.  The last user turn is never dropped, so the result may not fit: the
    caller counts or refuses it.
    """
    system = messages[:1] if messages[0].role == "system" else ()
    turns = messages[len(system) :]
    while len(turns) > 2:
        encoded = codec.encode((*system, *turns), mode=mode, generation_prompt=True)
        if len(encoded.ids) <= limit:
            break
        turns = turns[2:]
    return (*system, *turns)


def load_local(reference: str, device: str = "cpu", *, chat_format: str | None = None) -> Local:
    """Load a folder or hub id behind the in-process engine; its identity follows its content."""
    loaded = load_language_model(reference, device=device, chat_format=chat_format)
    engine = TorchEngine(
        loaded.model, stop_ids=loaded.codec.stop_ids, pad_id=loaded.codec.tokenizer.pad_id
    )
    folder = Path(reference)
    content = hash_tree(folder) if folder.is_dir() else reference
    identity = hash_json({"model": content, "chat_format": loaded.codec.format.name})
    return Local(engine, loaded.codec, identity=identity)
