"""Chat in the terminal: answers stream, commands change how, Ctrl-C stops an answer.

What the model says goes to stdout, everything else to stderr.  On a pipe each line is a message or
a command, nothing waits, and the first error ends it.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

from starling.base.errors import InputError, visible
from starling.base.files import write_atomically
from starling.data.records import Message
from starling.models.interfaces import Reply
from starling.serve.session import Chat, clean

NUM_SUGGESTIONS = 3


class Command(NamedTuple):
    """What follows a command, what it does, and the method that does it."""

    usage: str
    summary: str
    call: "Callable[[Terminal, str], None]"


class Terminal:
    """One conversation: what was said, and what the commands do to it."""

    def __init__(self, talk: Chat, *, interactive: bool) -> None:
        self.talk = talk
        self.messages: tuple[Message, ...] = ()
        self._interactive = interactive
        self._written: set[Path] = set()
        self._num_interrupts = 0

    def run(self) -> None:
        """Read messages and commands until /quit, the end of input, or Ctrl-C twice."""
        while self._num_interrupts < 2:
            try:
                line = self._read()
                if line is None or line.strip() == "/quit":
                    return
                if line.strip():
                    self._num_interrupts = 0
                    self._handle(line)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._num_interrupts += 1
                note("" if self._num_interrupts > 1 else "\n[Ctrl-C again, or /quit, leaves]")

    def say(self, text: str) -> None:
        """Answer a message and remember both; an answer that was stopped is kept as far as it came.

        When there is no answer at all, the conversation is as it was.
        """
        text = clean(text)
        asked = (*self.messages, Message(role="user", content=text))
        pieces: list[str] = []
        if self.talk.best_of > 1:
            note(f"[{self.talk.best_of} answers, of which the reward model picks one]")
        started = time.perf_counter()
        try:
            with contextlib.closing(self.talk.stream(asked)) as stream:
                reply = _write_pieces(stream, pieces)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._num_interrupts = 1
            if not pieces:
                note("\n[stopped before a word was said; nothing is kept]")
                return
            summary = "stopped: /retry asks again, /undo takes it back"
        else:
            summary = _summary(self.talk, reply, time.perf_counter() - started)
            pieces = pieces or [""]  # an empty answer is an empty line
        finally:
            if pieces:
                _write("\n")
        self.messages = (*asked, Message(role="assistant", content="".join(pieces)))
        note(f"[{summary}]")

    def _read(self) -> str | None:
        if self._interactive and sys.stdout.isatty():
            with contextlib.suppress(EOFError):
                return input("> ")
            return None
        if self._interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        return sys.stdin.readline() or None

    def _handle(self, line: str) -> None:
        """A command or a message; interactive, an error is told and nothing is lost."""
        try:
            if not line.startswith("/"):
                self.say(line.strip())
                return
            name, _, rest = line[1:].strip().partition(" ")
            if name not in COMMANDS:
                raise InputError(
                    f"unknown command /{name}; /help lists all. A space before / sends it as text"
                )
            COMMANDS[name].call(self, rest.strip())
        except InputError as error:
            if not self._interactive:
                raise
            note(str(error))

    def _set(self, name: str, value: object, said: Callable[[], str]) -> None:
        self.talk.change(name, value)
        note(said())

    def mode(self, rest: str) -> None:
        known = ", ".join(self.talk.modes) or "those of the server"
        mode = rest or self.talk.mode
        self._set("mode", mode, lambda: f"mode {self.talk.mode or 'default'}; there are {known}")

    def temperature(self, rest: str) -> None:
        number = _number(rest, float)
        self._set("temperature", number, lambda: f"temperature {number:g}")

    def max_tokens(self, rest: str) -> None:
        number = _number(rest, int)
        self._set("max_tokens", number, lambda: f"answers of at most {number} tokens")

    def best_of(self, rest: str) -> None:
        number = _number(rest, int)
        self._set("best_of", number, self._how_picked)

    def _how_picked(self) -> str:
        if self.talk.best_of == 1:
            return "one answer, and no reward model"
        because = " (at 0 all are alike)" if self.talk.temperature == 0 else ""
        return (
            f"the best of {self.talk.best_of} by {self.talk.reward_model}, sampled at temperature "
            f"{self.talk.sampling_temperature:g}{because}"
        )

    def system(self, rest: str) -> None:
        said = "the system message is set" if rest else "no system message"
        self._set("system", rest or None, lambda: said)

    def retry(self, _rest: str) -> None:
        if not self.messages:
            raise InputError("there is nothing to ask again")
        before, typed = self.messages, self.messages[-2].content
        self.messages = before[:-2]
        try:
            self.say(typed)
        finally:
            if len(self.messages) < len(before):
                self.messages = before
        if self.messages == before and self.talk.sampling_temperature == 0:
            note("[at temperature 0 an answer stays the same; /temperature 1 draws another]")

    def undo(self, _rest: str) -> None:
        if not self.messages:
            raise InputError("there is nothing to take back")
        note(f"took back {self.messages[-2].content!r} and its answer")
        self.messages = self.messages[:-2]

    def new(self, _rest: str) -> None:
        self.messages = ()
        note("A new conversation.")

    def save(self, rest: str) -> None:
        path = Path(rest).expanduser()
        if not rest or not self.messages:
            raise InputError("there is nothing to save" if rest else "/save FILE: name a file")
        if path.resolve() not in self._written and path.exists():
            raise InputError(f"{path} is there already; name another file")
        told = [{"role": "system", "content": self.talk.system}] if self.talk.system else []
        rows = [*told, *(message.model_dump() for message in self.messages)]
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, [text.encode("utf-8", "replace")])
        self._written.add(path.resolve())
        note(f"saved {len(rows)} messages; starling tokens --file {path} shows their ids")

    def help(self, _rest: str) -> None:
        note("Type a message, or a command:")
        for name, command in COMMANDS.items():
            note(f"  {f'/{name} {command.usage}':20} {command.summary}")
        note("Ctrl-C stops an answer; pressed again at the prompt, it leaves.")


COMMANDS = {
    "mode": Command("NAME", "another mode of the chat format, e.g. code", Terminal.mode),
    "temperature": Command("X", "0 is greedy, 1 samples as trained", Terminal.temperature),
    "max-tokens": Command("N", "the longest answer", Terminal.max_tokens),
    "best-of": Command("N", "draw N answers, the reward model picks", Terminal.best_of),
    "system": Command("TEXT", "a system message; without TEXT none", Terminal.system),
    "retry": Command("", "ask the last message again", Terminal.retry),
    "undo": Command("", "take back the last message and its answer", Terminal.undo),
    "new": Command("", "a new conversation", Terminal.new),
    "save": Command("FILE", "write the conversation as JSON", Terminal.save),
    "help": Command("", "this list", Terminal.help),
    "quit": Command("", "leave", lambda terminal, rest: None),
}


def chat(talk: Chat, *, once: str | None = None) -> None:
    """Talk until /quit or the end of input; with `once`, answer that one message."""
    interactive = once is None and sys.stdin.isatty()
    terminal = Terminal(talk, interactive=interactive)
    if talk.sampling_temperature == 0:
        note("[temperature 0, as Starling's model card advises; /temperature 1 samples]")
    if once is not None:
        terminal.say(once)
        return
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history
        note(f"Chatting with {talk.model}. /help lists the commands, /quit leaves.")
        for suggestion in suggestions(Path(talk.model)):
            note(f"  try: {suggestion}")
    terminal.run()


def suggestions(run: Path) -> list[str]:
    """The first questions that a run's bench asked: nothing was trained on them."""
    path = run / "bench" / "answers.jsonl"
    found: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        # They are suggestions: what a stopped bench left half written is passed over.
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
            row = json.loads(line)
            if row["turn"] == 1:
                found.setdefault(row["category"], row["messages"][-1]["content"])
    return list(found.values())[:NUM_SUGGESTIONS]


def _write_pieces(stream: Generator[str, None, Reply], pieces: list[str]) -> Reply:
    """Write the pieces as they come, and note them; returns the reply."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            return end.value
        pieces.append(piece)
        _write(visible(piece) if sys.stdout.isatty() else piece)


def _summary(talk: Chat, reply: Reply, seconds: float) -> str:
    """What an answer took: tokens and tokens/s, and whether it was cut."""
    count = reply.usage.response_tokens
    said = f"{count} tokens"
    if reply.finish_reason == "length":
        way_out = f"/max-tokens {2 * count}, then /retry"
        if count < talk.max_tokens:
            way_out = "the context is full; /new begins again"
        said = f"cut at {count} tokens: {way_out}"
    if talk.best_of > 1:
        return f"{said}, the best of {talk.best_of}, {seconds:.1f} s"
    return f"{said}, {count / seconds:.1f} tokens/s" if count else f"{seconds:.1f} s"


def _number(text: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(text)
    except ValueError as error:
        whole = "a whole number" if kind is int else "a number"
        raise InputError(f"found {text!r}; it must be {whole}, e.g. 1") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line for the person, never part of an answer."""
    sys.stderr.write(visible(text) + "\n")
    sys.stderr.flush()
