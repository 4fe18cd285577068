"""`vllm-lora env`: what is missing, with the command that mends it."""

from __future__ import annotations

import pytest

from serve import environment


def test_a_missing_vllm_and_broken_vision_packages_are_mended_by_a_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "nvidia_driver", lambda: None)
    monkeypatch.setattr(environment, "vllm_version", lambda: None)
    monkeypatch.setattr(environment, "broken_vision_packages", lambda: ["torchvision"])
    commands = [problem.command for problem in environment.problems()]
    assert any("vllm-lora[cpu]" in command and environment.TORCH_INDEX in command for command in commands)
    assert "pip uninstall -y torchvision" in commands


def test_a_gpu_machine_is_told_the_gpu_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "nvidia_driver", lambda: "A100, 570")
    monkeypatch.setattr(environment, "vllm_version", lambda: None)
    monkeypatch.setattr(environment, "broken_vision_packages", list)
    assert [problem.command for problem in environment.problems()] == ["pip install 'vllm-lora[gpu]'"]


def test_this_installation_can_import_what_transformers_looks_for() -> None:
    assert environment.broken_vision_packages() == []
