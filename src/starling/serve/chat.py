"""Chat in the terminal: answers stream as they are decoded; history is trimmed by whole turns."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from starling.base.context import choose_device
from starling.base.errors import DataError, InputError
from starling.base.files import neighbours
from starling.data.records import Message
from starling.models.interfaces import Request, Sampling
from starling.models.local import load_local, trim_turns
from starling.models.torch_engine import TorchEngine

HELP = "Type a message; /retry asks again, /new forgets the conversation, /quit leaves."
NUM_SUGGESTIONS = 3


class ChatSession:
    """One conversation with a local model."""

    def __init__(
        self, model: str, *, device: str | None, max_tokens: int, temperature: float
    ) -> None:
        self._local = load_local(model, choose_device(device))
        engine = self._local.engine
        assert isinstance(engine, TorchEngine)
        self._engine = engine
        config = engine.model.config
        self._context = getattr(config, "max_position_embeddings", None) or 4096
        self._max_tokens = min(max_tokens, self._context // 2)
        self._temperature = temperature
        self.messages: tuple[Message, ...] = ()
        self._num_answers = 0

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` piece by piece, and remember both; no character is cut."""
        # Bytes that are no UTF-8 arrive on a pipe as lone surrogates, which no tokenizer takes.
        text = text.encode("utf-8", "replace").decode()
        asked = (*self.messages, Message(role="user", content=text))
        codec = self._local.codec
        kept = trim_turns(asked, codec, limit=self._context - self._max_tokens)
        if len(kept) < len(asked):
            _note(f"[forgetting the first {len(asked) - len(kept)} messages: the context is full]")
        self._num_answers += 1
        sampling = Sampling(self._max_tokens, self._temperature, seed=self._num_answers)
        request = self._local.generation_request(Request("chat", kept, sampling))
        ids: list[int] = []
        shown = ""
        for token in self._engine.stream(request):
            ids.append(token)
            text_so_far = codec.decode_response(ids)
            # A character whose bytes are still incomplete shows as U+FFFD: wait for the rest.
            if not text_so_far.endswith("\ufffd") and text_so_far != shown:
                yield text_so_far[len(shown) :]
                shown = text_so_far
        answer = codec.decode_response(ids)
        yield answer[len(shown) :]
        self.messages = (*kept, Message(role="assistant", content=answer))

    def forget_last(self) -> str | None:
        """Drop the last exchange; returns what the user had typed, None when there was none."""
        if not self.messages:
            return None
        typed = self.messages[-2].content
        self.messages = self.messages[:-2]
        return typed


def resolve_model(reference: str) -> tuple[str, list[str]]:
    """The model to chat with, and prompts to offer: a run folder's newest model, or `reference`."""
    run = Path(reference)
    if not run.exists() and run.parent != Path() and run.parent.is_dir():
        raise DataError(f"there is no folder {run}. {neighbours(run)}")
    if not run.is_dir() or (run / "config.json").is_file():
        return reference, []
    for stage in ("ppo", "sft"):
        if (run / stage / "model" / "config.json").is_file():
            return str(run / stage / "model"), _suggestions(run)
    raise DataError(
        f"{run} holds neither a model (config.json) nor a run's ppo/model or sft/model; "
        "`starling demo` makes a run in runs/demo"
    )


def _suggestions(run: Path) -> list[str]:
    """The first questions that the bench asked: nothing was trained on them."""
    path = run / "bench" / "answers.jsonl"
    found: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        row = json.loads(line)
        if isinstance(row, dict) and row.get("turn") == 1:
            found.setdefault(row["category"], row["messages"][-1]["content"])
    return list(found.values())[:NUM_SUGGESTIONS]


def chat(
    model: str,
    *,
    device: str | None = "cpu",
    max_tokens: int = 256,
    temperature: float = 0.0,
    once: str | None = None,
) -> None:
    """Talk until /quit or the end of input; with `once`, answer that one message.

    What the model says goes to stdout, everything else to stderr.  On a pipe, each line is a
    message and nothing waits.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"the temperature is {temperature}; it must be 0 (greedy) or above")
    if max_tokens < 1:
        raise InputError(f"max-tokens is {max_tokens}; it must be at least 1")
    reference, suggestions = resolve_model(model)
    session = ChatSession(reference, device=device, max_tokens=max_tokens, temperature=temperature)
    if once is not None:
        _say(session, once)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        _note(f"Chatting with {reference} at temperature {temperature:g}. {HELP}")
        for suggestion in suggestions:
            _note(f"  try: {suggestion}")
    while (line := _read(interactive)) is not None:
        if line == "/quit":
            return
        try:
            _handle(session, line)
        except DataError as error:  # longer than the context
            if not interactive:
                raise
            _note(str(error))


def _handle(session: ChatSession, line: str) -> None:
    if line == "/help":
        _note(HELP)
    elif line == "/new":
        session.messages = ()
        _note("A new conversation.")
    elif line == "/retry":
        typed = session.forget_last()
        if typed is not None:
            _say(session, typed)
        else:
            _note("There is nothing to ask again.")
    elif line.startswith("/"):
        _note(f"unknown command {line.split()[0]}. {HELP}")
    elif line:
        _say(session, line)


def _say(session: ChatSession, text: str) -> None:
    before = session.messages
    try:
        for piece in session.reply(text):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        # Ctrl-C stops the answer, not the program.
        session.messages = before
    sys.stdout.write("\n")
    sys.stdout.flush()


def _read(interactive: bool) -> str | None:
    try:
        if interactive:
            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() if line else None


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
