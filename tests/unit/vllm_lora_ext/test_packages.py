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


def test_processes_that_the_command_starts_look_for_garbage_as_seldom_as_it_does(tmp_path: Path) -> None:
    """Importing vLLM takes a quarter longer otherwise, in each of a server's processes."""
    (tmp_path / "vllm-lora").write_text(
        "import gc, multiprocessing\n"
        "from vllm_lora_ext.command import command_line\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as started:\n"
        "        assert started.apply(gc.get_threshold) == gc.get_threshold() > (700, 10, 10)\n"
    )
    subprocess.run([sys.executable, tmp_path / "vllm-lora"], check=True)
