"""An OpenAI-compatible endpoint on this machine, for tests: real sockets, and every way in which one may misbehave.

    with ChatEndpoint(answer) as server:
        client = ChatClient(endpoint_of(server.url, "a-model", {}), ...)

`answer(prompt)` gives the text of an answer. Tokens are counted by the tokenizer of the package's model, plus what a
chat template adds to a message. `server.asked` has the body of each request that was answered. What goes wrong:

    server.troubles.append(Trouble(status=503, times=2))        see `Trouble`
    server.refuses = "response_format"                          400 for a request that has such a field
    server.per_second = 5                                       429 with Retry-After above that rate
    server.key = "secret"                                       401 without it
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import olmoscope.model

OVERHEAD = 8
"""Tokens that a chat template adds to a user's message, as those of ChatML do."""


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(Path(olmoscope.model.__path__[0]) / "tiny" / "tokenizer.json"))


def count(text: str) -> int:
    """Tokens of a text."""
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


@dataclass
class Trouble:
    """What goes wrong with the next requests.

    Attributes:
        status: to answer with.
        body: of that answer; or of an answer with status 200.
        headers: of that answer.
        seconds: to wait before answering.
        cut: bytes of an answer after which the connection ends.
        changes: fields of the completion that are other than they should be.
        times: for how many requests.
        contains: only those whose prompt contains this.
    """

    status: int | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cut: int | None = None
    changes: dict[str, Any] | None = None
    times: int = 1_000_000
    contains: str = ""


class ChatEndpoint:
    """The server; a context manager. `url` is its address, as a user gives it."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.troubles: list[Trouble] = []
        self.refuses: tuple[str, ...] = ()
        self.per_second: float | None = None
        self.key: str | None = None
        self.seconds = 0.0
        self.asked: list[dict[str, Any]] = []
        self.requests = 0
        self.most_at_once = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.lock = threading.Lock()
        self._at_once = 0
        self._last = 0.0
        endpoint = self

        class Handler(_Handler):
            server_side = endpoint

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[str]:
        """The prompts that were answered."""
        return [body["messages"][0]["content"] for body in self.asked]

    def enter(self) -> None:
        with self.lock:
            self.requests += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def leave(self) -> None:
        with self.lock:
            self._at_once -= 1

    def trouble_of(self, prompt: str) -> Trouble | None:
        with self.lock:
            for trouble in self.troubles:
                if trouble.times > 0 and trouble.contains in prompt:
                    trouble.times -= 1
                    return trouble
        return None

    def too_fast(self) -> bool:
        with self.lock:
            now = time.monotonic()
            if self.per_second is None or now - self._last >= 1 / self.per_second:
                self._last = now
                return False
            return True

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][0]["content"]
        text = self.answer(prompt)
        usage = {"prompt_tokens": count(prompt) + OVERHEAD, "completion_tokens": count(text)}
        with self.lock:
            self.asked.append(body)
            self.prompt_tokens += usage["prompt_tokens"]
            self.completion_tokens += usage["completion_tokens"]
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None,
                             "message": {"role": "assistant", "content": text, "refusal": None}}],
                "usage": usage | {"total_tokens": sum(usage.values())}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing, where a client was killed; else what Python prints."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_side: ChatEndpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `asked` is the log."""

    def do_POST(self) -> None:
        self.server_side.enter()
        try:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True
        finally:
            self.server_side.leave()

    def _answer(self, body: dict[str, Any]) -> None:
        side = self.server_side
        if self.path != "/v1/chat/completions":
            return self._error(404, "no such path")
        if side.key is not None and self.headers.get("Authorization") != f"Bearer {side.key}":
            return self._error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
        for name in side.refuses:
            if name in body or name == body.get("response_format", {}).get("type"):
                return self._error(400, f"Unsupported parameter: {name}. "
                                        + ("Use max_completion_tokens." if name == "max_tokens" else ""))
        if side.too_fast():
            return self._error(429, "too many requests", {"Retry-After": str(1 / (side.per_second or 1))})
        trouble = side.trouble_of(body["messages"][0]["content"]) or Trouble()
        time.sleep(side.seconds + trouble.seconds)
        if trouble.status is not None:
            return self._send(trouble.status, trouble.body or b"{}", trouble.headers)
        if trouble.body is not None:
            return self._send(200, trouble.body, trouble.headers)
        completion = side.completion(body)
        for name, value in (trouble.changes or {}).items():
            if name in ("content", "refusal"):
                completion["choices"][0]["message"][name] = value
            elif name == "finish_reason":
                completion["choices"][0][name] = value
            else:
                completion[name] = value
        self._send(200, json.dumps(completion).encode(), trouble.headers, trouble.cut)

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message, "code": None}}).encode(), headers or {})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
