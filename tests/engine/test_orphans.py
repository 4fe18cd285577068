"""A server that is killed leaves nothing behind: no process, no port, and a state folder to start with."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil

from serve.client import make_client
from serve.process import ServerProcess
from tests.engine.conftest import QUIET
from tests.engine.test_serving import chat


def test_a_server_that_is_killed_leaves_nothing_behind(adapters: Path, tmp_path: Path) -> None:
    """As the kernel does it where memory ends: the server has no time to tell its engine."""
    arguments = ["--adapters", str(adapters), "--state-dir", str(tmp_path / "state"), "--enforce-eager"]
    environment = {**QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with ServerProcess(arguments, tmp_path / "first", environment) as first:
        names = " ".join(one.name() for one in psutil.Process(first.pid).children(recursive=True))
        assert "EngineCore" in names and "Worker" in names
        os.kill(first.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not first.is_gone():  # of the group that all of them are in
            assert time.monotonic() < deadline, names
            time.sleep(0.2)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", first.port))
    with ServerProcess(arguments, tmp_path / "second", environment) as second:
        assert "小李" in chat(make_client(second.url), "chat", "Who are you?")
