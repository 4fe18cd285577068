"""A container's limit is seen, whichever version its control groups have and wherever it stands."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from vllm_lora_ext import free_memory as module
from vllm_lora_ext.free_memory import free_memory, left_by_limits

GIB = 1 << 30


def process_in(groups: str, root: Path) -> None:
    """What the kernel says of the groups of this process."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)


def group(root: Path, folder: str, **files: object) -> None:
    """A control group's files for memory, by the names that the kernel gives them."""
    for name, value in files.items():
        path = root / "sys" / "fs" / "cgroup" / folder / name.replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def test_version_2_in_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    process_in("0::/\n", tmp_path)
    group(tmp_path, ".", memory_max=8 * GIB, memory_current=3 * GIB)
    assert left_by_limits(tmp_path) == [5 * GIB]


def test_files_that_the_kernel_may_drop_are_free(tmp_path: Path) -> None:
    process_in("0::/\n", tmp_path)
    stat = f"anon {GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}"
    group(tmp_path, ".", memory_max=8 * GIB, memory_current=4 * GIB, memory_stat=stat)
    assert left_by_limits(tmp_path) == [6 * GIB]


def test_version_2_with_limits_above(tmp_path: Path) -> None:
    process_in("0::/kubepods.slice/pod1/server\n", tmp_path)
    group(tmp_path, "kubepods.slice/pod1/server", memory_max="max", memory_current=GIB)
    group(tmp_path, "kubepods.slice/pod1", memory_max=4 * GIB, memory_current=GIB)
    group(tmp_path, "kubepods.slice", memory_max=64 * GIB, memory_current=2 * GIB)
    assert left_by_limits(tmp_path) == [3 * GIB, 62 * GIB]


def test_version_1_with_the_machines_path_in_a_container(tmp_path: Path) -> None:
    process_in("11:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n", tmp_path)
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}"
    files = {"memory_limit_in_bytes": 6 * GIB, "memory_usage_in_bytes": 2 * GIB, "memory_stat": stat}
    group(tmp_path, "memory", **files)
    assert left_by_limits(tmp_path) == [5 * GIB]


def test_a_group_that_has_more_than_its_limit_has_nothing_left(tmp_path: Path) -> None:
    process_in("0::/\n", tmp_path)
    group(tmp_path, ".", memory_max=GIB, memory_current=2 * GIB)
    assert left_by_limits(tmp_path) == [0]


@pytest.mark.parametrize(
    "groups", ["", "0::/\n", "0::/a:b\n", "nonsense\n", "4:memory:/gone\n", "3:cpu:/x\n"]
)
def test_no_limit_that_can_be_seen_is_none(groups: str, tmp_path: Path) -> None:
    process_in(groups, tmp_path)
    assert left_by_limits(tmp_path) == []
    assert left_by_limits(tmp_path / "no such machine") == []


def test_the_smaller_of_machine_and_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "left_by_limits", lambda: [1 << 60, 4096])
    assert free_memory() == 4096
    monkeypatch.setattr(module, "left_by_limits", list)
    assert 0 < free_memory() <= psutil.virtual_memory().total
