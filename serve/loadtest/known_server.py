"""A server whose delays are known: it speaks the OpenAI protocol and computes nothing.

The load test asks it to learn what its own client adds to a figure, so it must be on time itself:
answers are laid out as bytes before they are due, each piece at an absolute time, by a selector
that waits to the microsecond (epoll, asyncio's default, rounds up to the next millisecond). Delays count
from when a request arrived by the kernel's clock: what a busy machine takes to let this server read it is
the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve.loadtest.kernel_clock import note_arrivals, receive

ContentType = str
_EVENTS = "text/event-stream; charset=utf-8"
_JSON = "application/json"
_ORDER_S = 1e-6  # the loop does not keep the order of what is due at one moment
_STAMP = "?" * 32  # as long as what it is replaced by
_STAMP_BYTES = _STAMP.encode()
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 500: "Server Error"}


@dataclass(frozen=True)
class KnownAnswer:
    """`pieces` leave `first_s` seconds after the request arrived, and every `gap_s` seconds from then on.

    Another `status` than 200 is answered at once with `pieces` as the message. After `cut_after` pieces
    the connection breaks. `logprobs` is what stands in a whole answer's `logprobs.content`. `stamped` puts
    into each piece of a stream when the request arrived and when the piece was written, by
    `time.monotonic`, which all processes of a machine share. Without `finished` a stream ends with neither
    a reason nor usage. `usage` stands in place of the true one.
    """

    pieces: tuple[str, ...]
    first_s: float = 0.0
    gap_s: float = 0.0
    status: int = 200
    cut_after: int | None = None
    logprobs: Sequence[Mapping[str, Any]] | None = None
    stamped: bool = False
    finished: bool = True
    usage: Mapping[str, Any] | None = None


AnswerTo = Callable[[Mapping[str, Any]], KnownAnswer]


class KnownServer:
    """Serves `models` on a loopback port; `answer_to` makes the answer to a request's JSON body.

    `pages` are further answers to GET: path -> (content type, text maker).
    """

    def __init__(
        self,
        models: Sequence[Mapping[str, Any]],
        answer_to: AnswerTo,
        pages: Mapping[str, tuple[ContentType, Callable[[], str]]] | None = None,
    ) -> None:
        listed = json.dumps({"object": "list", "data": [{"object": "model", **model} for model in models]})
        self.answer_to = answer_to
        self.pages: dict[str, tuple[ContentType, Callable[[], str]]] = {
            "/v1/models": (_JSON, lambda: listed),
            **(pages or {}),
        }
        self.port = 0
        self.connections: set[Connection] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> socket.socket:
        """A listening socket; `port` and `url` are known from then on."""
        listening = socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
        listening.setblocking(False)
        note_arrivals(listening)
        self.port = listening.getsockname()[1]
        return listening

    async def accept(self, listening: socket.socket) -> None:
        """Answer on every connection, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(listening)
            own = ClockedSocket(fileno=accepted.detach())
            await loop.connect_accepted_socket(partial(Connection, self, own), own)

    def die(self) -> None:
        """From another thread: stop listening and cut every connection, as a process that dies does."""
        self._loop.call_soon_threadsafe(self._stop.set)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[KnownServer]:
        """The server runs in a thread while the context lasts."""
        loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        started = threading.Event()

        async def run() -> None:
            self._loop, self._stop = loop, asyncio.Event()
            with self.listen() as listening:
                accepting = asyncio.create_task(self.accept(listening))
                started.set()
                await self._stop.wait()
                accepting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await accepting
                for connection in list(self.connections):
                    connection.transport.abort()

        thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            with contextlib.suppress(RuntimeError):  # it has died before
                self.die()
            thread.join()
            loop.close()


def read_stamps(text: str) -> tuple[float, list[float]]:
    """When a request arrived and its pieces were written, from a stamped answer."""
    stamps = [tuple(map(float, piece.split(":"))) for piece in text.split()]
    return stamps[0][0], [written for _, written in stamps]


class ClockedSocket(socket.socket):
    """A connection that knows when what was read last had arrived, on `time.monotonic`'s clock."""

    arrived_s = 0.0

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """socket's; asyncio reads with it."""
        data, self.arrived_s = receive(self, bufsize)
        return data


