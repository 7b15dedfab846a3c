"""An OpenAI-compatible server that answers as a script says: the faults are real HTTP."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, *, finish_reason="stop", prompt_tokens=7, response_tokens=3):
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": response_tokens,
                "total_tokens": prompt_tokens + response_tokens,
            },
        }
    )


def event(chunk):
    return f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n"


def stream(*texts, finish_reason="stop", usage=(7, 3), raw=False, ids=None):
    """The events of a chat completion, or with `raw` of a completion, one for each text."""
    chunks = []
    for number, text in enumerate(texts):
        choice = {"index": 0, "text": text} if raw else {"index": 0, "delta": {"content": text}}
        chunks.append(choice | ({} if ids is None else {"token_ids": ids[number]}))
    if finish_reason is not None:
        last = {"text": ""} if raw else {"delta": {}}
        chunks.append({"index": 0, "finish_reason": finish_reason, **last})
    events = [event({"id": "x", "choices": [chunk], "usage": None}) for chunk in chunks]
    if usage is not None:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        events.append(event({"id": "x", "choices": [], "usage": counts}))
    return [*events, event("[DONE]")]


def raw_completion(text, **choice):
    choice = {"index": 0, "text": text, "finish_reason": "stop"} | choice
    return json.dumps({"id": "x", "object": "text_completion", "choices": [choice]})


@dataclass
class Say:
    """One answer: a status, a body or the pieces of a stream, and what goes wrong on the way."""

    body: str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut: bool = False
    reset: bool = False
    pieces: Iterable[str] | None = None


def error(status, message, *, code=None, param=None, headers=None):
    body = {"error": {"message": message, "type": "t", "code": code, "param": param}}
    return Say(json.dumps(body), status, headers or {})


class FakeServer:
    """`script(body, n)` answers the n-th call (from 0) about the same last message.

    `listing(headers)` answers who asks for the models.
    """

    def __init__(
        self,
        script: Callable[[dict, int], Say] = lambda body, n: Say(),
        listing: Callable[[dict], Say] = lambda headers: Say(status=404),
    ) -> None:
        self.script = script
        self.calls: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.num_open = 0
        self.most_open = 0
        self.saw_close = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._answer(self)

            def do_GET(self):
                headers = {key.lower(): value for key, value in self.headers.items()}
                outer.headers.append(headers)
                outer._write(self, listing(headers))

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            n = sum(asked(call) == asked(body) for call in self.calls)
            self.calls.append(body | {"path": handler.path})
            self.headers.append({key.lower(): value for key, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        say = self.script(body, n)
        time.sleep(say.delay_seconds)
        with self._lock:
            self.num_open -= 1
        if say.reset:
            # The system then sends RST in place of FIN.
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.close_connection = True
        elif say.pieces is not None:
            self._stream(handler, say)
        else:
            self._write(handler, say)

    def _write(self, handler, say):
        content = say.body if isinstance(say.body, bytes) else say.body.encode()
        try:
            handler.send_response(say.status)
            for name, value in ({"Content-Type": "application/json"} | say.headers).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content) + (10 if say.cut else 0)))
            handler.end_headers()
            handler.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            return
        if say.cut:
            handler.close_connection = True

    def _stream(self, handler, say):
        handler.send_response(say.status)
        kind = say.headers.get("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Content-Type", kind)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for piece in say.pieces:
                content = piece.encode()
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            if not say.cut:
                handler.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.saw_close.set()
        handler.close_connection = say.cut or self.saw_close.is_set()


def asked(body):
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def untimed(outcome):
    """An outcome without what no test can foresee."""
    return replace(outcome, seconds=None) if hasattr(outcome, "seconds") else outcome
