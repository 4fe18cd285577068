"""The error tree: what a message holds, and which exit code it means."""

from __future__ import annotations

import inspect

import pytest

from vllm_lora_ext import errors
from vllm_lora_ext.exit_codes import run_command


def test_a_message_names_item_rule_and_fix() -> None:
    error = errors.BadSetting("--port", "is taken", "Choose another.", adapter="xiaoli")
    assert str(error) == "--port: is taken. Choose another."
    assert error.adapter == "xiaoli"


def test_the_tree_at_the_top_of_the_file_is_complete() -> None:
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.VllmLoraError):
            assert name in (errors.__doc__ or "")
            assert kind.exit_code == (2 if issubclass(kind, errors.BadInput) else 1)


def test_errors_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails_with(error: BaseException) -> int:
        def command(argv: object) -> int:
            raise error

        return run_command(command, [])

    assert fails_with(errors.BadData("row 1", "is empty")) == 2
    assert fails_with(errors.ServerUnreachable("url", "no server answers")) == 1
    assert fails_with(KeyboardInterrupt()) == 130
    assert fails_with(PermissionError(13, "Permission denied", "/secret")) == 2
    told = capsys.readouterr().err
    assert "error: row 1: is empty." in told
    assert "error: /secret: Permission denied." in told
