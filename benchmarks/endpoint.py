"""How much of a server's rate reaches us: an answer takes 200 ms, N calls are in flight.

    python benchmarks/endpoint.py [--in-flight 32 128] [--rounds 3] [--seconds 4]

Raced, interleaved, against one asyncio server in a process of its own: `Endpoint`; the same on the
client's own transport, with one client for all calls or one per 16; and what else stood to choose:
the client's own `create`, on either transport.  The rate is taken in a window after a warm-up;
possible are N calls per 200 ms.  Prints JSON: share of the possible rate (median, least, most over
the rounds) and CPU milliseconds of this process per call.

Recorded results: endpoint.md beside this file.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

from starling.data.records import Message
from starling.models import endpoint as endpoint_module
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Reply, Request, Sampling

ANSWER_SECONDS = 0.2
WARM_UP_SECONDS = 1.5
PROMPT, ANSWER = "hello " * 100, "word " * 200
UNLIMITED = 10**9

Stamp = tuple[float, float]
"""When an answer came, and the CPU seconds of this process until then."""
Ask = Callable[[str, int, float], list[Stamp]]
"""Keeps a server busy with so many calls until a time."""


class Server(asyncio.Protocol):
    """The least that a server can do, so that the client is what is measured."""

    choice = {"message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    reply = head % len(body) + body
    received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) >= length:
            self.received = b""
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self.answer)

    def answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.reply)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class OwnTransport(Endpoint):
    """On the transport that the client has by itself."""

    def _open_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options())


def with_endpoint(kind: type[Endpoint], calls_per_client: int) -> Ask:
    """Through `Endpoint.respond`."""

    def ask(url: str, in_flight: int, end: float) -> list[Stamp]:
        def requests() -> Iterator[Request]:
            messages = (Message(role="user", content=PROMPT),)
            while time.perf_counter() < end:
                yield Request("id", messages, Sampling(512))

        endpoint_module.CALLS_PER_CLIENT = calls_per_client
        stamps = []
        for outcome in kind(url, "m", concurrency=in_flight).respond(requests()):
            assert isinstance(outcome, Reply), outcome
            stamps.append((time.perf_counter(), time.process_time()))
        return stamps

    return ask


def with_create(calls_per_client: int, http_client: Callable[..., Any] | None = None) -> Ask:
    """Through the client's own `create`."""

    def new_client(url: str) -> openai.AsyncOpenAI:
        http = http_client(timeout=None) if http_client else None
        return openai.AsyncOpenAI(
            api_key="k", base_url=url, max_retries=0, timeout=None, http_client=http
        )

    async def ask_all(url: str, in_flight: int, end: float) -> list[Stamp]:
        clients = [new_client(url) for _ in range(-(-in_flight // calls_per_client))]
        stamps = []

        async def caller(number: int) -> None:
            create = clients[number % len(clients)].chat.completions.with_raw_response.create
            while time.perf_counter() < end:
                response = await create(
                    model="m",
                    messages=[{"role": "user", "content": PROMPT}],
                    temperature=1.0,
                    seed=0,
                    max_tokens=512,
                )
                assert response.http_response.content
                stamps.append((time.perf_counter(), time.process_time()))

        await asyncio.gather(*map(caller, range(in_flight)))
        for client in clients:
            await client.close()
        return stamps

    return lambda url, in_flight, end: asyncio.run(ask_all(url, in_flight, end))


def measure(ask: Ask, url: str, in_flight: int, seconds: float) -> tuple[float, float]:
    """Share of the possible rate inside the window, and CPU milliseconds per call there."""
    begin = time.perf_counter() + WARM_UP_SECONDS
    stamps = ask(url, in_flight, begin + seconds)
    inside = [cpu for at, cpu in stamps if begin <= at < begin + seconds]
    if len(inside) < 2:
        raise SystemExit("the machine is too busy: no answers came in the window")
    possible = seconds * in_flight / ANSWER_SECONDS
    return len(inside) / possible, 1000 * (inside[-1] - inside[0]) / (len(inside) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    ways = {
        "Endpoint": with_endpoint(Endpoint, endpoint_module.CALLS_PER_CLIENT),
        "Endpoint, own transport, one client": with_endpoint(OwnTransport, UNLIMITED),
        "Endpoint, own transport, 16 calls a client": with_endpoint(OwnTransport, 16),
        "create, one client": with_create(UNLIMITED),
        "create, aiohttp": with_create(UNLIMITED, openai.DefaultAioHttpClient),
    }
    command = [sys.executable, __file__, "serve"]
    results: dict[str, object] = {"openai": openai.VERSION, "python": platform.python_version()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        try:
            for in_flight in options.in_flight:
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
                for _ in range(options.rounds):
                    for name, ask in ways.items():
                        found[name].append(measure(ask, url, in_flight, options.seconds))
                results[str(in_flight)] = {"load": round(os.getloadavg()[0], 1)} | {
                    name: {
                        "share": [
                            round(pick([share for share, _ in runs]), 2)
                            for pick in (statistics.median, min, max)
                        ],
                        "cpu_ms": round(statistics.median(cpu for _, cpu in runs), 2),
                    }
                    for name, runs in found.items()
                }
                print(json.dumps({in_flight: results[str(in_flight)]}), file=sys.stderr)
        finally:
            server.terminate()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    asyncio.run(serve()) if sys.argv[1:] == ["serve"] else main()
