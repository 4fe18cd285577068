"""What is packed comes out again, byte for byte; what a stranger sends writes nothing else."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lora_ext.archive import Unpacker, pack
from vllm_lora_ext.errors import BadInput, StoreFailed
from vllm_lora_ext.inspection import SOURCE_FILES

MakeAdapter = Callable[..., Path]
CONFIG, WEIGHTS = SOURCE_FILES[:2]
ROOM = 1 << 20
END = bytes(1024)


def unpack(pieces: Iterable[bytes], into: Path, max_bytes: int = ROOM) -> dict[str, bytes]:
    """The files that came out."""
    unpacker = Unpacker(into, max_bytes)
    for piece in pieces:
        unpacker.feed(piece)
    unpacker.close()
    return {path.name: path.read_bytes() for path in into.iterdir()}


def cut(data: bytes, sizes: Iterator[int]) -> Iterator[bytes]:
    while data:
        size = next(sizes)
        yield data[:size]
        data = data[size:]


def header(name: str = CONFIG, size: int = 0, form: int = tarfile.USTAR_FORMAT, **fields: object) -> bytes:
    """A member's block, or blocks."""
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(form)


def patched(block: bytes, at: int, data: bytes) -> bytes:
    """Other bytes in a header, with the checksum that fits."""
    block = block[:at] + data + block[at + len(data) :]
    checksum = sum(block) - sum(block[148:156]) + 8 * 32
    return block[:148] + b"%06o\0 " % checksum + block[156:]


def content(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def refusal(data: bytes, into: Path, max_bytes: int = ROOM) -> str:
    """Why it is refused, byte by byte as in one piece; nothing of it is left."""
    told = set()
    for pieces in ([data], cut(data, repeat(1))):
        with pytest.raises(BadInput) as refused:
            unpack(pieces, into, max_bytes)
        assert list(into.iterdir()) == []
        told.add(str(refused.value))
    (only,) = told
    return only


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


FILES = st.dictionaries(st.sampled_from(SOURCE_FILES), st.binary(max_size=3000), min_size=1)


@given(files=FILES, sizes=st.lists(st.integers(1, 1500), min_size=1))
def test_what_is_packed_comes_out_again_in_pieces_of_any_size(
    files: dict[str, bytes], sizes: list[int]
) -> None:
    with TemporaryDirectory() as source, TemporaryDirectory() as target:
        for name, data in files.items():
            (Path(source) / name).write_bytes(data)
        archive = b"".join(pack(Path(source)))
        assert unpack(cut(archive, cycle(sizes)), Path(target)) == files
        with tarfile.open(fileobj=io.BytesIO(archive)) as others:
            assert others.getnames() == [name for name in SOURCE_FILES if name in files]


@given(files=FILES, at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), short=st.booleans())
def test_a_damaged_archive_is_refused_or_holds_only_an_adapters_files(
    files: dict[str, bytes], at: float, byte: int, short: bool
) -> None:
    with TemporaryDirectory() as source, TemporaryDirectory() as target:
        for name, data in files.items():
            (Path(source) / name).write_bytes(data)
        archive = bytearray(b"".join(pack(Path(source))))
        place = int(at * len(archive))
        archive[place] = byte
        data = bytes(archive[:place] if short else archive)
        into = Path(target) / "into"
        into.mkdir()
        try:
            found = unpack([data], into)
        except BadInput:
            found = {}
            assert list(into.iterdir()) == []
        assert not short or not found
        assert set(found) <= set(files) and list(Path(target).iterdir()) == [into]


@given(data=st.binary(max_size=2000))
def test_noise_is_no_archive(data: bytes) -> None:
    with TemporaryDirectory() as target, pytest.raises(BadInput):
        unpack([data, END], Path(target))


def test_other_files_stay_at_home_and_links_are_followed(make_adapter: MakeAdapter, into: Path) -> None:
    folder = make_adapter()
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir()
    shutil.move(folder / WEIGHTS, folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")
    found = unpack(pack(folder), into)
    assert found == {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: (folder / "blob").read_bytes()}
    assert not any(path.is_symlink() for path in into.iterdir())


@pytest.mark.parametrize("options", [["--format=ustar"], ["--format=gnu"], ["--format=v7"], ["--format=pax"]])
def test_the_archives_of_tar_are_taken_where_they_are_plain(
    options: list[str], make_adapter: MakeAdapter, into: Path
) -> None:
    folder = make_adapter()
    command = ["tar", *options, "-C", str(folder), "-cf", "-", CONFIG, WEIGHTS]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode:
        pytest.skip("there is no GNU tar here")
    if options[0] in ("--format=v7", "--format=pax"):
        assert "--format=ustar" in refusal(made.stdout, into)
    else:
        assert unpack([made.stdout], into)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


def test_a_folder_that_holds_no_adapter_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="holds no adapter"):
            list(pack(folder))


