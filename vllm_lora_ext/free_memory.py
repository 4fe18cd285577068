"""How much memory a process may still take: what the machine has free, or what its container's limit leaves.

The kernel shows a container the machine's memory; its limit stands in files of control groups. A group is
limited by those above it as well, so each of them is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version -> limit, usage, and the line of `memory.stat` with what the kernel gives back when it has to.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int:
    """Bytes that this process can still have."""
    import psutil

    return min([int(psutil.virtual_memory().available), *left_by_limits()])


def left_by_limits(root: Path = Path("/")) -> list[int]:
    """Bytes that each limit over this process leaves; none where nothing is limited.

    `root` holds the folders `proc` and `sys`.

    Files that were read lately count as used, unless the kernel may drop them: reading a model would
    otherwise look like having it.
    """
    left = [_left_in(group, version) for version, group in _groups(root)]
    return [size for size in left if size is not None]


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group that this process is in, for memory, from the lowest up.

    In a container the path of a group may be the machine's, while the container sees its own group at the
    mount point; then only that is there.
    """
    lines = _text(root / "proc" / "self" / "cgroup").splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        mount = root / "sys" / "fs" / "cgroup" / ("memory" if controllers else "")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            yield version, mount.joinpath(*parts[:length])


def _left_in(group: Path, version: int) -> int | None:
    """None: no such group, or without a limit."""
    limit, usage, droppable = _FILES[version]
    stated, used = _text(group / limit).strip(), _text(group / usage).strip()
    if not (stated.isdecimal() and used.isdecimal()):  # also "max"
        return None
    counts = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    return max(0, int(stated) - int(used) + int(counts.get(droppable, 0)))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # no control groups, or none that we may see
        return ""
