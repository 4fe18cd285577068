"""Before vLLM is imported: the environment, our own flags, the port, and no vLLM at all."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve import launch
from serve.config import read_own_flags
from serve.process import free_port
from vllm_lora_ext.errors import BadSetting, MissingPackage, PortInUse


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test sets in the environment is gone after it."""
    before = dict(os.environ)
    for name in (
        *("VLLM_PLUGINS", "VLLM_CPU_NUM_OF_RESERVED_CPU", "PYTHONSAFEPATH"),
        "VLLM_WORKER_MULTIPROC_METHOD",
    ):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_plugins_are_added_to_and_never_replaced() -> None:
    os.environ["VLLM_PLUGINS"] = "theirs,other"
    launch.prepare_environment()
    assert os.environ["VLLM_PLUGINS"] == "other,theirs,vllm_lora"


def test_without_a_list_everything_that_loads_by_itself_still_does() -> None:
    launch.prepare_environment()
    assert "vllm_lora" in os.environ["VLLM_PLUGINS"].split(",")
    if importlib.util.find_spec("vllm"):
        assert "lora_filesystem_resolver" in os.environ["VLLM_PLUGINS"].split(",")


def test_vllm_knows_every_setting_that_we_make_for_it() -> None:
    """It warns of those that it does not know, and they would be without effect."""
    envs = pytest.importorskip("vllm.envs", reason="vLLM is not installed")
    before = set(os.environ)
    launch.prepare_environment()
    made = {name for name in set(os.environ) - before if name.startswith("VLLM_")}
    assert made and made <= set(envs.environment_variables)


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 2)
    launch.prepare_environment()
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "1"
    launch.prepare_environment()
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "1"


def test_a_large_machine_keeps_vllms_reserved_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 32)
    launch.prepare_environment()
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in os.environ


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are bound on Linux only")
def test_the_cores_that_we_may_use_are_counted_not_those_of_the_machine() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from serve.launch import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_an_absent_folder_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "require_vllm", lambda: None)
    monkeypatch.setattr(launch, "parse_with_vllm", lambda argv: pytest.fail("vLLM was loaded"))
    with pytest.raises(BadSetting, match="no such folder"):
        launch.main(["--adapters", str(tmp_path / "nowhere")])


def test_no_vllm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="make setup"):
        launch.main([])


def test_our_flags_are_taken_out_and_all_others_are_left_in_order() -> None:
    argv = ["base", "--adapters", "a", "--max-loras", "4", "--adapters=x=b", "--strict", "--port", "1"]
    own = read_own_flags(argv)
    assert own.adapters == ("a", "x=b")
    assert own.passed_on == ("base", "--max-loras", "4", "--port", "1")


def test_a_port_in_use_is_told_with_its_number() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port}.*--port"):
            launch.check_port("127.0.0.1", port, by_file=False)
        launch.check_port("127.0.0.1", port, by_file=True)
    launch.check_port("127.0.0.1", port, by_file=False)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_told(port: int) -> None:
    with pytest.raises(BadSetting, match="0 to 65535"):
        launch.check_port("", port, by_file=False)


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(BadSetting, match=r"--host 192\.0\.2\.77"):
        launch.check_port("192.0.2.77", free_port(), by_file=False)


@pytest.mark.parametrize(
    "words",
    [
        ["base", "--port", "1"],
        ["--port", "1", "base"],
        ["--model", "base", "--port", "1"],
        ["--model=base", "--port", "1"],
        ["base", "--lora-modules", "a=b", "c=d", "--port", "1"],
        ["base", "--lora_modules=a=b", "--port", "1"],
    ],
)
def test_base_and_adapters_stand_once_in_the_plain_command(words: list[str]) -> None:
    assert launch.vllm_words(words, "base") == ["--port", "1"]