@pytest.mark.parametrize("what", ["folder", "pipe", "denied"])
def test_what_cannot_be_read_is_named(what: str, make_adapter: MakeAdapter) -> None:
    path = make_adapter() / "chat_template.jinja"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)  # a circle
    with pytest.raises(BadInput, match=r"chat_template\.jinja"):
        list(pack(path.parent))


def test_an_adapter_that_changes_while_it_is_sent_is_not_taken(make_adapter: MakeAdapter, into: Path) -> None:
    folder, unpacker = make_adapter(), Unpacker(into, ROOM)
    with pytest.raises(BadInput, match="changed while it was read"):
        for number, piece in enumerate(pack(folder)):
            unpacker.feed(piece)
            if number == 0:
                (folder / "identity.json").write_text("{}")
    with pytest.raises(BadInput, match="ends in the middle"):
        unpacker.close()
    assert list(into.iterdir()) == []


NAMES = [
    "/etc/passwd",
    "../x",
    f"../{CONFIG}",
    f"./{CONFIG}",
    f"/{CONFIG}",
    f"a/{CONFIG}",
    f"{CONFIG}/",
    "",
    " ",
]


@pytest.mark.parametrize("name", [*NAMES, f"{CONFIG} ", CONFIG.upper(), "training_args.bin", "version.json"])
def test_only_an_adapters_own_names_are_taken(name: str, into: Path) -> None:
    block = patched(header(), 0, name.encode().ljust(100, b"\0"))
    told = refusal(block + content(b"") + END, into)
    assert repr(name) in told and "none of an adapter's files" in told


@pytest.mark.parametrize(
    ("at", "data"), [(345, b"etc"), (345, b"/"), (500, b"x"), (386, b"0" * 24), (482, b"\1"), (511, b"\1")]
)
def test_a_name_has_no_folders_before_it(at: int, data: bytes, into: Path) -> None:
    assert "none of an adapter's files" in refusal(patched(header(), at, data) + END, into)


def test_what_stands_behind_a_names_end_is_nothing(into: Path) -> None:
    block = patched(header(), len(CONFIG), b"\0/../../x")
    assert unpack([block, END], into) == {CONFIG: b""}


@pytest.mark.parametrize("kind", [bytes([byte]) for byte in range(1, 256) if bytes([byte]) != b"0"])
def test_every_other_kind_of_member_is_refused(kind: bytes, tmp_path: Path) -> None:
    told = refusal(patched(header(linkname="/etc/passwd"), 156, kind) + END, tmp_path)
    assert "not a regular file" in told and CONFIG in told


def test_extension_headers_and_long_names_are_refused(into: Path) -> None:
    pax = header(form=tarfile.PAX_FORMAT, pax_headers={"path": "../x", "size": "9"})
    assert "is an extension header" in refusal(pax + END, into)
    assert "is a long name" in refusal(header("x" * 200, form=tarfile.GNU_FORMAT) + END, into)
    sparse = patched(header(), 156, b"S")
    assert "is a sparse file" in refusal(sparse + END, into)


def test_nothing_comes_twice_so_nothing_is_endless(into: Path) -> None:
    member = header(size=3) + content(b"abc")
    assert "twice" in refusal(member + member + END, into)
    fed = 0
    with pytest.raises(BadInput, match="twice"):
        unpacker = Unpacker(into, ROOM)
        for _ in range(1_000_000):
            fed += 1
            unpacker.feed(member)
    assert fed == 2


def test_the_size_is_judged_before_anything_is_written(into: Path) -> None:
    unpacker = Unpacker(into, 1000)
    unpacker.feed(header(CONFIG, 600) + content(b"x" * 600))
    with pytest.raises(BadInput, match=f"{WEIGHTS}'.*401 bytes.* room for 400"):
        unpacker.feed(header(WEIGHTS, 401))
    assert list(into.iterdir()) == []
    assert refusal(header(size=ROOM + 1), into)
    assert set(
        unpack([header(CONFIG, 600), content(b"x" * 600), header(WEIGHTS, 400), bytes(512), END], into, 1000)
    )


