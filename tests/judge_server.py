"""An OpenAI-compatible server that stands where a judge and candidate models stand.

    python tests/judge_server.py --port 0 --checks prompts.jsonl       prints its URL

No weights that can judge are to be had in a test, so what a judge would know stands in a table, the
prompts' checks by the user's text; all else is as with a language model: it reads the fenced
message alone, grades what stands in the blocks, and answers in prose that closes with a verdict.
Asked anything else it is a candidate, and answers well or badly as its model's name says
(`candidate-0.8` is right four times in five).  A script may put any fault in a reply's place.
"""

import argparse
import asyncio
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from models.fake_server import Say, completion, error
from starling.judging.rubric import Checks, grade

BLOCK = re.compile(
    r"^<<(?P<name>[a-z]+(?: (?P<label>[A-Z]))?) (?P<code>[0-9a-f]+)>>\n"
    r"(?P<text>.*?)\n<<end (?P=name) (?P=code)>>$",
    re.DOTALL | re.MULTILINE,
)
PAIR = re.compile(r"^([A-Z]) and ([A-Z])$", re.MULTILINE)
RESET = 0
"""As the status of a `Say`: the connection is reset without an answer."""

GOOD = ("Sure! {}.", "Gladly: {}. Hope that helps.", "Of course! It is {}.", "Happy to. {}.")
DULL = ("Well, um, {}", "you know, {} more or less.", "I guess {}, basically", "so yeah, {}")
RUDE = ("duh, {}", "{}, obviously, even for you", "ugh, whatever: {}")

Play = Callable[[dict[str, Any], int, str], str | Say]
"""The n-th call (from 0) about the same messages, and what would be said: what is said instead."""


def read_checks(paths: Iterable[Path]) -> dict[str, Checks]:
    """Checks by the user's text, from files of prompts and of two-turn questions."""
    table: dict[str, Checks] = {}
    for row in (json.loads(line) for path in paths for line in path.open(encoding="utf-8")):
        turns = row["turns"] if "turns" in row else [row["messages"][-1]["content"]]
        checks = row["checks"] if "turns" in row else [row["checks"]]
        table |= {
            text.strip(): Checks.model_validate(each)
            for text, each in zip(turns, checks, strict=True)
        }
    return table


def judge_says(task: str, table: Mapping[str, Checks]) -> str | None:
    """The reply of an upright judge to one of our questions; None where the task is no such."""
    blocks = list(BLOCK.finditer(task))
    answers = {
        found["label"]: found["text"] for found in blocks if found["name"].startswith("answer")
    }
    if not answers:
        return None
    [*_, asked] = [found["text"] for found in blocks if found["name"] == "user"]
    checks = table[asked.strip()]
    totals = {label: grade(checks, text).total for label, text in answers.items()}
    if None in totals:
        word = "well" if totals[None] > 0.7 else "in part"
        return f"The answer does what was asked {word}.\n\n[[{round(1 + 9 * totals[None])}]]"
    # Equal grades are parted by what was said, never by place.
    order = sorted(totals, key=lambda label: (-totals[label], answers[label]))
    outside = task[blocks[-1].end() :]
    pairs = PAIR.findall(outside) or list(combinations(sorted(totals), 2))
    walk = [
        f"{one} and {other}: {min(one, other, key=order.index)} is better, it keeps to the point."
        for one, other in pairs
    ]
    closing = f"On the whole {order[0]} serves best, and {order[-1]} [sic] least of all."
    return "\n".join(["Good-natured: yes", "", *walk, "", closing, "", f"[[{quoted(order)}]]"])


def quoted(labels: Iterable[str]) -> str:
    return ", ".join(f"'{label}'" for label in labels)


def candidate_says(model: str, asked: str, seed: int, checks: Checks | None) -> str:
    """An answer of the quality that the model's name states; the same for the same arguments."""
    random = Random(f"{model}/{asked}/{seed}")
    found = re.search(r"[0-9.]+$", model)
    quality = float(found[0]) if found else 0.5
    phrases = (*checks.contains_all, *checks.contains_any[:1]) if checks else ("that",)
    right = " and ".join(phrases) or "so"
    body = right if random.random() < quality else f"nothing but {random.randrange(1000)}"
    voices = GOOD if random.random() < quality else random.choice((DULL, RUDE))
    return random.choice(voices).format(body)


class JudgeServer:
    """Serves while its block lasts; `counts` says how often each kind was asked."""

    def __init__(
        self,
        table: Mapping[str, Checks],
        *,
        play: Play = lambda body, n, text: text,
        delay_seconds: float = 0.0,
        port: int = 0,
    ) -> None:
        self.table, self.play, self.delay_seconds, self.port = table, play, delay_seconds, port
        self.counts: Counter[str] = Counter()
        self.num_open = self.most_open = 0
        self._times_asked: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def wait(self) -> None:
        """Serve until the process is told to stop."""
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        start = asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=2048)
        server = self._loop.run_until_complete(start)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, call after call."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                found = re.search(r"^content-length: *(\d+)", head, re.MULTILINE)
                body = await reader.readexactly(int(found[1]) if found else 0)
                if head.startswith("get"):
                    say = Say(json.dumps(self.counts | {"most_open": self.most_open}))
                else:
                    say = await self._answer(json.loads(body))
                if say.status == RESET:
                    writer.transport.abort()
                    return
                writer.write(_http(say))
                await writer.drain()
                if say.cut:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        writer.close()

    async def _answer(self, body: dict[str, Any]) -> Say:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            last = body["messages"][-1]["content"]
            n = self._times_asked[
                key := json.dumps([body["model"], body["messages"], body["seed"]])
            ]
            self._times_asked[key] += 1
            try:
                text = judge_says(last, self.table)
            except KeyError as unknown:
                return error(400, f"no checks are known for {unknown}")
            kind = "candidate" if text is None else "judge"
            self.counts.update(("requests", kind))
            if text is None:
                checks = self.table.get(last.strip())
                text = candidate_says(body["model"], last, body["seed"], checks)
            said = self.play(body, n, text)
            await asyncio.sleep(self.delay_seconds)
            if isinstance(said, Say):
                await asyncio.sleep(said.delay_seconds)
                return said
            read = sum(len(message["content"]) for message in body["messages"])
            usage = {"prompt_tokens": read // 4 + 1, "response_tokens": len(said) // 4 + 1}
            return Say(completion(said, **usage))
        finally:
            self.num_open -= 1


def _http(say: Say) -> bytes:
    content = say.body.encode() if isinstance(say.body, str) else say.body
    length = len(content) + (10 if say.cut else 0)
    headers = {"Content-Type": "application/json"} | say.headers | {"Content-Length": str(length)}
    lines = [
        f"HTTP/1.1 {say.status} Said",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--checks", type=Path, nargs="+", required=True)
    parser.add_argument("--delay-seconds", type=float, default=0.0)
    given = parser.parse_args()
    table = read_checks(given.checks)
    with JudgeServer(table, delay_seconds=given.delay_seconds, port=given.port) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        server.wait()


if __name__ == "__main__":
    main()
