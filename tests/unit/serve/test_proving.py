"""Versions are proved before they go live where that is required, afterwards where it is not, and once."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve import proving as proving_module
from serve.admin import Admin, NoFolders
from serve.openai_errors import ApiError
from serve.proof_gate import ProofGate
from serve.proving import Place, Prover
from tests.unit.serve.front_side import RULES, FakeEngine, Shop, nothing_is_held, spin
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.contract import Identity
from vllm_lora_ext.errors import AdapterRefused, StoreFailed
from vllm_lora_ext.inbox import Condition, Inbox
from vllm_lora_ext.parity import Answer, CannotScore
from vllm_lora_ext.records import Version
from vllm_lora_ext.sources import AdapterSource, find_sources

MakeAdapter = Callable[..., Path]
END = 2
GOLDEN = {"prompt_ids": [5, 6], "answer_ids": [7, END], "logprobs": [-3.0, -0.5, -0.1], "ended": True}
IDENTITY = Identity("x", "{{ messages }}", {"probes": [GOLDEN], "dtype": "float32"})
HERE = Place("base 1", "vllm 1 cpu", "float32")


class FakeScorer:
    """A `Scorer` that scores as training did; as the protocol wants, the base scores otherwise.

    `wrong` are the models that it scores by 1 nat differently, `dead` those that are like the base;
    `trouble` is why it cannot be asked. It wants the handle of a loaded adapter.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.wrong: set[str] = set()
        self.dead: set[str] = set()
        self.trouble: Exception | None = None
        self.asked: list[str | None] = []
        self.held: asyncio.Event | None = None

    async def score(self, handle: int | None, ids: Sequence[int]) -> list[float]:
        model = await self._model(handle)
        scores = [float(score) for score in GOLDEN["logprobs"]] if len(ids) == 4 else [-1.0] * (len(ids) - 1)
        if model is None or model in self.dead:
            return [score - 4 for score in scores]
        return [score - 1 for score in scores] if model in self.wrong else scores

    async def answer(self, handle: int | None, ids: Sequence[int], most: int) -> Answer:
        await self._model(handle)
        return Answer((7, END)[:most], most >= 2)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    async def _model(self, handle: int | None) -> str | None:
        model = None if handle is None else self._engine.memory[handle]
        self.asked.append(model)
        if self.held is not None:
            await self.held.wait()
        if self.trouble is not None:
            raise self.trouble
        return model


class House:
    """A shop with a prover in it."""

    def __init__(self, tmp_path: Path, make_adapter: MakeAdapter) -> None:
        self.tmp_path, self.make_adapter = tmp_path, make_adapter
        self.open()

    def open(self, required: bool = True, place: Place = HERE) -> None:
        """As a server that starts, on the same state folder."""
        if hasattr(self, "shop"):
            self.shop.catalog.close()
        self.shop = Shop(self.tmp_path / "state", self.make_adapter)
        self.scorer = FakeScorer(self.shop.engine)
        self.required, self.place = required, place

    def run(self, work: Callable[[Admin, Prover], Coroutine[Any, Any, None]]) -> None:
        async def all_of_it() -> None:
            shop = self.shop
            shop.prover = Prover(
                shop.live, shop.manager, self.scorer, self.place, self.required, lambda: shop.now
            )
            await work(Admin(shop.live, shop.manager, NoFolders(), (), shop.prover), shop.prover)
            await spin()
            assert nothing_is_held(shop.manager)

        asyncio.run(all_of_it())

    def folder(self, alpha: float, probes: bool = True) -> Path:
        if not probes:
            return self.shop.folder(alpha)
        files = {"chat_template__jinja": IDENTITY.template, "identity__json": IDENTITY.to_json()}
        return self.shop.folder(alpha, **files)

    async def publish(self, admin: Admin, name: str, alpha: float, probes: bool = True) -> dict[str, Any]:
        source = AdapterSource(name, str(self.folder(alpha, probes)))
        return await admin.publish_folder(source, True, ChatOverride(), "upload")

    def is_served(self, name: str) -> str:
        version = self.shop.live.resolve(name)
        assert version is not None
        return version.version.digest


