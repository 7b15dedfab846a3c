"""How much of a server's rate the judge keeps, ledger and all; and whether its memory stays flat.

    python benchmarks/judging_rate.py [--in-flight 32 128] [--rounds 5] [--calls 2000]
    python benchmarks/judging_rate.py --memory 20000

Prompts with seven answers each (9 KB a question) go through `LlmJudge.rank` over `Recorded` over
`Endpoint` to an asyncio server in a process of its own, which answers each after 200 ms with a
verdict (1.5 KB).  Beside it, in turns, the layers below alone.  Possible are N calls per 200 ms.
`wall` is the share of that over all calls, from the first taken to the last answer; `window` over
the middle half of the answers; both median, least, most of the rounds.  `cpu_ms` is this process's
time per call.  Prints JSON.  Recorded results: judging_rate.md beside this file.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from starling.data.records import Message
from starling.judging.judge import Comparison, Ranking
from starling.judging.llm_judge import LlmJudge
from starling.judging.recorded import Recorded
from starling.models.endpoint import Endpoint
from starling.models.interfaces import Reply, Request, Sampling

ANSWER_SECONDS = 0.2
NUM_ANSWERS = 7
ROUND = 1024
WORDS = ["the", "model", "answers", "what", "was", "asked", "and", "says", "where", "it", "errs"]
WALK = "".join(f"Pair {n}: the first is more helpful, it says why.\n" for n in range(21))
VERDICT = (
    f"Good-natured: yes\n{WALK}Final ranking: [['C'], ['A'], ['G'], ['B'], ['F'], ['D'], ['E']]"
)

Ask = Callable[[str, int, Iterator[Comparison], Path], Iterable[object]]
"""Yields one answer per question, from a server at an address, so many in flight."""


class Server(asyncio.Protocol):
    """The least that a server can do, so that the client is what is measured."""

    choice = {"message": {"role": "assistant", "content": VERDICT}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2300, "completion_tokens": 400}
    body = json.dumps({"choices": [choice], "usage": usage}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    reply = head % len(body) + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.parts: list[bytes] = []
        self.missing: int | None = None

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        if self.missing is None:
            head, end, body = b"".join(self.parts).partition(b"\r\n\r\n")
            if not end:
                return
            self.missing = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            data = body
        self.missing -= len(data)
        if self.missing <= 0:
            self.parts, self.missing = [], None
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self.answer)

    def answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.reply)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def comparisons(number: int) -> Iterator[Comparison]:
    rng = random.Random(0)
    for index in range(number):
        answers = tuple(" ".join(rng.choices(WORDS, k=220)) for _ in range(NUM_ANSWERS))
        yield Comparison(f"prompt {index}", (Message(role="user", content=f"{index}?"),), answers)


def judged(url: str, in_flight: int, asked: Iterator[Comparison], folder: Path) -> Iterator[object]:
    """The whole path."""
    recorded = Recorded(Endpoint(url, "m", concurrency=in_flight), folder / "calls.sqlite")
    with LlmJudge(recorded, seed=0, max_tokens=512, temperature=0.0) as judge:
        yield from judge.rank(asked)


def requests(asked: Iterable[Comparison]) -> Iterator[Request]:
    for each in asked:
        message = Message(role="user", content="\n".join(each.answers))
        yield Request(each.id, (message,), Sampling(512))


def recorded(
    url: str, in_flight: int, asked: Iterator[Comparison], folder: Path
) -> Iterator[object]:
    """Without the judge."""
    endpoint = Endpoint(url, "m", concurrency=in_flight)
    with Recorded(endpoint, folder / "calls.sqlite") as ledger:
        yield from ledger.respond(requests(asked))


def bare(url: str, in_flight: int, asked: Iterator[Comparison], folder: Path) -> Iterator[object]:
    """The endpoint alone."""
    return Endpoint(url, "m", concurrency=in_flight).respond(requests(asked))


WAYS: dict[str, Ask] = {"LlmJudge": judged, "Recorded": recorded, "Endpoint": bare}


def measure(ask: Ask, url: str, in_flight: int, questions: list[Comparison]) -> dict[str, float]:
    """Shares of the possible rate, and CPU milliseconds per call."""
    with tempfile.TemporaryDirectory() as folder:
        begin, cpu = time.perf_counter(), time.process_time()
        stamps = []
        for outcome in ask(url, in_flight, iter(questions), Path(folder)):
            assert isinstance(outcome, (Reply, Ranking)), outcome
            stamps.append(time.perf_counter())
        cpu = time.process_time() - cpu
    assert len(stamps) == len(questions)
    stamps.sort()
    first, last = len(stamps) // 4, 3 * len(stamps) // 4
    rate = (last - first) / (stamps[last] - stamps[first])
    possible = in_flight / ANSWER_SECONDS
    return {
        "wall": len(stamps) / (stamps[-1] - begin) / possible,
        "window": rate / possible,
        "cpu_ms": 1000 * cpu / len(stamps),
    }


def measure_memory(url: str, in_flight: int, number: int) -> dict[str, object]:
    """Resident megabytes after each tenth of so many questions, asked in rounds as a stage does."""
    resident = []
    with tempfile.TemporaryDirectory() as folder:
        endpoint = Endpoint(url, "m", concurrency=in_flight)
        ledger = Recorded(endpoint, Path(folder) / "calls.sqlite")
        with LlmJudge(ledger, seed=0, max_tokens=512, temperature=0.0) as judge:
            source = comparisons(number)
            count = 0
            begin = time.perf_counter()
            while batch := [each for _, each in zip(range(ROUND), source, strict=False)]:
                for outcome in judge.rank(batch):
                    assert isinstance(outcome, Ranking), outcome
                    count += 1
                    if count % (number // 10) == 0:
                        resident.append(resident_mb())
        seconds = time.perf_counter() - begin
    share = number / seconds / (in_flight / ANSWER_SECONDS)
    return {"resident_mb": resident, "wall, in rounds": round(share, 3)}


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def spread(values: list[float]) -> list[float]:
    return [round(pick(values), 3) for pick in (statistics.median, min, max)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--memory", type=int, help="measure memory over so many calls instead")
    options = parser.parse_args()
    command = [sys.executable, __file__, "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        try:
            for in_flight in options.in_flight:
                if options.memory:
                    found = measure_memory(url, in_flight, options.memory)
                else:
                    questions = list(comparisons(options.calls))
                    runs = {name: [] for name in options.ways}
                    for _ in range(options.rounds):
                        for name in options.ways:
                            runs[name].append(measure(WAYS[name], url, in_flight, questions))
                    found = {
                        name: {key: spread([run[key] for run in each]) for key in each[0]}
                        for name, each in runs.items()
                    }
                load = round(os.getloadavg()[0], 1)
                print(json.dumps({"in_flight": in_flight, "load": load, **found}), flush=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    asyncio.run(serve()) if sys.argv[1:] == ["serve"] else main()
