"""The command line: its table, its streams and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.cli import COMMANDS, main

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


def test_env_prints_data(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["env", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] >= 1
    assert facts["torch"]
    assert code == (1 if facts["problems"] else 0)
