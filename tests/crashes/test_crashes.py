"""Kill -9 at every failpoint: what was acknowledged is there afterwards, and nothing is half there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BASE_CONFIG
from vllm_lora_ext import failpoints
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.failpoints import FAILPOINTS
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.sources import AdapterSource

MakeAdapter = Callable[..., Path]
RULES = Rules(BaseModel("base", BASE_CONFIG))
View = dict[str, float]  # name -> alpha of its live version

# What is done, one after the other, and how the catalog looks after each: the reference.
STEPS: list[tuple[str, str, float | None, View]] = [
    ("publish", "a", 1, {"a": 1}),
    ("publish", "b", 2, {"a": 1, "b": 2}),
    ("replace", "a", 3, {"a": 3, "b": 2}),
    ("rollback", "a", None, {"a": 1, "b": 2}),
    ("remove", "b", None, {"a": 1}),
    ("replace", "a", 4, {"a": 4}),
    ("replace", "a", 5, {"a": 5}),  # the oldest version is collected
]
KEEP = 2


def work(state_dir: Path, folders: dict[float, Path], acknowledge: Callable[[int], object]) -> None:
    """All steps; each is acknowledged once its call returned."""
    with Catalog(state_dir, keep_versions=KEEP) as catalog:
        for number, (what, name, alpha, _) in enumerate(STEPS, start=1):
            if what == "rollback":
                catalog.rollback(name)
            elif what == "remove":
                catalog.remove([name])
                catalog.collect()
            else:
                assert alpha is not None
                publish(AdapterSource(name, str(folders[alpha])), catalog, RULES, replace=True)
            acknowledge(number)


def run_until_killed(state_dir: Path, folders: dict[float, Path], point: str) -> tuple[int, bool]:
    """`work` in a child; how many steps it acknowledged, and whether it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ[failpoints.VARIABLE] = point
            failpoints._passed.clear()
            work(state_dir, folders, lambda number: os.write(writing, b"."))
            os._exit(0)
        finally:
            os._exit(3)
    os.close(writing)
    with os.fdopen(reading, "rb") as acknowledged:
        count = len(acknowledged.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return count, os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def view(catalog: Catalog) -> View:
    """Names and the alpha of their live versions, every byte of which is compared with its digest."""
    import json

    found = {}
    for entry in catalog.entries():
        for version in entry.versions:
            catalog.store.verify(version.digest)
        config = catalog.store.verify(entry.live).folder / "adapter_config.json"
        found[entry.name] = json.loads(config.read_text())["lora_alpha"]
    return found


@pytest.fixture
def folders(make_adapter: MakeAdapter) -> dict[float, Path]:
    return {alpha: make_adapter(f"alpha-{alpha}", lora_alpha=alpha) for alpha in (1, 2, 3, 4, 5)}


@pytest.mark.parametrize("point", FAILPOINTS)
def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(
    point: str, folders: dict[float, Path], tmp_path: Path
) -> None:
    views = [{}, *(step[3] for step in STEPS)]
    for nth in range(1, 100):
        state_dir = tmp_path / f"state-{nth}"
        acknowledged, killed = run_until_killed(state_dir, folders, f"{point}:{nth}")
        if not killed:
            assert acknowledged == len(STEPS)
            break
        with Catalog(state_dir, keep_versions=KEEP) as catalog:
            found = view(catalog)
            assert found in (views[acknowledged], views[acknowledged + 1])
            assert all(not path.name.startswith(".") for path in state_dir.rglob("*"))
            catalog.collect()
            assert catalog.store.digests() == {v.digest for e in catalog.entries() for v in e.versions}
            # And it goes on from there.
            publish(AdapterSource("after", str(folders[5])), catalog, RULES)
            assert view(catalog) == found | {"after": 5}
    assert nth > 1, "nobody came by this failpoint"
