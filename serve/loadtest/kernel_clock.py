"""When bytes arrived by the kernel's clock, which runs while a process waits for a processor.

Linux notes the arrival of every segment (SO_TIMESTAMPNS, socket(7)). Elsewhere a read's own time is told.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterable

KERNEL_NOTES_ARRIVALS = sys.platform == "linux" and struct.calcsize("P") == 8
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python names it in 3.13 only
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
_NS = 1_000_000_000


def note_arrivals(own: socket.socket) -> None:
    """Have the kernel note what arrives for `own`, and for the connections that it accepts."""
    if KERNEL_NOTES_ARRIVALS:
        own.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def receive(own: socket.socket, most_bytes: int) -> tuple[bytes, float]:
    """What has come, and when the last of it arrived, in seconds on `time.monotonic`'s clock.

    Raises what `socket.recv` raises.
    """
    if not KERNEL_NOTES_ARRIVALS:
        return own.recv(most_bytes), time.monotonic()
    data, notes, _, _ = own.recvmsg(most_bytes, _ANCILLARY_BYTES)
    return data, _arrival_s(notes)


def _arrival_s(notes: Iterable[tuple[int, int, bytes]]) -> float:
    """The kernel's note, which is wall-clock time, as monotonic time."""
    for level, kind, data in notes:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, ns = _TIMESPEC.unpack(data[: _TIMESPEC.size])
            age_ns: int = time.time_ns() - (seconds * _NS + ns)
            return time.monotonic() - max(0, age_ns) / _NS
    return time.monotonic()
