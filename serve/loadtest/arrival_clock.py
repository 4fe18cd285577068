"""When bytes left and when they came, by the kernel's clock and not by when Python got round to them.

A client that parses one stream is late for another, by as long as a request takes to prepare (2 ms
with the official client). The kernel notes arrivals (`kernel_clock`), and a thread of its own takes what
has come off the sockets, so that two chunks are two reads however long the event loop is busy.
`ClockedTransport` gives the official client such connections. Where they cannot be had (another system,
TLS, a proxy) times are taken when Python sees the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from serve.client import uses_proxy
from serve.loadtest.kernel_clock import KERNEL_NOTES_ARRIVALS, note_arrivals, receive

_READ_BYTES = 64 * 1024  # what httpcore asks for at most
# A thread of Python's hands over the interpreter once another asked for it that long; the default, 5 ms, is
# longer than the time between two tokens may be.
_SWITCH_S = 0.00005


def kernel_clock_reaches(url: str) -> bool:
    """Whether arrivals from `url` can be had from the kernel: Linux, 64 bit, no TLS, no proxy between."""
    parts = urlsplit(url)
    if not KERNEL_NOTES_ARRIVALS or parts.scheme != "http":
        return False
    proxied = bool({"http", "all"} & set(getproxies())) and not proxy_bypass(parts.hostname or "")
    return not (uses_proxy(url) and proxied)


class ClockedStream(httpcore2.AsyncNetworkStream):
    """A TCP connection that knows when its last write left and when what it read last had arrived.

    `sent_s` and `arrived_s` are seconds on `time.monotonic`'s clock.
    """

    def __init__(self, connected: socket.socket, reader: ArrivalReader) -> None:
        self._socket, self._reader = connected, reader
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[float, bytes | OSError]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.sent_s = self.arrived_s = time.monotonic()
        reader.watch(connected.fileno(), self)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """httpcore's: what came at one moment; nothing at the end."""
        try:
            async with asyncio.timeout(timeout):
                while not self._arrived:  # one may be woken for what was read before
                    self._waiter = self._loop.create_future()
                    if not self._arrived:  # else it came just now
                        await self._waiter
        except TimeoutError as error:
            raise httpcore2.ReadTimeout(f"nothing came for {timeout} s") from error
        arrived_s, data = self._arrived[0]
        if isinstance(data, OSError):
            raise httpcore2.ReadError(str(data)) from data
        if data:  # the end stays
            self._arrived.popleft()
        if len(data) > max_bytes:
            self._arrived.appendleft((arrived_s, data[max_bytes:]))
        self.arrived_s = arrived_s
        return data[:max_bytes]

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """httpcore's; it writes nothing at the end of a request, which is no sending."""
        if not buffer:
            return
        self.sent_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await self._loop.sock_sendall(self._socket, buffer)
        except TimeoutError as error:
            raise httpcore2.WriteTimeout(f"nothing was taken for {timeout} s") from error
        except OSError as error:
            raise httpcore2.WriteError(str(error)) from error

    async def aclose(self) -> None:
        """httpcore's."""
        if self._socket.fileno() >= 0:
            self._reader.forget(self._socket.fileno())
            self._socket.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """httpcore's, for a server that sends its clients on to TLS, where the kernel's notes end."""
        raise httpcore2.ConnectError("the server redirects to https: give that --url")

    def get_extra_info(self, info: str) -> Any:
        """httpcore's: it asks an idle connection whether the server has closed it."""
        if info == "is_readable":
            return self._socket.fileno() < 0 or bool(self._arrived)
        return self._socket if info == "socket" else None

    def take_arrived(self) -> bool:
        """In the reader's thread, when something has come: take it; False when no more will come."""
        try:
            data, arrived_s = receive(self._socket, _READ_BYTES)
        except BlockingIOError:
            return True
        except OSError as error:
            self._arrived.append((time.monotonic(), error))
            return False
        self._arrived.append((arrived_s, data))
        return bool(data)

    def wake(self) -> None:
        """In the event loop: let the one who waits read."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ArrivalReader:
    """The thread that takes what comes off all sockets of one transport."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, ClockedStream] = {}
        self._poll = select.epoll()
        self._stopped, self._stop = os.pipe()
        self._poll.register(self._stopped, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="arrivals", daemon=True)
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._thread.start()

    def watch(self, file: int, stream: ClockedStream) -> None:
        """Read for `stream` from now on."""
        self._streams[file] = stream
        self._poll.register(file, select.EPOLLIN)

    def forget(self, file: int) -> None:
        """Leave a socket alone, before it is closed; one whose end has come is forgotten already."""
        self._streams.pop(file, None)
        with contextlib.suppress(OSError):
            self._poll.unregister(file)

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            os.write(self._stop, b"x")
            self._thread.join()
            sys.setswitchinterval(self._switch_s)
            self._poll.close()
            os.close(self._stop)
            os.close(self._stopped)

    def _run(self) -> None:
        while True:
            woken: list[ClockedStream] = []
            for file, _ in self._poll.poll():
                if file == self._stopped:
                    return
                if (stream := self._streams.get(file)) is not None:
                    woken.append(stream)
                    if not stream.take_arrived() and self._streams.get(file) is stream:
                        self.forget(file)
            # once for all of them: each call of the system costs a wait for the interpreter
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(_wake_all, woken)


class ClockedBackend(httpcore2.AsyncNetworkBackend):
    """Connects `ClockedStream`s over TCP."""

    def __init__(self, reader: ArrivalReader) -> None:
        self._reader = reader

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> ClockedStream:
        """httpcore's; the addresses of `host` are tried in turn, each for its share of the time."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        failure: httpcore2.ConnectError | httpcore2.ConnectTimeout
        failure = httpcore2.ConnectError(f"{host} has no address")
        for family, kind, protocol, _, address in found:
            try:
                async with asyncio.timeout(None if timeout is None else timeout / len(found)):
                    return ClockedStream(await _connected(family, kind, protocol, address), self._reader)
            except TimeoutError:
                failure = httpcore2.ConnectTimeout(f"no connection to {address[0]} in time")
            except OSError as error:
                failure = httpcore2.ConnectError(str(error))
        raise failure

    async def sleep(self, seconds: float) -> None:
        """httpcore's."""
        await asyncio.sleep(seconds)


class ClockedTransport(httpx2.AsyncHTTPTransport):
    """httpx2's own transport over a pool of `ClockedStream`s, without a bound on connections."""

    def __init__(self) -> None:
        super().__init__()
        self._reader = ArrivalReader()
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=None, max_keepalive_connections=None, network_backend=ClockedBackend(self._reader)
        )

    async def aclose(self) -> None:
        """httpx2's."""
        await super().aclose()
        self._reader.close()


async def _connected(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        note_arrivals(connection)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def _wake_all(streams: Iterable[ClockedStream]) -> None:
    for stream in streams:
        stream.wake()
