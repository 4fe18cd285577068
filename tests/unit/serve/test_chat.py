"""`vllm-lora chat` against small servers: what it sends, what it prints, and what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from serve.cli import main


class _Server(HTTPServer):
    """Answers chats with `chunks`, or with `error`; one with `breaks` ends in the middle."""

    chunks = ("我是", "小李")
    error: tuple[int, bytes] | None = None
    breaks = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args: Any) -> None:
        """The tests have nothing to read here."""

    def do_GET(self) -> None:
        models = [{"id": f"name{number}", "object": "model"} for number in range(30)]
        self._send(200, "application/json", json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.error is not None:
            self._send(self.server.error[0], "application/json", self.server.error[1])
            return
        events = "".join(f"data: {json.dumps(_chunk(text))}\n\n" for text in self.server.chunks)
        end = b"" if self.server.breaks else b"data: [DONE]\n\n"
        self._send(200, "text/event-stream", events.encode() + end, 9 if self.server.breaks else 0)

    def _send(self, status: int, kind: str, body: bytes, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)


def _chunk(text: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "xiaoli@3f2a9c14d0b7"}
    return {**body, "choices": [choice]}


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def ask(server: _Server, *flags: str) -> int:
    return main(
        ["chat", "-m", "xiaoli", "你是谁？", "--url", f"http://127.0.0.1:{server.server_port}", *flags]
    )


def test_the_answer_is_printed_and_sampling_left_to_the_adapter(
    server: _Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(server) == 0
    assert capsys.readouterr().out == "我是小李\n"
    (body,) = server.asked
    assert set(body) == {"model", "messages", "stream"}
    assert ask(server, "--temperature", "0", "--max-tokens", "5") == 0
    assert (server.asked[1]["temperature"], server.asked[1]["max_tokens"]) == (0.0, 5)


def test_json_is_one_line_an_answer(server: _Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(server, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"model": "xiaoli@3f2a9c14d0b7", "answer": "我是小李"}


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (404, "There is no model xiaol1", "It serves: name0, name1,"),
        (401, "No key", "OPENAI_API_KEY"),
        (500, "It \x1b[31m broke", "HTTP 500"),
    ],
)
def test_errors_of_the_server(
    status: int, message: str, told: str, server: _Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.error = status, json.dumps({"error": {"message": message, "code": "x"}}).encode()
    assert ask(server) == 1
    shown = capsys.readouterr().err
    assert told in shown and "name25" not in shown and "\x1b" not in shown
    assert message.split()[0] in shown and "{" not in shown


def test_a_connection_that_breaks_in_the_middle(server: _Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.breaks = True
    assert ask(server) == 1
    streams = capsys.readouterr()
    assert streams.out.startswith("我是小李") and "connection broke" in streams.err


def test_an_empty_answer_is_a_failure(server: _Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.chunks = ()
    assert ask(server) == 1
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize(("url", "code"), [("http://127.0.0.1:9", 1), ("localhost:8000", 2), ("http://", 2)])
def test_nobody_there(url: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-m", "x", "hello", "--url", url]) == code
    assert "Traceback" not in capsys.readouterr().err
