"""An OpenAI-compatible server that answers as a script says: the faults are real HTTP."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass
class Say:
    """One answer: a status, a body, and what goes wrong on the way."""

    body: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut: bool = False


def error(status, message, *, code=None, param=None, headers=None):
    body = {"error": {"message": message, "type": "t", "code": code, "param": param}}
    return Say(json.dumps(body), status, headers or {})


class FakeServer:
    """`script(body, n)` answers the n-th call (from 0) about the same last message."""

    def __init__(self, script: Callable[[dict, int], Say]) -> None:
        self.script = script
        self.calls: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.num_open = 0
        self.most_open = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._answer(self)

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
            asked = body["messages"][-1]["content"]
            n = sum(call["messages"][-1]["content"] == asked for call in self.calls)
            self.calls.append(body | {"path": handler.path})
            self.headers.append({key.lower(): value for key, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        say = self.script(body, n)
        time.sleep(say.delay_seconds)
        with self._lock:
            self.num_open -= 1
        content = say.body.encode()
        try:
            handler.send_response(say.status)
            handler.send_header("Content-Type", "application/json")
            for name, value in say.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content) + (10 if say.cut else 0)))
            handler.end_headers()
            handler.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            return
        if say.cut:
            handler.close_connection = True