@pytest.fixture
def house(tmp_path: Path, make_adapter: MakeAdapter) -> House:
    return House(tmp_path, make_adapter)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving_module, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(proving_module, "_REST_S", 0.05)


def test_what_is_proven_goes_live_with_its_proof(house: House) -> None:
    async def work(admin: Admin, prover: Prover) -> None:
        view = await house.publish(admin, "a", 16)
        assert view["proof"] == "proven" and view["requests"] == 0
        assert house.is_served("a") == view["digest"]
        detail = admin.get("a")
        proof = detail["proofs"]["parity"]
        assert (proof["digest"], proof["place"]) == (view["digest"], HERE.to_json())
        assert (proof["probes"], proof["largest"], proof["effect"]) == (1, 0.0, 4.0)
        assert [version["proof"] for version in detail["versions"]] == ["proven"]
        assert admin.list()["data"][0]["proof"] == "proven" and json.dumps(detail)
        assert house.shop.catalog.proofs(view["digest"])["parity"] == proof
        model = f"a@{view['version']}"
        assert house.scorer.asked == [model, None, model], "one at a time, and the base once"

    house.run(work)


def test_a_failure_leaves_the_live_version_and_nothing_of_the_new_one(house: House) -> None:
    async def work(admin: Admin, prover: Prover) -> None:
        first = await house.publish(admin, "a", 16)
        for kind in (house.scorer.wrong, house.scorer.dead):
            kind.update(f"a@{digest[:12]}" for digest in _digests(house, 32))
            with pytest.raises(AdapterRefused) as refusal:
                await house.publish(admin, "a", 32)
            (finding,) = refusal.value.findings
            assert (
                finding.code == "proof_failed" and "does not do here what it did in training" in finding.rule
            )
            kind.clear()
        assert house.is_served("a") == first["digest"]
        assert house.shop.catalog.store.digests() == {first["digest"]}
        assert set(house.shop.engine.memory.values()) == {f"a@{first['version']}"}
        assert (await house.publish(admin, "a", 32))["proof"] == "proven", (
            "whoever asks again is proved again"
        )

    house.run(work)


def _digests(house: House, alpha: float) -> list[str]:
    """The digest that an adapter gets, from a store of its own."""
    from vllm_lora_ext.intake import admit
    from vllm_lora_ext.store import AdapterStore

    admitted = admit(house.folder(alpha), AdapterStore(house.tmp_path / "aside"), RULES, "a")
    admitted.version.release()
    return [admitted.version.digest]


def test_without_probes_it_is_not_proven_and_says_what_to_do(house: House) -> None:
    async def work(admin: Admin, prover: Prover) -> None:
        with pytest.raises(AdapterRefused) as refusal:
            await house.publish(admin, "a", 16, probes=False)
        (finding,) = refusal.value.findings
        assert "has no probes to replay" in finding.rule and "vllm-lora train" in finding.fix
        prover.required = False
        view = await house.publish(admin, "a", 16, probes=False)
        assert view["proof"] == "unproven"
        assert admin.get("a")["proofs"]["parity"]["kind"] == "effect"

    house.run(work)


@pytest.mark.parametrize(
    "trouble", [CannotScore("no"), RuntimeError("it died"), ValueError("too long"), TimeoutError()]
)
def test_trouble_of_the_engine_is_no_crash_and_is_told(house: House, trouble: Exception) -> None:
    async def work(admin: Admin, prover: Prover) -> None:
        house.scorer.trouble = trouble
        with pytest.raises(AdapterRefused) as refusal:
            await house.publish(admin, "a", 16)
        (finding,) = refusal.value.findings
        for_good = isinstance(trouble, ValueError)
        assert finding.code == ("proof_failed" if for_good else "proof_unfinished")
        assert "could not be asked" in finding.rule
        house.scorer.trouble = None
        assert (await house.publish(admin, "a", 16))["proof"] == "proven"

    house.run(work)


def test_a_full_disk_keeps_no_version_from_going_live_and_the_proof_is_kept_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFailed("catalog.json", OSError(errno.ENOSPC, "full"))

    async def work(admin: Admin, prover: Prover) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(house.shop.catalog, "record_proof", full)
            view = await house.publish(admin, "a", 16)
            assert view["proof"] == "proven" and house.shop.catalog.proofs(view["digest"]) == {}
        house.shop.now += 61
        await prover.save()
        assert house.shop.catalog.proofs(view["digest"])["parity"]["verdict"] == "proven"

    house.run(work)


