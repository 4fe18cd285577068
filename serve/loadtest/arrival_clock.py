"""When bytes left and when they came, by the kernel's clock and not by when Python got round to them.

A client that parses one stream is late for another, by as long as a request takes to prepare (2 ms
with the official client). Linux notes the arrival of every segment (SO_TIMESTAMPNS, socket(7)), so the
lateness can be kept out of the figures. `make_transport` gives the official client a transport
whose connections read that note; where it cannot be had (another system, TLS, a proxy) times are
taken when Python sees the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from serve.client import uses_proxy

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python names it in 3.13 only
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
_NS = 1_000_000_000


def kernel_clock_reaches(url: str) -> bool:
    """Whether arrivals from `url` can be had from the kernel: Linux, 64 bit, no TLS, no proxy between."""
    parts = urlsplit(url)
    if sys.platform != "linux" or struct.calcsize("P") != 8 or parts.scheme != "http":
        return False
    return not uses_proxy(url) or "http" not in getproxies() or bool(proxy_bypass(parts.hostname or ""))


class ClockedStream(httpcore2.AsyncNetworkStream):
    """A TCP connection that knows when its last write left and when what it read last had arrived.

    `sent_s` and `arrived_s` are seconds on `time.monotonic`'s clock.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self.sent_s = self.arrived_s = time.monotonic()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """httpcore's: what has come, at least one byte; none at the end."""
        while True:
            try:
                data, notes, _, _ = self._socket.recvmsg(max_bytes, _ANCILLARY_BYTES)
            except BlockingIOError:
                await self._until_readable(timeout)
            except OSError as error:
                raise httpcore2.ReadError(str(error)) from error
            else:
                self.arrived_s = _arrival_s(notes)
                return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """httpcore's."""
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
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """httpcore's: it asks an idle connection whether the server has closed it."""
        if info == "is_readable":
            return self._socket.fileno() < 0 or _is_readable(self._socket)
        return self._socket if info == "socket" else None

    async def _until_readable(self, timeout: float | None) -> None:
        readable = self._loop.create_future()
        late = self._loop.call_later(timeout, _fail, readable) if timeout is not None else None
        self._loop.add_reader(self._socket, _settle, readable)
        try:
            await readable
        finally:
            if late is not None:
                late.cancel()
            if self._socket.fileno() >= 0:
                self._loop.remove_reader(self._socket)


class ClockedBackend(httpcore2.AsyncNetworkBackend):
    """Connects `ClockedStream`s over TCP."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> ClockedStream:
        """httpcore's; the addresses of `host` are tried in turn."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                for family, kind, protocol, _, address in found:
                    connection = socket.socket(family, kind, protocol)
                    connection.setblocking(False)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                    try:
                        await loop.sock_connect(connection, address)
                    except BaseException as error:
                        connection.close()
                        if not isinstance(error, OSError) or address == found[-1][4]:
                            raise
                    else:
                        return ClockedStream(connection)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(f"no connection within {timeout} s") from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        raise httpcore2.ConnectError(f"{host} has no address")

    async def sleep(self, seconds: float) -> None:
        """httpcore's."""
        await asyncio.sleep(seconds)


class ClockedTransport(httpx2.AsyncHTTPTransport):
    """httpx2's own transport over a pool of `ClockedStream`s, without a bound on connections."""

    def __init__(self) -> None:
        super().__init__()
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=None, max_keepalive_connections=None, network_backend=ClockedBackend()
        )


def _arrival_s(notes: Iterable[tuple[int, int, bytes]]) -> float:
    """The kernel's note, which is wall-clock time, as monotonic time."""
    for level, kind, data in notes:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, ns = _TIMESPEC.unpack(data[: _TIMESPEC.size])
            age_ns: int = time.time_ns() - (seconds * _NS + ns)
            return time.monotonic() - max(0, age_ns) / _NS
    return time.monotonic()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(httpcore2.ReadTimeout("nothing came"))


def _is_readable(connection: socket.socket) -> bool:
    with contextlib.suppress(ValueError):
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0))
    return True
