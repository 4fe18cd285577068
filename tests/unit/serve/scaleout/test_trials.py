"""A version is tried before it goes live: the socket between replica and server, and who is asked."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vllm-lora[ray]'")

from ray.exceptions import ActorDiedError

from serve.admin import Admin, NoFolders
from serve.scaleout.forwarding import Lost
from serve.scaleout.placement import order_of
from serve.scaleout.trial import Trial, Trouble, answer_trials, ask_for_trial
from serve.scaleout.trials import Trials
from serve.served import ServedVersion
from tests.unit.serve.front_side import Shop, a_version, nothing_is_held
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import AdapterRefused, VllmLoraError
from vllm_lora_ext.records import Version
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.spec import Finding

TROUBLE = Trouble("adapter a", "could not be loaded: no", "Publish it again.")
VERSION = a_version("a").version
FIRST, SECOND = order_of(VERSION.digest, ("r1", "r2"))


@pytest.fixture
def socket() -> Iterator[Path]:
    """Short, as such a path has to be."""
    folder = Path(mkdtemp())
    yield folder / "trial"
    shutil.rmtree(folder)


def stored(shop: Shop, alpha: float) -> Version:
    """A version that is in the store, and that no name has."""
    version = shop.publish("passing", alpha).live_version
    shop.catalog.remove(["passing"])
    return version


def tried(shop: Shop, socket: Path, name: str, version: Version) -> Trouble | None:
    async def work() -> Trouble | None:
        server = await answer_trials(socket, Admin(shop.live, shop.manager, NoFolders()))
        async with server:
            trouble = await ask_for_trial(socket, Trial(name, version))
            assert nothing_is_held(shop.manager)
            return trouble

    return asyncio.run(work())


def test_what_loads_has_no_trouble_and_leaves_the_memory_again(
    tmp_path: Path, make_adapter: Callable[..., Path], socket: Path
) -> None:
    shop = Shop(tmp_path / "state", make_adapter)
    version = stored(shop, 16)
    assert tried(shop, socket, "小李", version) is None
    assert shop.engine.loads == [f"小李@{version.short}"] == shop.engine.unloads


def test_what_a_name_has_stays_in_memory(
    tmp_path: Path, make_adapter: Callable[..., Path], socket: Path
) -> None:
    shop = Shop(tmp_path / "state", make_adapter)
    version = shop.publish("a", 16).live_version
    assert tried(shop, socket, "a", version) is None
    assert list(shop.engine.memory.values()) == [f"a@{version.short}"]


def test_the_trouble_is_the_error_of_one_server(
    tmp_path: Path, make_adapter: Callable[..., Path], socket: Path
) -> None:
    shop = Shop(tmp_path / "state", make_adapter)
    version = stored(shop, 16)
    shop.engine.failing[f"a@{version.short}"] = "no room"
    trouble = tried(shop, socket, "a", version)
    admin = Admin(shop.live, shop.manager, NoFolders())
    with pytest.raises(VllmLoraError) as alone:
        asyncio.run(admin.publish_folder(AdapterSource("a", str(shop.folder(16))), True, ChatOverride()))
    assert trouble is not None and str(trouble.error()) == str(alone.value)


def test_what_is_not_proven_is_refused_with_the_findings(
    tmp_path: Path, make_adapter: Callable[..., Path], socket: Path
) -> None:
    shop, proof = (
        Shop(tmp_path / "state", make_adapter),
        Finding("proof_failed", "a", "is not proven", "Train."),
    )
    version = stored(shop, 16)

    class Strict:
        required = True

        async def require(self, served: ServedVersion) -> None:
            raise AdapterRefused(served.name, [proof])

    admin = Admin(shop.live, shop.manager, NoFolders(), prover=cast(Any, Strict()))

    async def work() -> Trouble | None:
        async with await answer_trials(socket, admin):
            return await ask_for_trial(socket, Trial("a", version))

    trouble = asyncio.run(work())
    assert trouble is not None and trouble.findings == (proof,)
    with pytest.raises(AdapterRefused) as alone:
        asyncio.run(admin.publish_folder(AdapterSource("a", str(shop.folder(16))), True, ChatOverride()))
    assert str(trouble.error()) == str(alone.value)
    made, _ = trials(["r1"], trouble)

    async def taken() -> None:
        made.begin()
        with pytest.raises(AdapterRefused) as refused:
            await asyncio.to_thread(made.check, "a", version)
        assert refused.value.findings == (proof,)

    asyncio.run(taken())


def test_a_version_that_the_store_does_not_have_is_trouble(
    tmp_path: Path, make_adapter: Callable[..., Path], socket: Path
) -> None:
    shop = Shop(tmp_path / "state", make_adapter)
    trouble = tried(shop, socket, "a", VERSION)
    assert trouble is not None and "not in the store" in trouble.rule


def test_no_server_is_no_answer(socket: Path) -> None:
    with pytest.raises(OSError):
        asyncio.run(ask_for_trial(socket, Trial("a", VERSION)))


class FakeEngine:
    """The handle of the replicas: `says` one after the other; errors are raised."""

    def __init__(self, *says: Any) -> None:
        self.says, self.asked = list(says), list[str | None]()
        self.try_version = SimpleNamespace(remote=self._remote)

    async def _remote(self, trial: Trial) -> Any:
        self.asked.append(trial.to)
        said = self.says.pop(0)
        if isinstance(said, Exception):
            raise said
        return said


def trials(members: Sequence[str], *says: Any) -> tuple[Trials, FakeEngine]:
    made, engine = Trials(lambda now: members), FakeEngine(*says)
    made._engine = engine
    return made, engine


def test_one_replica_is_asked() -> None:
    made, engine = trials(["r1", "r2"], None)
    asyncio.run(made.require("a", VERSION))
    assert engine.asked == [FIRST]
    made, engine = trials(["r1", "r2"], TROUBLE)
    with pytest.raises(VllmLoraError, match="could not be loaded: no"):
        asyncio.run(made.require("a", VERSION))
    assert engine.asked == [FIRST]


@pytest.mark.parametrize("lost", [Lost("r1", "gone"), ActorDiedError(), TimeoutError()])
def test_a_replica_that_is_lost_says_nothing_of_the_version(lost: Any) -> None:
    made, engine = trials(["r1", "r2"], lost, TROUBLE)
    with pytest.raises(VllmLoraError):
        asyncio.run(made.require("a", VERSION))
    assert engine.asked == [FIRST, SECOND]
    made, engine = trials(["r1"], lost)
    asyncio.run(made.require("a", VERSION))
    assert engine.asked == ["r1"]


def test_without_replicas_nobody_is_asked() -> None:
    made, engine = trials([])
    asyncio.run(made.require("a", VERSION))
    made.check("a", VERSION)
    assert engine.asked == []


def test_a_folder_is_refused_with_what_the_engine_says() -> None:
    made, _ = trials(["r1"], TROUBLE, None)

    async def work() -> None:
        made.begin()
        with pytest.raises(AdapterRefused) as refused:
            await asyncio.to_thread(made.check, "a", VERSION)
        (finding,) = refused.value.findings
        assert (finding.code, finding.item) == ("load_failed", f"a@{VERSION.short}")
        assert "could not be loaded: no" in finding.rule
        await asyncio.to_thread(made.check, "a", VERSION)

    asyncio.run(work())


def test_a_version_comes_back_from_json_as_it_was() -> None:
    version = dataclasses.replace(VERSION, signature=((1, 2, 3),), options={"a": 1})
    assert Version.from_json(json.loads(json.dumps(dataclasses.asdict(version)))) == version
