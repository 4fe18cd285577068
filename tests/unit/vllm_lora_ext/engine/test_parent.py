"""A process that vLLM started ends with its parent; one that somebody else started does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import multiprocessing, os, sys, time
from vllm_lora_ext.engine.parent import end_with_parent

def work(told):
    end_with_parent()
    end_with_parent()
    told.send(os.getpid())
    time.sleep(120)

if __name__ == "__main__":
    end_with_parent()  # nobody started this one, so that it ends with nobody
    name, method = sys.argv[1:]
    context = multiprocessing.get_context(method)
    told, tells = context.Pipe(False)
    context.Process(target=work, args=(tells,), name=name).start()
    print(told.recv(), flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize(("name", "ends"), [("EngineCore", True), ("VllmWorker-0", True), ("Mine", False)])
def test_what_vllm_started_ends_with_its_parent(name: str, ends: bool, method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, script, name, method], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            time.sleep(0.5)
            assert child.is_running(), "its parent is there"
            parent.kill()
            parent.wait()
            if ends:
                child.wait(60)
            else:
                time.sleep(1.0)
                assert child.is_running()
        finally:
            if child.is_running():
                child.kill()
