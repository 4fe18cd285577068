"""One adapter is kept busy while another is asked once: which is answered first?"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from serve.loadtest.kernel_clock import note_arrivals, receive
from tests.stock.pair import KEY, QUESTION, Server

_HOLDS, _LENGTH = 900, 60  # tokens of answers
_TRIES = 5
_PATIENCE_S = 120.0


def order_of_answers(server: Server, busy: str, late: str, more: int) -> list[str]:
    """Ask `busy` for a long answer, `late`, then `busy` with so many prompts `more`, all within a moment.

    Gives back "holder", "late", "more" in the order of their answers. Nothing hangs on when this process gets
    a processor: all is sent before the engine begins, and the kernel tells when an answer came. Where the
    server read the second question first, `late` was not late, and all is asked again.
    """
    questions = {"holder": (busy, 1, _HOLDS), "late": (late, 1, 1), "more": (busy, more, _LENGTH)}
    order: list[str] = []
    for _ in range(_TRIES):
        answered = _ask_at_once(server, questions)
        order = sorted(answered, key=answered.__getitem__)
        if order[0] != "late":
            break
    return order


@contextmanager
def apart_from_its_engine(server: Server) -> Iterator[None]:
    """The API server has the last processor, the engine's processes have the others, if there are several.

    On two cores an engine, which spins while it waits, may keep its API server from both for seconds: what
    the server was asked then reaches the engine once that has nothing left to do.
    """
    *engine, own = sorted(os.sched_getaffinity(0))
    before = {thread: os.sched_getaffinity(thread) for thread in _threads_of_group(server.process.pid)}
    of_server = {int(folder.name) for folder in Path(f"/proc/{server.process.pid}/task").iterdir()}
    try:
        for thread in before:
            _move(thread, {own} if thread in of_server else set(engine or [own]))
        yield
    finally:
        for thread, processors in before.items():
            _move(thread, processors)


def _threads_of_group(group: int) -> list[int]:
    processes = [folder for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    threads = []
    for process in processes:
        with suppress(ProcessLookupError):
            if os.getpgid(int(process.name)) == group:
                threads += [int(folder.name) for folder in (process / "task").iterdir()]
    return threads


def _move(thread: int, processors: set[int]) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.sched_setaffinity(thread, processors)


def _ask_at_once(server: Server, questions: dict[str, tuple[str, int, int]]) -> dict[str, float]:
    """Name -> when its answer came; a question is a model, a number of prompts, tokens for each."""
    with ExitStack() as opened:
        sockets = {}
        for name in questions:
            own = socket.create_connection(("127.0.0.1", server.process.port), timeout=_PATIENCE_S)
            note_arrivals(opened.enter_context(own))
            sockets[name] = own
        for name, (model, prompts, length) in questions.items():
            sockets[name].sendall(_request(model, prompts, length))
        return {name: _answered_at(own, questions[name][1]) for name, own in sockets.items()}


def _request(model: str, prompts: int, length: int) -> bytes:
    asked = {"model": model, "prompt": [QUESTION] * prompts, "max_tokens": length, "ignore_eos": True}
    body = json.dumps(asked).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {KEY}"]
    head += ["Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(head).encode() + body


def _answered_at(own: socket.socket, prompts: int) -> float:
    data, at = b"", 0.0
    while True:
        piece, arrived_s = receive(own, 1 << 20)
        if not piece:
            break
        data, at = data + piece, arrived_s
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), data
    assert len(json.loads(body)["choices"]) == prompts
    return at