def test_a_question_that_is_not_answered_ends(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving_module, "_ANSWER_S", 0.05)

    async def work(admin: Admin, prover: Prover) -> None:
        house.scorer.held = asyncio.Event()
        with pytest.raises(AdapterRefused, match="no answer within"):
            await house.publish(admin, "a", 16)

    house.run(work)


def test_a_restart_asks_nothing_again_and_another_engine_everything(house: House) -> None:
    async def publish(admin: Admin, prover: Prover) -> None:
        await house.publish(admin, "a", 16)

    async def restart(admin: Admin, prover: Prover) -> None:
        await prover.prove_live(None)
        assert house.is_served("a") and admin.list()["data"][0]["proof"] == "proven"

    house.run(publish)
    house.open()
    house.run(restart)
    assert house.scorer.asked == []
    for place in (Place("base 2", "vllm 1 cpu", "float32"), Place("base 2", "vllm 1 cpu", "bfloat16")):
        house.open(place=place)
        house.run(restart)
        assert len(house.scorer.asked) == 3


def test_what_was_published_without_a_proof_waits_for_it(house: House) -> None:
    entry = house.shop.publish("a", 16, **_files())
    house.shop.publish("b", 32, **_files())

    async def work(admin: Admin, prover: Prover) -> None:
        house.scorer.wrong.add(f"b@{house.shop.catalog.entry('b').live[:12]}")
        with pytest.raises(ApiError) as waits:
            house.shop.live.resolve("a")
        assert (waits.value.status, waits.value.code) == (503, "adapter_loading")
        assert "is being proved on this engine" in waits.value.message and "[" not in waits.value.message
        assert house.shop.live.names() == []
        task = asyncio.create_task(prover.run())
        await until(lambda: house.shop.live.names() == ["a"])
        assert house.is_served("a") == entry.live
        await until(lambda: prover.record(house.shop.catalog.entry("b").live) != {})
        with pytest.raises(ApiError) as refused:
            house.shop.live.resolve("b")
        assert refused.value.status == 404 and "proof_failed" in refused.value.message
        assert len(prover.refused()) == 1
        task.cancel()

    house.run(work)


def _files() -> dict[str, str]:
    return {"chat_template__jinja": IDENTITY.template, "identity__json": IDENTITY.to_json()}


def test_a_version_that_is_not_proven_is_not_made_live_in_any_other_way(house: House) -> None:
    first = house.shop.publish("a", 16, **_files()).live
    second = house.shop.publish("a", 32, **_files()).live

    async def work(admin: Admin, prover: Prover) -> None:
        house.scorer.wrong.add(f"a@{first[:12]}")
        with pytest.raises(AdapterRefused, match="proof_failed"):
            await admin.rollback("a", None)
        with pytest.raises(AdapterRefused, match="proof_failed"):
            await admin.split("a", {first[:12]: 10, second[:12]: 90})
        assert house.shop.catalog.entry("a").live == second and not house.shop.catalog.entry("a").traffic
        house.scorer.wrong.clear()
        await admin.rollback("a", None)
        assert house.is_served("a") == first

    house.run(work)


def test_where_it_is_not_required_it_waits_until_the_adapter_is_in_memory_and_the_server_rests(
    house: House,
) -> None:
    entry = house.shop.publish("a", 16, **_files())
    house.required = False

    async def work(admin: Admin, prover: Prover) -> None:
        task = asyncio.create_task(prover.run())
        await asyncio.sleep(0.1)
        assert house.scorer.asked == [] and house.shop.engine.loads == [], "nobody has asked for it"
        version = house.shop.live.resolve("a")
        assert version is not None, "it is served all the same"
        house.shop.manager.hold(version)
        async with house.shop.manager.turn(version.model):
            await asyncio.sleep(0.1)
            assert house.scorer.asked == [], "something runs"
        for _ in range(20):  # a client that asks now and then
            async with house.shop.manager.turn(None):
                pass
            await asyncio.sleep(0.01)
        assert house.scorer.asked == [], "and something ran just now"
        house.shop.manager.release(version.model)
        await until(lambda: admin.list()["data"][0]["proof"] == "proven")
        await until(lambda: house.shop.catalog.proofs(entry.live) != {})
        assert house.shop.manager.use_of("a").requests == 1, "a proof is no use"
        asked = len(house.scorer.asked)
        await asyncio.sleep(0.1)
        assert len(house.scorer.asked) == asked, "once"
        task.cancel()

    house.run(work)


