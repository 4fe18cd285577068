"""Our packages are found whatever lies in the working folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DECOY = "raise RuntimeError('the user keeps a file of this name here')\n"


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "vllm_lora_ext", "validate", "--help"],
        ["-m", "vllm_lora_ext", "train", "--help"],
        ["-c", "from vllm_lora_ext.packages import endpoint_plugin as p; print(p().name, 'usage')"],
    ],
)
def test_a_folder_with_train_py_and_serve_py_is_a_fine_place_to_work(
    tmp_path: Path, command: list[str]
) -> None:
    for name in ("train.py", "serve.py"):
        (tmp_path / name).write_text(DECOY)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
