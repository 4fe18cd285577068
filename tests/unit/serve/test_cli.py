"""The command line: its table, its streams and its exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.cli import COMMANDS, main
from serve.environment import Problem

MakeAdapter = Callable[..., Path]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in COMMANDS)


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if verb != "serve"])
def test_every_command_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_an_unknown_command_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert "'fly' is no command" in capsys.readouterr().err


def test_validate_admits_with_0(make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(make_adapter()), "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert (item["adapter"], item["state"], item["rank"]) == ("xiaoli", "admitted", 8)


def test_validate_refuses_with_2_and_every_finding(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(make_adapter(use_dora=True, bias="all")), "--json"]) == 2
    (item,) = json.loads(capsys.readouterr().out)
    assert [finding["item"] for finding in item["findings"]] == ["bias", "use_dora"]


def test_validate_judges_each_adapter_by_the_base_that_it_names(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter("known"), make_adapter("unknown", base_model_name_or_path="./moved/away")
    assert main(["validate", str(tmp_path / "adapters")]) == 0
    table = capsys.readouterr().out
    assert "admitted" in table and "unproven" in table and "--base-model" in table


def test_validate_of_nothing_is_bad_input(tmp_path: Path) -> None:
    assert main(["validate", str(tmp_path)]) == 2
    assert main(["validate", str(tmp_path / "nowhere")]) == 2


def test_validate_needs_neither_torch_nor_vllm(make_adapter: MakeAdapter) -> None:
    code = (
        "import sys; from serve.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "validate", str(make_adapter())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["chat", "-m", "x", "hello", "--url", "http://127.0.0.1:9"],
        ["loadtest", "--url", "http://127.0.0.1:9"],
    ],
)
def test_no_server_is_a_failure_that_says_what_to_start(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    assert "vllm-lora serve" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-concurrency", "--num-requests", "--input-len", "--max-tokens"])
def test_a_load_of_nothing_is_bad_input(flag: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["loadtest", flag, "0"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi!", b"\x00\xff garbage", b""]
)
@pytest.mark.parametrize("argv", [["chat", "-m", "x", "hello"], ["loadtest"], ["loadtest", "--models", "x"]])
def test_a_server_that_talks_nonsense_is_a_failure_without_a_traceback(
    answer: bytes, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        talker = threading.Thread(target=_answer_everything, args=(server, answer), daemon=True)
        talker.start()
        port = server.getsockname()[1]
        assert main([*argv, "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def _answer_everything(server: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)


def test_env_prints_data_and_fails_when_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.environment.problems", list)
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] >= 1
    assert facts["torch"]
    monkeypatch.setattr("serve.environment.problems", lambda: [Problem("all of it", "make setup")])
    assert main(["env"]) == 1
    assert "mend it with: make setup" in capsys.readouterr().out
