"""A process of vLLM's engine ends with the one that started it.

vLLM's workers look at their engine, but the engine looks at nobody: when its server is killed (SIGKILL, out
of memory) engine and workers live on, with all their memory, and answer no one. So each of them waits for its
parent's end, by the pipe that `multiprocessing` keeps between the two; that costs nothing while it waits.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from functools import cache

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")

# The names that vLLM gives to what it starts. Our plugin also runs where a program of somebody else's has an
# engine inside, and whether that outlives its parent is not for us to say.
_OF_VLLM = ("EngineCore", "VllmWorker", "ApiServer", "APIServer")
_GRACE_S = 5.0  # for the engine's own way of ending


def end_with_parent() -> None:
    """End this process soon after its parent, if vLLM started it; may be called any number of times."""
    _watch(os.getpid())


@cache
def _watch(pid: int) -> None:
    """By process, since a forked one inherits the cache but no thread."""
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(_OF_VLLM):
        return

    def wait() -> None:
        parent.join()
        logger.error("The process that started this one (%d) is gone, so it ends as well", parent.pid)
        os.kill(pid, signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
