"""Every flag and variable that deploy/ names is one that the server reads, and its YAML is in one style."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from yamllint import linter
from yamllint.config import YamlLintConfig

from serve.cli import COMMANDS
from serve.config import add_own_flags
from tests.conftest import ROOT
from tests.deploy.manifests import DEPLOY, commands, environment

# Read by libraries: where they write, and how many threads they start.
OF_LIBRARIES = {
    "HOME",
    "USER",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "HF_HOME",
    "HF_TOKEN",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
}
YAML = sorted(path for path in DEPLOY.rglob("*.yaml") if "built" not in path.parts)
DOCUMENTS = (DEPLOY / "README.md", ROOT / "docs" / "operations.md")


def own_flags() -> set[str]:
    """What `vllm-lora serve` adds to vLLM's flags."""
    parser = argparse.ArgumentParser(add_help=False)
    add_own_flags(parser)
    return {flag for action in parser._actions for flag in action.option_strings}


@cache
def vllm_folder() -> Path:
    """The installed vLLM, which is read and not imported: that takes ten seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs vLLM")
    return Path(spec.submodule_search_locations[0])


@cache
def vllm_flags() -> set[str]:
    """Every flag that vLLM's sources define; tests/deploy/test_command_line.py asks its parser."""
    found = set()
    for name in ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py"):
        for node in ast.walk(ast.parse((vllm_folder() / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(r"--[a-z][a-z0-9-]+", str(node.value)):
                found.add(str(node.value))
            elif isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
                fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                found |= {f"--{item.id.replace('_', '-')}" for item in fields if isinstance(item, ast.Name)}
    return found


@pytest.mark.parametrize(
    "place, words", commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_server_is_started_with_flags_that_exist(place: str, words: list[str]) -> None:
    assert words[0] in COMMANDS
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert flags
    assert flags <= own_flags() | vllm_flags()


@pytest.mark.parametrize("place, name", sorted(set(environment())))
def test_a_variable_is_one_that_somebody_reads(place: str, name: str) -> None:
    if name in OF_LIBRARIES:
        return
    ours = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "serve").glob("*.py")))
    known = re.findall(r"^    ([A-Z0-9_]+):", (vllm_folder() / "envs.py").read_text(), re.MULTILINE)
    assert name in known or f'"{name}"' in ours


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_flag_of_ours_or_vllms_in_a_document_exists(path: Path) -> None:
    """In commands of `vllm-lora serve`, and in prose between backquotes."""
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`(--[a-z][a-z-]+)", text))
    for command in re.findall(r"vllm-lora serve (.+(?:\\\n.+)*)", text):
        named |= set(re.findall(r"(?:^|\s)(--[a-z][a-z-]+)", command))
    others = set((ROOT / "serve").rglob("*.py")) | set((ROOT / "train").rglob("*.py"))
    words = "\n".join(other.read_text(encoding="utf-8") for other in sorted(others))
    assert named
    known = own_flags() | vllm_flags()
    known |= {f"--no-{flag[2:]}" for flag in vllm_flags()}  # of those that are on or off
    unknown = {flag for flag in named - known if f'"{flag}"' not in words}
    assert not unknown - {"--profile"}  # Docker Compose's


def test_what_the_guide_names_exists() -> None:
    """The other documents: tests/structure/test_documents.py."""
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (DEPLOY / link).exists(), link
    for path in re.findall(r"(?:^|[ '`])(deploy/[\w./-]+)", text):
        assert (ROOT / path).exists(), path
    code = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    assert set(re.findall(r"^vllm-lora ([a-z]+)", code, re.MULTILINE)) <= set(COMMANDS)
    assert set(re.findall(r"--profile (\w+)", text)) <= {"cpu", "gpu", "monitoring", "webui"}


def test_a_flag_that_does_not_exist_is_noticed() -> None:
    assert "--adapters" in own_flags() and "--shutdown-timeout" in vllm_flags() and "--host" in vllm_flags()
    assert "--adapter-dir" not in own_flags() | vllm_flags()


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_yaml_is_in_one_style(path: Path) -> None:
    config = YamlLintConfig(file=str(DEPLOY / ".yamllint"))
    assert [str(problem) for problem in linter.run(path.read_text(encoding="utf-8"), config)] == []
