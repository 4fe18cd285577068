"""A server that answers, but not on /ready, must not go on."""

from __future__ import annotations

import os
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serve import ready_watch
from serve.ready_watch import ReadyWatch


class Server(BaseHTTPRequestHandler):
    statuses: dict[str, int]

    def do_GET(self) -> None:
        self.send_response(self.statuses.get(self.path, 404))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    running = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(
    ("statuses", "stopped"),
    [
        ({"/health": 200}, True),
        ({"/health": 200, "/ready": 200}, False),
        ({"/health": 200, "/ready": 503}, False),
    ],
)
def test_only_a_server_without_the_endpoint_is_stopped(
    server: HTTPServer, statuses: dict[str, int], stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server.statuses = statuses
    signals: list[int] = []
    monkeypatch.setattr(ready_watch.os, "kill", lambda pid, signum: signals.append(pid))
    args = Namespace(ssl_certfile=None, host="0.0.0.0", port=server.server_port, uds=None)
    watch = ReadyWatch(args)
    watch._watch()
    assert watch.never_ready is stopped
    assert signals == ([os.getpid()] if stopped else [])
