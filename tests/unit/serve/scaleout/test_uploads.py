"""Archives on their way to the controller."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from serve.scaleout.uploads import Uploads
from vllm_lora_ext.errors import BadInput, StoreFailed

ONE, OTHER = "1" * 32, "2" * 32
MOST = 100  # bytes of an archive


def test_pieces_become_a_file_and_archives_do_not_mix(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", MOST)
    for number, piece in ((ONE, b"a"), (OTHER, b"x"), (ONE, b"b")):
        uploads.add(number, piece)
    assert uploads.file(ONE).read_bytes() == b"ab"
    uploads.forget(ONE)
    uploads.forget(ONE)
    assert not uploads.file(ONE).exists()
    assert uploads.file(OTHER).read_bytes() == b"x"


def test_what_a_gateway_left_behind_goes_and_what_is_on_its_way_stays(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, MOST)
    uploads.add(ONE, b"a")
    uploads.add(OTHER, b"b")
    long_ago = time.time() - 7200
    os.utime(uploads.file(ONE), (long_ago, long_ago))
    Uploads(tmp_path, MOST)
    assert not uploads.file(ONE).exists()
    assert uploads.file(OTHER).exists()


def test_a_disk_that_takes_nothing_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("no folder")
    uploads = Uploads(tmp_path / "uploads", MOST)
    with pytest.raises(StoreFailed):
        uploads.add(ONE, b"a")


def test_an_archive_beyond_all_measure_does_not_fill_the_disk(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, MOST)
    uploads.add(ONE, b"a" * MOST)
    with pytest.raises(BadInput, match="more than"):
        uploads.add(ONE, b"a")
    assert uploads.file(ONE).stat().st_size == MOST


@pytest.mark.parametrize("number", ["../" + "1" * 29, "1" * 31, "", "A" * 32])
def test_a_number_is_no_path(tmp_path: Path, number: str) -> None:
    with pytest.raises(AssertionError):
        Uploads(tmp_path, MOST).file(number)