class Connection(asyncio.Protocol):
    """One client's connection: one request after the other, HTTP/1.1."""

    transport: asyncio.Transport

    def __init__(self, server: KnownServer, own: ClockedSocket) -> None:
        self._server, self._socket = server, own
        self._read = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """asyncio's: answer each request that is whole."""
        self._read += data
        while True:
            head, end, rest = self._read.partition(b"\r\n\r\n")
            length = _content_length(head)
            if not end or len(rest) < length:
                return
            self._read = rest[length:]
            method, path, *_ = head.split(b" ", 2)
            self._answer(method.decode(), path.decode(), rest[:length])

    def _answer(self, method: str, path: str, body: bytes) -> None:
        if method == "GET" and path in self._server.pages:
            kind, make_text = self._server.pages[path]
            self._whole(200, kind, make_text())
        elif method == "POST" and path == "/v1/chat/completions":
            request = json.loads(body)
            answer = self._server.answer_to(request)
            if answer.status != 200:
                error = {"error": {"message": "".join(answer.pieces), "code": answer.status}}
                self._whole(answer.status, _JSON, json.dumps(error))
            elif request.get("stream"):
                self._stream(request, answer)
            else:
                last = answer.first_s + answer.gap_s * (len(answer.pieces) - 1)
                text = json.dumps(_completion(request, answer))
                self._loop.call_at(self._socket.arrived_s + last, self._whole, 200, _JSON, text)
        else:
            self._whole(404, _JSON, json.dumps({"error": {"message": f"no such route: {path}"}}))

    def _write_piece(self, event: bytes, arrived_s: float) -> None:
        if self.transport.is_closing():  # the client has gone
            return
        if _STAMP_BYTES in event:
            event = event.replace(_STAMP_BYTES, f"{arrived_s:015.6f}:{time.monotonic():015.6f} ".encode())
        self.transport.write(event)

    def _whole(self, status: int, kind: ContentType, text: str) -> None:
        body = text.encode()
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {kind}\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def _stream(self, request: Mapping[str, Any], answer: KnownAnswer) -> None:
        arrived_s = self._socket.arrived_s
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {_EVENTS}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        self.transport.write(head)
        pieces = answer.pieces[: answer.cut_after]
        gap_s = max(answer.gap_s, _ORDER_S)
        for number, piece in enumerate(pieces):
            due = arrived_s + answer.first_s + number * gap_s
            self._loop.call_at(
                due, self._write_piece, _piece(request, _STAMP if answer.stamped else piece), arrived_s
            )
        end_s = arrived_s + answer.first_s + max(0, len(pieces) - 1) * gap_s + _ORDER_S
        if answer.cut_after is not None:
            self._loop.call_at(end_s, self.transport.abort)
            return
        end = [{"index": 0, "delta": {}, "finish_reason": "length"}]
        events = b""
        if answer.finished:
            events = _event(request, end) + _event(request, [], usage=_usage(request, answer))
        events += _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self._loop.call_at(end_s, self._write_piece, events, arrived_s)


def _content_length(head: bytes) -> int:
    lower = head.lower()
    mark = b"\r\ncontent-length:"
    start = lower.find(mark)
    return int(lower[start + len(mark) :].split(b"\r\n", 1)[0]) if start >= 0 else 0


def _framed(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _piece(request: Mapping[str, Any], text: str) -> bytes:
    return _event(request, [{"index": 0, "delta": {"content": text}, "finish_reason": None}])


def _event(request: Mapping[str, Any], choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
    chunk = {
        "id": "chatcmpl-known",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": request.get("model"),
        "choices": choices,
        **more,
    }
    return _framed(f"data: {json.dumps(chunk)}\n\n".encode())


def _completion(request: Mapping[str, Any], answer: KnownAnswer) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(answer.pieces)},
        "finish_reason": "length",
    }
    if answer.logprobs is not None and request.get("logprobs"):
        choice["logprobs"] = {"content": answer.logprobs}
    return {
        "id": "chatcmpl-known",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model"),
        "choices": [choice],
        "usage": _usage(request, answer),
    }


def _usage(request: Mapping[str, Any], answer: KnownAnswer) -> dict[str, Any]:
    """A word of the prompt is a token, and so is a piece of the answer."""
    prompt = sum(len(str(message.get("content", "")).split()) for message in request.get("messages", ()))
    if answer.usage is not None:
        return dict(answer.usage)
    output = len(answer.pieces)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def main() -> None:
    """A program: prints its port, gives stamped answers in turn until stdin ends.

    Its argument is a JSON list of answers, each [seconds to the first piece, between pieces, pieces].
    """
    answers = itertools.cycle(
        KnownAnswer(("",) * pieces, first_s, gap_s, stamped=True)
        for first_s, gap_s, pieces in json.loads(sys.argv[1])
    )
    server = KnownServer([{"id": "known"}], lambda request: next(answers))
    gc.freeze()
    with server.in_thread():
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
