"""An HTTP server in the place of `vllm serve FOLDER --runner pooling`, as tests script it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def classified(scores):
    """A reply of vLLM 0.32's /classify."""
    data = [
        {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}
        for index, score in enumerate(scores)
    ]
    usage = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
    return {"id": "classify-1", "object": "list", "created": 0, "model": "m", "data": data} | {
        "usage": usage
    }


def pooled(data):
    """A reply of its /pooling: of each conversation a list of one, or of one for each token."""
    items = [{"index": index, "object": "pooling", "data": each} for index, each in enumerate(data)]
    usage = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
    return {"id": "pooling-1", "object": "list", "created": 0, "model": "m", "data": items} | {
        "usage": usage
    }


class Server:
    """`answer(body, n)` gives the n-th reply to a POST: a JSON value, or status, text, headers.

    A POST to anywhere but `route` is not found, and no body of it is kept; None: all are routes.
    """

    def __init__(self, answer, models=("m",), route="/classify", port=0):
        self.answer = answer
        self.bodies, self.paths, self.keys = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                listed = {"object": "list", "data": [{"id": name} for name in models]}
                self.reply(200, json.dumps(listed), {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.paths.append(self.path)
                if route not in (None, self.path):
                    self.reply(404, '{"detail": "Not Found"}', {})
                    return
                outer.bodies.append(body)
                outer.keys.append(self.headers["Authorization"])
                found = outer.answer(body, len(outer.bodies) - 1)
                if not isinstance(found, tuple):
                    found = 200, json.dumps(found), {}
                self.reply(*found)

            def reply(self, status, text, headers):
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
