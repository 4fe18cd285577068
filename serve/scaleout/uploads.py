"""Archives of adapters on their way from a gateway to the controller, piece by piece, one file each."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from vllm_lora_ext.errors import BadInput, StoreFailed

_UPLOAD_S = 3600.0  # no upload takes as long
_NUMBER = re.compile(r"[0-9a-f]{32}")


class Uploads:
    """Kept in `folder`; `number` is a gateway's own for one archive, 32 hexadecimal digits."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._clear()

    def add(self, number: str, piece: bytes) -> None:
        """Take the next piece.

        Raises:
            BadInput: the archive would have more than `most_bytes`.
            StoreFailed: it could not be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self.file(number).open("ab") as file:
                if file.tell() + len(piece) > self._most_bytes:
                    rule = f"has more than {self._most_bytes / (1 << 30):.1f} GiB"
                    raise BadInput("the archive", rule, "Train a smaller adapter.")
                file.write(piece)
        except OSError as error:
            raise StoreFailed("the archive", error) from error

    def file(self, number: str) -> Path:
        """Where an archive lies, if any piece of it came."""
        assert _NUMBER.fullmatch(number), "it would be a path"
        return self._folder / f"{number}.tar"

    def forget(self, number: str) -> None:
        """Nobody needs it any more."""
        self.file(number).unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove what gateways that have ended left behind; what is on its way stays."""
        for file in self._folder.iterdir() if self._folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _UPLOAD_S:
                    file.unlink()
