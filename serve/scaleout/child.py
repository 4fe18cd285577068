"""What a replica runs: `vllm-lora serve` on names that the controller writes, as long as the replica lives.

    python -P -m serve.scaleout.child FOLDER SERVE_FLAGS...

`--state-dir` is the controller's folder, and only read. FOLDER is the replica's own: into the file `revision`
goes the revision of the catalog that requests are answered by, at the socket `trial` somebody may ask whether
a version would load. When the replica dies, whatever it died of, this server ends with everything
that it started: it would be nobody's, and keep memory that the next one needs.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from serve import launch
from serve.config import front_settings, read_config, read_own_flags
from serve.plan import infer_adapters, infer_server
from serve.scaleout.followed import FollowedCatalog
from serve.scaleout.settings import REVISION_FILE, TRIAL_SOCKET
from serve.scaleout.trial import answer_trials
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.collector import collect_seldom
from vllm_lora_ext.exit_codes import run_command
from vllm_lora_ext.free_memory import free_memory

_LOOK_EVERY_S = 0.2
LOOPBACK = "127.0.0.1"

collect_seldom()  # also in the engine's processes, which import this module


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop, or until nobody is there to tell.

    Raises:
        BadInput: with exit code 2, before the engine starts.
    """
    folder, flags = Path(argv[0]), list(argv[1:])
    threading.Thread(target=_end_with, args=(os.getppid(), folder), daemon=True).start()
    launch.require_vllm()
    own = read_own_flags(flags)
    launch.prepare_environment()
    args, defaults = launch.parse_with_vllm(flags)
    if own.api_keys:
        args.api_key = list(own.api_keys)
    with ExitStack() as held:
        _serve_by(args, defaults, folder, held)
        return launch.run_server(args)


def _serve_by(args: Namespace, defaults: dict[str, Any], folder: Path, held: ExitStack) -> None:
    """As `launch.apply_plan`, with names that somebody else writes: nothing is judged or taken here."""
    config = read_config(args, launch.UNSTATED)
    assert config.state_dir is not None, "the controller says where the names are"
    base = read_base_model(config.base_model or "")
    launch.check_port(LOOPBACK, args.port, by_file=False)
    for name, value in (defaults | _inferred(base, config.stated)).items():
        if name not in config.stated:
            setattr(args, name, value)
    args.model = args.model_tag = base.name
    args.lora_modules, args.api_server_count = None, 1
    args.vllm_lora_front = front_settings(args)
    args.vllm_lora_catalog = held.enter_context(
        FollowedCatalog(config.state_dir, partial(_tell, folder / REVISION_FILE))
    )
    args.vllm_lora_also = partial(answer_trials, folder / TRIAL_SOCKET)


def _inferred(base: BaseModel, stated: Mapping[str, Any]) -> dict[str, Any]:
    """What depends on this machine; ranks and slots are the same everywhere: the controller states them."""
    values = infer_server(base.public_name, stated) + infer_adapters([], [], free_memory(), stated)
    values += launch.infer_on_cpu(base.name, stated)
    return {item.name: item.value for item in values}


def _tell(file: Path, revision: int) -> None:
    """Whoever reads the file finds a whole number in it."""
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(str(revision))
    partial_file.rename(file)


def _end_with(parent: int, folder: Path) -> None:
    """Wait for the parent's end, then end the whole process group, which is this server's own."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    shutil.rmtree(folder, ignore_errors=True)  # it was the parent's
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