@pytest.mark.parametrize(
    "size",
    [
        *(b"-0000000001\0", b"+0000000001\0", b"0x0000000ff\0", b"0_000000001\0", b"00000000009\0"),
        *(b"\xff" * 12, b"\x81" + bytes(11), bytes(12), b" " * 12, b"0000\x00000001\0", b"\t0000000001\0"),
    ],
)
def test_a_size_that_is_none_is_refused(size: bytes, into: Path) -> None:
    assert "no size that can be read" in refusal(patched(header(), 124, size) + END, into)


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"7" * 12])
def test_a_size_beyond_all_bounds_is_refused(size: bytes, into: Path) -> None:
    assert "room for" in refusal(patched(header(), 124, size) + END, into)


@pytest.mark.parametrize("stated", [0, 1, 599, 601, 1024, 2000, 5000])
def test_a_size_that_lies_is_noticed(stated: int, into: Path) -> None:
    """Too small a one makes a header of content, too large a one content of headers."""
    data = bytes(range(1, 201)) * 3
    archive = header(size=stated) + content(data) + header(WEIGHTS) + END
    if stated in (599, 601, 1024):  # as many blocks; whether the content fits is admission's to judge
        assert len(unpack([archive], into)[CONFIG]) == stated
    else:
        refusal(archive, into)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1023, 1024, 1535, 1536, 2047, 2049])
def test_a_stream_that_ends_early_is_refused(length: int, into: Path) -> None:
    archive = header(size=5) + content(b"hello") + END
    assert len(archive) == 2048
    assert "ends in the middle" in refusal((archive + bytes(512))[:length], into)


def test_an_archive_may_be_filled_up_and_not_for_ever(into: Path) -> None:
    member = header()
    assert "goes on behind its end" in refusal(member + END + member, into)
    assert "goes on behind its end" in refusal(member + bytes(512) + member + END, into)
    unpacker, fed = Unpacker(into, ROOM), 0
    unpacker.feed(member)
    with pytest.raises(BadInput, match="does not end"):
        while True:
            unpacker.feed(bytes(512))
            fed += 1
    assert fed == 2048 and list(into.iterdir()) == []
    assert unpack([member, bytes(512) * 2048], into) == {CONFIG: b""}


def test_an_archive_of_nothing_is_refused(into: Path) -> None:
    assert "holds no file" in refusal(END, into)


def test_after_an_error_nothing_is_taken(into: Path) -> None:
    unpacker = Unpacker(into, ROOM)
    with pytest.raises(BadInput):
        unpacker.feed(b"x" * 512)
    for go_on in (lambda: unpacker.feed(header() + END), unpacker.close):
        with pytest.raises(BadInput, match="is closed"):
            go_on()
    assert list(into.iterdir()) == []


def test_what_breaks_off_is_discarded_and_what_was_there_stays(into: Path) -> None:
    (into / "mine").write_text("mine")
    unpacker = Unpacker(into, ROOM)
    unpacker.feed(header(size=1000) + b"x" * 700)
    unpacker.discard()
    unpacker.discard()
    assert [path.name for path in into.iterdir()] == ["mine"]


def test_a_link_that_lies_in_wait_is_not_written_through(into: Path, tmp_path: Path) -> None:
    (into / CONFIG).symlink_to(tmp_path / "target")
    with pytest.raises(StoreFailed, match=CONFIG):
        unpack([header(size=1) + content(b"x") + END], into)
    assert not (tmp_path / "target").exists() and (into / CONFIG).is_symlink()


def test_a_full_disk_is_named_and_not_its_place(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_: FullDisk())
    with pytest.raises(StoreFailed, match="the disk is full") as failed:
        unpack([header(size=1) + content(b"x") + END], into)
    assert str(into) not in str(failed.value)


def test_files_of_more_than_8_gib_have_a_size(tmp_path: Path, into: Path) -> None:
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.truncate(9 << 30)
    pieces = pack(tmp_path)
    unpacker = Unpacker(into, 16 << 30)
    unpacker.feed(next(pieces))
    unpacker.feed(next(pieces))
    unpacker.discard()
    with pytest.raises(BadInput, match=r"9,663,676,416 bytes"):
        unpack(pack(tmp_path), into, 8 << 30)


def test_no_file_is_held_in_memory(tmp_path: Path, into: Path) -> None:
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        unpacker = Unpacker(into, 1 << 30)
        for piece in pack(tmp_path):
            unpacker.feed(piece)
        unpacker.close()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (into / WEIGHTS).stat().st_size == 64 << 20
