"""Files that others may change, cut short or replace by something that is no file; and files that must last.

Reading never maps a file: cut a mapped one short, and the process that looks at it dies of a signal
that Python cannot catch (SIGBUS). It never waits for the other end of a pipe either. What is written
is on the disk before it has its name.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

CHUNK_BYTES = 1 << 20
_FICLONE = 0x40049409
# Not every system has all of these.
_READ = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _READ |= getattr(os, _flag, 0)


class NotRegularFile(ValueError):
    """A folder, a pipe, a socket or a device stands where a file should be."""


class LinkRefused(ValueError):
    """A link stands where only a file of the folder itself may."""


class TooLarge(ValueError):
    """More bytes than such a file may have."""


def read_chunk(file: int, target: memoryview) -> int:
    """Read from where the file descriptor stands into `target`; how many bytes. All reading passes here."""
    if hasattr(os, "readv"):
        return os.readv(file, [target])
    data = os.read(file, len(target))  # Windows
    target[: len(data)] = data
    return len(data)


class ReadFailed(OSError):
    """The disk did not give what it should; not an error of where something is written."""


class RegularFile:
    """An open regular file.

    With `follow_links` off, a symbolic link and a file with further hard links are refused: they may
    lead out of the folder that somebody was allowed to fill.

    Raises:
        OSError: it cannot be opened.
        NotRegularFile, LinkRefused: see there.
    """

    def __init__(self, path: Path, follow_links: bool = True) -> None:
        self.name = path.name
        found = path.stat(follow_symlinks=follow_links)  # opening a device can have effects of its own
        if stat.S_ISLNK(found.st_mode):
            raise LinkRefused(f"{self.name} is a link")
        if not stat.S_ISREG(found.st_mode):
            raise NotRegularFile(f"{self.name} is no regular file")
        flags = _READ if follow_links else _READ | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(path, flags)
        state = os.fstat(self._file)
        try:
            if not stat.S_ISREG(state.st_mode):
                raise NotRegularFile(f"{self.name} is no regular file")
            if not follow_links and state.st_nlink > 1:
                raise LinkRefused(f"{self.name} has {state.st_nlink} hard links")
        except ValueError:
            os.close(self._file)
            raise
        self.size = state.st_size
        self._opened = _signature(state)

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(self, *reason: object) -> None:
        os.close(self._file)

    def fill(self, target: memoryview, offset: int) -> None:
        """Fill `target` from `offset` on.

        Raises:
            ValueError: the file ends before.
            ReadFailed: the disk failed.
        """
        os.lseek(self._file, offset, os.SEEK_SET)
        filled = 0
        while filled < len(target):
            try:
                count = read_chunk(self._file, target[filled : filled + CHUNK_BYTES])
            except OSError as error:
                raise ReadFailed(error.errno, error.strerror) from error
            if not count:
                raise ValueError(f"{self.name} ends after {offset + filled} bytes, more were promised")
            filled += count

    def read(self, size: int, offset: int = 0) -> bytes:
        """`size` bytes from `offset` on; raises as `fill`."""
        data = bytearray(size)
        self.fill(memoryview(data), offset)
        return bytes(data)

    def clone_into(self, target: int) -> bool:
        """Let an empty file share this one's blocks until one of them is written to; False if it cannot.

        Btrfs and XFS can, on one file system (Linux, FICLONE of linux/fs.h).
        """
        try:
            import fcntl

            fcntl.ioctl(target, _FICLONE, self._file)
        except (ImportError, OSError):
            return False
        return True

    def has_changed(self) -> bool:
        """Whether somebody wrote to the file since it was opened."""
        return _signature(os.fstat(self._file)) != self._opened


def read_whole(path: Path, limit: int, follow_links: bool = True) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        OSError, NotRegularFile, LinkRefused: as `RegularFile`.
        TooLarge: it is longer.
        ValueError: it became shorter while it was read.
    """
    with RegularFile(path, follow_links) as file:
        if file.size > limit:
            raise TooLarge(f"{path.name} has {file.size} bytes, at most {limit} are read")
        return file.read(file.size)


def signature(path: Path) -> tuple[int, int, int] | None:
    """Size, time of change (ns) and inode of what a path leads to; None if there is nothing.

    Two equal signatures mean that nothing was written in between, without reading.
    """
    try:
        return _signature(path.stat())
    except (OSError, ValueError):  # also a name that cannot be one
        return None


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet; on the disk when this returns.

    Raises:
        OSError: it exists, or could not be written.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def lock_file(file: int, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file for this process and its copies of the descriptor; False if somebody else has it.

    The lock ends when the last of them is closed, or with the process.
    """
    import fcntl  # not on Windows, where there is no store

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_file(path: Path) -> None:
    """Make what was written to a file last."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder last: renames and new files survive a loss of power."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _signature(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_size, state.st_mtime_ns, state.st_ino
