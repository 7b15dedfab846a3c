"""SIGKILL with a thousand calls in flight: nothing that is stored is bought again.

Server and clients are forked, so that none of them spends its time on imports.  The server writes
down each request that it has received and each reply that it has wholly handed to the system; the
client, each reply that it was given.
"""

import asyncio
import json
import os
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import openai  # noqa: F401
from openai import DefaultAioHttpClient  # noqa: F401

from ledgers import ledger_rows
from starling.data.records import Message
from starling.judging.recorded import Recorded
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Reply, Request, Sampling
from starling.models.loop import allow_connections

IN_FLIGHT = 1000
NAMES = [f"question {n}" for n in range(1250)]
ENOUGH = 150
"""So many replies are stored when the client is killed, and some calls are not sent yet."""


def test_a_kill_with_a_thousand_calls_in_flight_costs_at_most_these(tmp_path):
    whole, killed = tmp_path / "whole.sqlite", tmp_path / "killed.sqlite"
    with served(tmp_path / "served.log") as url:
        assert ended(start(lambda: ask(url, whole, tmp_path / "whole"))) == 0
        asked_before = len(received(tmp_path))

        client = start(lambda: ask(url, killed, tmp_path / "killed"))
        wait_until(lambda: len(lines(tmp_path / "killed.given")) >= ENOUGH)
        os.kill(client, signal.SIGKILL)
        assert ended(client) == -signal.SIGKILL
        given = set(lines(tmp_path / "killed.given"))
        rows = {row["request_id"]: row for row in ledger_rows(killed)}
        answered = {name for name, row in rows.items() if row["state"] == "answered"}
        in_flight = {name for name, row in rows.items() if row["state"] == "sent"}
        time.sleep(0.2)  # what the client had sent may still be read
        sent = set(received(tmp_path)[asked_before:])

        assert ended(start(lambda: ask(url, killed, tmp_path / "killed"))) == 0
        asked = Counter(received(tmp_path)[asked_before:])

    # Every reply that a caller was given was stored before, and every call before it was sent.
    assert given <= answered
    assert sent <= answered | in_flight
    assert ENOUGH <= len(answered) < len(NAMES) - IN_FLIGHT / 2
    assert in_flight
    assert len(in_flight) <= IN_FLIGHT

    twice = {name for name, times in asked.items() if times > 1}
    assert set(asked) == set(NAMES)
    assert max(asked.values()) == 2
    assert twice
    assert twice <= in_flight
    assert not twice & answered
    lost = {row["key"]: row["times"] for row in ledger_rows(killed, "lost")}
    assert lost == {rows[name]["key"]: 1 for name in in_flight}

    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert ledger_rows(killed) == ledger_rows(whole)
    assert len(lines(tmp_path / "whole")) == len(NAMES)


def ask(url: str, ledger: Path, out: Path) -> None:
    """Ask everything; leave the sorted replies in `out`, and what was given so far in out.given."""
    requests = [
        Request(name, (Message(role="user", content=name),), Sampling(9, 0.0)) for name in NAMES
    ]
    replies = []
    with (
        Recorded(Endpoint(url, "m", concurrency=IN_FLIGHT), ledger) as recorded,
        open(f"{out}.given", "w", encoding="utf-8", buffering=1) as given,
    ):
        for reply in recorded.respond(requests):
            assert isinstance(reply, Reply), reply
            replies.append(f"{reply.request_id}: {reply.text}\n")
            given.write(f"{reply.request_id}\n")
            time.sleep(0.001)  # in which a reply that was given and not stored would be lost
    out.write_text("".join(sorted(replies)), "utf-8")


class Server(asyncio.Protocol):
    """Answers each question in its own time, 0.1 to 1.1 s, and writes down what it saw."""

    log: int
    received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if not end or len(body) < length:
            return
        self.received = b""
        name = json.loads(body)["messages"][-1]["content"]
        os.write(self.log, f"received {name}\n".encode())
        seconds = 0.1 + int(name.split()[1]) * 37 % 100 / 100
        asyncio.get_running_loop().call_later(seconds, self.answer, name)

    def answer(self, name: str) -> None:
        message = {"role": "assistant", "content": f"about {name}"}
        usage = {"prompt_tokens": 5, "completion_tokens": 3}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
        if self.transport.is_closing():
            return
        self.transport.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        if not self.transport.get_write_buffer_size():
            os.write(self.log, f"replied {name}\n".encode())


@contextmanager
def served(log: Path):
    with socket.create_server(("127.0.0.1", 0), backlog=2 * IN_FLIGHT) as listening:
        port = listening.getsockname()[1]

        def serve() -> None:
            allow_connections(IN_FLIGHT)
            Server.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            asyncio.run(serve_forever())

        async def serve_forever() -> None:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(Server, sock=listening, backlog=2 * IN_FLIGHT)
            await server.serve_forever()

        process = start(serve)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.kill(process, signal.SIGKILL)
            ended(process)


def start(work: Callable[[], None]) -> int:
    """Do it in a child process, whose id is returned."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def received(folder: Path) -> list[str]:
    log = [line.split(" ", 1) for line in lines(folder / "served.log")]
    return [name for event, name in log if event == "received"]


def lines(path: Path) -> list[str]:
    """The lines that are complete."""
    text = path.read_text("utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
