"""A `vllm-lora serve` process: started, waited for, and stopped with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import vllm_lora_ext
from vllm_lora_ext.errors import ServerFailed

SERVE = (sys.executable, "-P", str(Path(vllm_lora_ext.__file__).with_name("command.py")), "serve")
_TAIL_LINES = 30


def free_port() -> int:
    """A TCP port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """Use it as a context manager: ready on entry, gone on exit, whatever happens in between.

    The server runs in a process group of its own, so a Ctrl+C in the terminal
    reaches only its owner, and the whole group can be ended at once.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        ready_timeout_s: float = 300.0,
        cwd: Path | None = None,
        command: Sequence[str] = SERVE,
        ready_path: str = "/ready",
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [*command, *arguments, "--port", str(self.port)]
        self._env = {**os.environ, **(env or {})}
        self._ready_timeout_s = ready_timeout_s
        self._cwd = cwd
        self._ready_path = ready_path
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self.forced = False

    def __enter__(self) -> ServerProcess:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server, which is its process group's as well."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def is_gone(self) -> bool:
        """Whether no process of the server's group is left; one that only waits to be collected is gone."""
        import psutil

        for process in psutil.process_iter(["status"]):
            try:
                if os.getpgid(process.pid) == self.pid and process.info["status"] != "zombie":
                    return False
            except (ProcessLookupError, PermissionError):
                continue
        return True

    def stop(self, signum: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Ask the server to stop, wait for its whole group, end by force what is left; its exit code.

        A server that is not ready yet has nothing to finish, and vLLM 0.32 does
        not end on SIGTERM while its engine starts: its group is interrupted.
        `forced` then tells whether force was needed.
        """
        assert self._process is not None, "the server was not started"
        try:
            if self._ready and self._process.poll() is None:
                self._process.send_signal(signum)
            elif not self._ready:
                self._signal_group(signal.SIGINT)
            deadline = time.monotonic() + timeout_s
            while not self.is_gone() and time.monotonic() < deadline:
                self._process.poll()  # collect it
                time.sleep(0.1)
        finally:  # also when the wait was interrupted by a second Ctrl+C
            if not self.is_gone():
                self.forced = True
                self._signal_group(signal.SIGKILL)
            code = self._process.wait()
        return code

    def _signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(
                    "the server",
                    f"ended with exit code {self._process.returncode} before it was ready",
                    f"Its last lines ({self.log}):\n{self.last_lines()}",
                )
            try:
                with without_proxy.open(f"{self.url}{self._ready_path}", timeout=5) as answer:
                    if answer.status == 200:
                        self._ready = True
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.2)
        raise ServerFailed(
            "the server",
            f"was not ready after {self._ready_timeout_s:.0f} s",
            f"Its last lines ({self.log}):\n{self.last_lines()}",
        )

    def last_lines(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])