def test_a_server_without_rest_proves_after_long_and_retries_later_each_time(house: House) -> None:
    house.shop.publish("a", 16, **_files())
    house.required = False

    async def work(admin: Admin, prover: Prover) -> None:
        task = asyncio.create_task(prover.run())
        version = house.shop.live.resolve("a")
        assert version is not None
        house.shop.manager.hold(version)
        house.scorer.trouble = CannotScore("no")
        async with house.shop.manager.turn(version.model):
            await asyncio.sleep(0.1)
            assert house.scorer.asked == []
            house.shop.now += 3601
            await until(lambda: len(house.scorer.asked) == 1)
        house.shop.manager.release(version.model)
        await asyncio.sleep(0.1)
        assert len(house.scorer.asked) == 1
        house.shop.now += 61
        await until(lambda: len(house.scorer.asked) == 2)
        house.shop.now += 61
        await asyncio.sleep(0.1)
        assert len(house.scorer.asked) == 2, "twice as long the second time"
        house.scorer.trouble = None
        house.shop.now += 60
        await until(lambda: admin.list()["data"][0]["proof"] == "proven")
        task.cancel()

    house.run(work)


def test_a_folder_that_fails_is_refused_and_what_was_taken_before_stays(house: House) -> None:
    shop, folder = house.shop, house.tmp_path / "watched"

    def take(gate: ProofGate) -> None:
        inbox = Inbox(shop.catalog, RULES, condition=Condition("proved", gate.check))
        inbox.take_all(inbox.scan(find_sources([str(folder)])))

    async def work(admin: Admin, prover: Prover) -> None:
        gate = ProofGate()
        folder.mkdir()
        house.folder(16).rename(folder / "a")
        taking = asyncio.create_task(asyncio.to_thread(take, gate))
        await asyncio.sleep(0.3)
        assert shop.catalog.names() == [], "the engine is not up"
        gate.open(prover.require_of, asyncio.get_running_loop())
        await taking
        first = house.is_served("a")
        house.scorer.wrong.add(f"a@{_digests(house, 32)[0][:12]}")
        (folder / "a").rename(house.tmp_path / "aside-folder")
        house.folder(32).rename(folder / "a")
        for _ in range(2):
            asked = len(house.scorer.asked)
            await asyncio.to_thread(take, gate)
            assert house.is_served("a") == first
            (row,) = admin.list()["data"]
            assert [finding["code"] for finding in row["findings"]] == ["proof_failed"]
            assert row["proof"] == "proven", "the one that is served is"
        assert len(house.scorer.asked) == asked, "the refusal was noted"
        assert shop.catalog.store.digests() == {first}
        await asyncio.to_thread(_take_freely, shop, folder)
        assert shop.catalog.entry("a").live != first, "without the condition it is taken"

    house.run(work)


def _take_freely(shop: Shop, folder: Path) -> None:
    inbox = Inbox(shop.catalog, RULES)
    inbox.take_all(inbox.scan(find_sources([str(folder)])))


@pytest.mark.parametrize("state", ["starting", "stuck", "ended"])
def test_a_server_that_ends_lets_nobody_wait(state: str, house: House) -> None:
    version = house.shop.publish("a", 16).live_version
    loop, gate, found = asyncio.new_event_loop(), ProofGate(), []

    async def require(name: str, version: Version) -> None:
        """Never called: its loop does not run."""

    def wait() -> None:
        try:
            gate.check("a", version)
        except AdapterRefused as error:
            found.extend(error.findings)

    if state == "ended":
        loop.close()
    if state != "starting":
        gate.open(require, loop)
    thread = threading.Thread(target=wait)
    thread.start()
    gate.close()
    thread.join(5)
    assert not thread.is_alive() and [finding.code for finding in found] == ["proof_unfinished"]
    if state != "ended":
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
