"""An adapter's files as one stream: a tar archive that holds them and nothing else.

Archives come from strangers. So only the plainest form of tar is read: regular files, whose names are
those of an adapter's files, each once. A name is compared and never used as a path; whatever tar knows
beyond that (folders, links, devices, sparse files, long names, extension headers) is refused.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vllm_lora_ext.errors import BadInput, StoreFailed
from vllm_lora_ext.files import CHUNK_BYTES, RegularFile
from vllm_lora_ext.inspection import SOURCE_FILES, source_signature
from vllm_lora_ext.names import ascii_shown
from vllm_lora_ext.peft_format import file_finding
from vllm_lora_ext.spec import folder_name, printable

_BLOCK = 512
_MAX_END_BLOCKS = 2048  # tar fills its last record with zeros: 20 blocks, unless told otherwise
_REGULAR = (b"0", b"\0")
_KINDS = {
    **{b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder"},
    **{b"6": "a pipe", b"S": "a sparse file", b"L": "a long name", b"K": "a long name"},
    **{b"x": "an extension header", b"g": "an extension header"},
}
_FIX = (
    "Send it with `vllm-lora publish DIR`, or make it with tar --format=ustar from the adapter's files alone."
)


def pack(folder: Path) -> Iterator[bytes]:
    """The archive of an adapter's folder, piece by piece; links are followed.

    Raises:
        BadInput: there is no adapter, a file cannot be read, or somebody wrote to one meanwhile. The
            archive then has no end, so that nobody takes it.
    """
    name, seen = printable(folder_name(folder)), source_signature(folder)
    if not any(seen):
        fix = "Give the folder that holds adapter_config.json and adapter_model.safetensors."
        raise BadInput(name, "holds no adapter", fix)
    for file in SOURCE_FILES:
        try:
            yield from _packed(folder / file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            finding = file_finding(error, file)
            raise BadInput(finding.item, finding.rule, finding.fix) from error
    if source_signature(folder) != seen:
        raise BadInput(name, "was changed while it was read", "Try again when nobody writes to it.")
    yield bytes(2 * _BLOCK)


def _packed(path: Path) -> Iterator[bytes]:
    with RegularFile(path) as file:
        member = tarfile.TarInfo(path.name)
        member.size = file.size
        yield member.tobuf(tarfile.GNU_FORMAT)  # as ustar, and for more than 8 GiB as well
        for start in range(0, file.size, CHUNK_BYTES):
            yield file.read(min(CHUNK_BYTES, file.size - start), start)
        if padding := -file.size % _BLOCK:
            yield bytes(padding)


class Unpacker:
    """Writes the files of an archive into the folder `into`, of at most `max_bytes` together.

    `feed` it the stream in pieces of any size, then `close` it. After an error nothing that it wrote is
    left; for a stream that breaks off there is `discard`.
    """

    def __init__(self, into: Path, max_bytes: int) -> None:
        self._into, self._room = into, max_bytes
        self._name, self._names = "", list[str]()  # of the member that is being read; of all that were made
        self._header = bytearray()
        self._file: BinaryIO | None = None
        self._left = self._padding = 0  # of the member that is being read
        self._end_blocks = 0
        self._is_over = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream.

        Raises:
            BadInput: it is no archive of an adapter's files.
            StoreFailed: they could not be written.
        """
        self._must_go_on()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._take(rest) :]
        except OSError as error:
            self.discard()
            raise StoreFailed(self._name, error) from error
        except BaseException:
            self.discard()
            raise

    def close(self) -> None:
        """The stream is at its end.

        Raises:
            BadInput: the archive is not, or holds nothing.
        """
        self._must_go_on()
        is_whole = self._end_blocks >= 2 and not self._header
        if not is_whole or not self._names:
            rule = "holds no file" if is_whole else "ends in the middle"
            self.discard()
            raise BadInput("the archive", rule, _FIX)
        self._is_over = True

    def discard(self) -> None:
        """Remove what was written, and take nothing more."""
        self._is_over = True
        with contextlib.suppress(OSError):  # of a full disk, with what was still to be written
            self._end_file()
        for name in self._names:
            with contextlib.suppress(OSError):
                (self._into / name).unlink(missing_ok=True)

    def _must_go_on(self) -> None:
        if self._is_over:
            raise BadInput("the archive", "is closed", "Send it again.")

    def _take(self, data: memoryview) -> int:
        """Use the first of these bytes; how many."""
        if self._file is not None:
            used = self._file.write(data[: self._left])
            self._left -= used
            if not self._left:
                self._end_file()
        elif self._padding:
            used = min(self._padding, len(data))
            self._padding -= used
        else:
            used = min(_BLOCK - len(self._header), len(data))
            self._header += data[:used]
            if len(self._header) == _BLOCK:
                self._read_block(bytes(self._header))
                self._header.clear()
        return used

    def _read_block(self, block: bytes) -> None:
        if not any(block):
            self._end_blocks += 1
            if self._end_blocks > _MAX_END_BLOCKS:
                raise BadInput("the archive", "does not end", _FIX)
            return
        if self._end_blocks:
            raise BadInput("the archive", "goes on behind its end", _FIX)
        name, size = _member(block)
        shown = ascii_shown(name)
        if name in self._names:
            raise BadInput(shown, "is in the archive twice", _FIX)
        if size > self._room:
            rule = f"has {size:,} bytes, and there is room for {self._room:,} more in an archive"
            raise BadInput(shown, rule, "Train a smaller adapter.")
        self._room -= size
        self._left, self._padding = size, -size % _BLOCK
        self._name = name
        self._file = (self._into / name).open("xb")  # never through a link, nor over what is there
        self._names.append(name)
        if not size:
            self._end_file()

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _member(header: bytes) -> tuple[str, int]:
    """Name and size of the member that a block describes.

    Raises:
        BadInput: it describes none, or one that no adapter has.
    """
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if header[257:262] != b"ustar" or _number(header[148:156]) != checksum:
        raise BadInput("the archive", "is no tar archive, or is damaged", _FIX)
    name = header[:100].partition(b"\0")[0].decode("utf-8", "backslashreplace")
    kind, shown = header[156:157], ascii_shown(name)
    if kind not in _REGULAR:
        raise BadInput(shown, f"is {_KINDS.get(kind, 'of an unknown kind')}, not a regular file", _FIX)
    # Behind the other fields there may be the folders that a name lies in, or more of a sparse file.
    if name not in SOURCE_FILES or any(header[345:]):
        raise BadInput(shown, f"is none of an adapter's files ({', '.join(SOURCE_FILES)})", _FIX)
    size = _number(header[124:136])
    if size is None:
        raise BadInput(shown, "has no size that can be read", _FIX)
    return name, size


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or GNU's way for large ones; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = re.fullmatch(rb" *([0-7]+)[ \0]*", field)
    return int(digits[1], 8) if digits else None
