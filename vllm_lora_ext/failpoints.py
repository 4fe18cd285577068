"""Places where a crash would hurt most, so that tests can have the process killed right there.

With `LORA_EXT_FAILPOINT=name` in the environment the process ends by SIGKILL when it comes by; with
`LORA_EXT_FAILPOINT=name:3`, the third time. (The idea is that of gofail, etcd's tool.)
"""

from __future__ import annotations

import os
import signal

VARIABLE = "LORA_EXT_FAILPOINT"
FAILPOINTS = (
    "store.staged",  # a version's folder is made, its files are not
    "store.weights_written",
    "store.written",  # all files, before the folder has its name
    "store.renamed",  # it has its name, which may not last yet
    "store.synced",  # it is there for good, and nobody knows of it
    "catalog.changed",  # in memory only
    "catalog.partial",  # the new state lies beside the old one
    "catalog.renamed",
    "catalog.committed",
    "collect.begun",  # versions are out of the catalog and still in the store
    "collect.moved",  # a version has left its name
    "collect.removed",
)
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """End the process here and now, if the environment asks for it."""
    stated = os.environ.get(VARIABLE)
    if stated is None or stated.partition(":")[0] != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(stated.partition(":")[2] or 1):
        os.kill(os.getpid(), signal.SIGKILL)
