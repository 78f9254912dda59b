# SPDX-License-Identifier: Apache-2.0
"""An orchestrator's REST API of canned answers, over real HTTP, for clients under test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked; `headers` by lower-case name."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(slots=True)
class FakeApi:
    """Answers by (method, path); a path that ends a stream breaks the connection.

    Attributes:
        answers: (status, JSON); None = no content. Missing ones are 404 problems.
        streams: by path, one list of chunks per connection, then the connection ends.
        requests: everything that was asked, in order.
    """

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    streams: dict[str, list[list[str]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def problem(
        self, method: str, path: str, status: int, reason: str, detail: str, **more: Any
    ) -> None:
        """Answer with a problem as the orchestrator does."""
        self.answers[method, path] = (
            status,
            {
                "type": f"https://godwit.io/errors/{reason.lower().replace('_', '-')}",
                "title": reason,
                "status": status,
                "detail": detail,
                "reason": reason,
                **more,
            },
        )


def event(migration: dict[str, Any]) -> str:
    """A server-sent event of a migration."""
    return f"id: {migration['version']}\nevent: migration\ndata: {json.dumps(migration)}\n\n"


@contextmanager
def serving_api() -> Iterator[FakeApi]:
    """A fake at a free port of loopback."""
    api = FakeApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_DELETE(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            headers = {key.lower(): value for key, value in self.headers.items()}
            api.requests.append(Request(self.command, self.path, headers, body))
            if api.streams.get(self.path):
                self._stream(api.streams[self.path].pop(0))
                return
            missing = (404, {"type": "https://godwit.io/errors/no-answer", "detail": self.path})
            status, answer = api.answers.get((self.command, self.path), missing)
            payload = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            if payload:
                kind = "application/problem+json" if status >= 400 else "application/json"
                self.send_header("Content-Type", kind)
            if status != 204:
                self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def _stream(self, chunks: list[str]) -> None:
            """Chunked, and never finished: the connection breaks off."""
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in chunks:
                data = chunk.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()
