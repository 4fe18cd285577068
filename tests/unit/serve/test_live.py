"""What a request's `model` stands for, from the moment that a change is on the disk."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from serve.live import LiveAdapters
from serve.openai_errors import ApiError
from serve.served import ServedVersion
from tests.unit.serve.front_side import RULES, Shop
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.records import FolderRecord
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.spec import EngineLimits, Finding

MakeAdapter = Callable[..., Path]
NO = Finding("rank_too_large", "r", "rank 999 is more than 512", "Train a smaller one.")


@pytest.fixture
def shop(tmp_path: Path, make_adapter: MakeAdapter) -> Shop:
    return Shop(tmp_path / "state", make_adapter)


def refusal(live: LiveAdapters, model: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        live.resolve(model)
    return caught.value


def resolved(live: LiveAdapters, model: str, user: str | None = None) -> ServedVersion:
    version = live.resolve(model, user)
    assert version is not None
    return version


def test_the_base_answers_to_each_of_its_names(shop: Shop) -> None:
    assert shop.live.resolve("base") is shop.live.resolve("base-too") is None
    assert shop.live.base_name == "base"
    without = LiveAdapters(None, RULES, None)
    assert without.resolve("base") is None
    assert without.names() == []
    assert refusal(without, "a").code == "model_not_found"


@pytest.mark.parametrize("name", ["a", "小李", "org/name"])
def test_a_name_answers_with_its_live_version(name: str, shop: Shop) -> None:
    first = shop.publish(name, 16)
    assert resolved(shop.live, name).model == f"{name}@{first.live[:12]}"
    second = shop.publish(name, 32)
    assert resolved(shop.live, name).version.digest == second.live
    assert resolved(shop.live, f"{name}@{first.live[:12]}").version.digest == first.live
    assert resolved(shop.live, f"{name}@{first.live}").version.digest == first.live
    shop.catalog.rollback(name)
    assert resolved(shop.live, name).version.digest == first.live
    shop.catalog.remove([name])
    assert refusal(shop.live, name).status == 404


@pytest.mark.parametrize("model", [None, ""])
def test_without_a_model(model: object, shop: Shop) -> None:
    error = refusal(shop.live, model)
    assert (error.status, error.code, error.param) == (400, "model_required", "model")
    assert error.message == "You must provide a model parameter."  # as OpenAI


@pytest.mark.parametrize("model", [0, 1.5, True, ["a"], {"a": 1}])
def test_a_model_that_is_no_text(model: object, shop: Shop) -> None:
    error = refusal(shop.live, model)
    assert (error.status, error.code, error.param) == (400, "invalid_value", "model")


@pytest.mark.parametrize(
    "model",
    [
        "nobody",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../b",
        "a\0b",
        "‮evil",
        "a@",
        "@",
        "a@zz",
    ],
)
def test_what_is_not_there_is_not_found(model: str, shop: Shop) -> None:
    shop.publish("a")
    error = refusal(shop.live, model)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert len(error.message) < 600
    assert error.message.isprintable()
    again = refusal(shop.live, model)
    assert again.body() == error.body()
    assert again is not error, "one that is raised collects what it passes through"


def test_the_nearest_names_are_told(shop: Shop) -> None:
    shop.publish("xiaoli")
    assert "Did you mean xiaoli?" in refusal(shop.live, "xiaolu").message
    assert "Did you mean xiaoli?" in refusal(shop.live, "xiaolu@3f2a9c14d0b7").message
    assert "Did you mean" not in refusal(shop.live, "quite-another").message


def test_a_version_that_is_not_there_is_told_with_those_that_are(shop: Shop) -> None:
    live = shop.publish("a").live
    assert live[:12] in refusal(shop.live, "a@0000").message
    assert "too short" in refusal(shop.live, "a@0").message


def test_why_a_folder_was_refused(shop: Shop) -> None:
    shop.catalog.note_folders({"bad=/somewhere/bad": FolderRecord(None, (), "bad", (NO,))})
    error = refusal(shop.live, "bad")
    assert error.status == 404
    assert "rank_too_large" in error.message and "rank 999" in error.message
    assert "/somewhere" not in error.message


def test_while_an_adapter_is_being_taken_clients_are_told_to_come_back(shop: Shop) -> None:
    assert refusal(shop.live, "new").status == 404, "nobody has heard of it"
    shop.pending["new"] = "it is being admitted"
    error = refusal(shop.live, "new")
    assert (error.status, error.code) == (503, "adapter_loading")
    assert int(error.headers["Retry-After"]) >= 1
    assert refusal(shop.live, "new@3f2a9c14d0b7").status == 503
    shop.publish("new")
    assert resolved(shop.live, "new"), "it is there, though it is still looked at"
    del shop.pending["new"]
    assert resolved(shop.live, "new")


def test_what_was_not_there_is_there_once_it_is_published(shop: Shop) -> None:
    assert refusal(shop.live, "a").status == 404
    shop.publish("a")
    assert resolved(shop.live, "a").name == "a"


def test_names_that_nobody_has_take_no_memory(shop: Shop) -> None:
    for number in range(3000):
        refusal(shop.live, f"nobody-{number}")
    refusal(shop.live, "x" * 100_000)
    assert len(shop.live._unknown) <= 1024


def test_a_version_that_nobody_will_ask_for_any_more_is_told_once_it_is(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    shop, retired = Shop(tmp_path / "state", make_adapter), list[str]()
    live = LiveAdapters(shop.catalog, RULES, None, retired=retired.append)
    shop.publish("a", 16), shop.publish("b", 16)
    first, other = resolved(live, "a").model, resolved(live, "b").model
    shop.publish("a", 32)
    live.refresh()
    assert retired == [first]
    shop.catalog.remove(["b"])
    live.refresh()
    assert retired.count(other) == 1
    assert other not in {served.model for served in live._served.values()}  # type: ignore[union-attr]


def test_a_version_with_a_share_of_the_traffic_is_not_retired(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    shop, retired = Shop(tmp_path / "state", make_adapter), list[str]()
    live = LiveAdapters(shop.catalog, RULES, None, retired=retired.append)
    first = shop.publish("a", 16).live
    resolved(live, "a")
    second = shop.publish("a", 32).live
    shop.catalog.set_traffic("a", {first: 50, second: 50})
    live.refresh()
    assert retired == []
    shop.catalog.set_traffic("a", {})
    live.refresh()
    assert retired == [f"a@{first[:12]}"]


def test_the_traffic_is_split_by_percent(shop: Shop) -> None:
    first, second = shop.publish("a", 16).live, shop.publish("a", 32).live
    shop.catalog.set_traffic("a", {first: 90, second: 10})
    shop.live._chance.seed(0)
    asked = Counter(resolved(shop.live, "a").version.digest for _ in range(5000))
    assert 0.07 < asked[second] / 5000 < 0.13
    users = Counter(resolved(shop.live, "a", f"user-{n}").version.digest for n in range(5000))
    assert 0.07 < users[second] / 5000 < 0.13


def test_a_user_keeps_to_one_version(shop: Shop) -> None:
    first, second = shop.publish("a", 16).live, shop.publish("a", 32).live
    shop.catalog.set_traffic("a", {first: 50, second: 50})
    for user in ("小李", "", "x" * 10_000):
        assert len({resolved(shop.live, "a", user).model for _ in range(50)}) == 1
    shop.catalog.set_traffic("a", {first: 100})
    assert resolved(shop.live, "a", "any").version.digest == first
    assert resolved(shop.live, "a").version.digest == first
    assert resolved(shop.live, f"a@{second[:12]}").version.digest == second, "who pins it gets it"


def test_a_load_that_failed_is_remembered_for_a_while_and_then_tried_again(shop: Shop) -> None:
    shop.publish("a")
    version = resolved(shop.live, "a")
    shop.live.note_failure(version, "the engine has no room")
    error = refusal(shop.live, "a")
    assert error.status == 404 and "load_failed" in error.message and "no room" in error.message
    assert shop.live.names() == []
    shop.now += 29.0
    assert refusal(shop.live, "a").status == 404
    shop.now += 2.0
    assert resolved(shop.live, "a") == version
    assert shop.live.names() == ["a"]


def test_a_load_that_works_ends_what_was_said_of_one_that_failed(shop: Shop) -> None:
    shop.publish("a")
    version = resolved(shop.live, "a")
    shop.live.note_failure(version, "no")
    shop.live.note_success(version)
    assert resolved(shop.live, "a") == version


def test_a_load_that_failed_says_nothing_of_the_next_version(shop: Shop) -> None:
    shop.publish("a", 16)
    shop.live.note_failure(resolved(shop.live, "a"), "no")
    second = shop.publish("a", 32).live
    assert resolved(shop.live, "a").version.digest == second


def test_a_version_that_the_store_has_lost_comes_back_when_it_is_published_again(shop: Shop) -> None:
    digest = shop.publish("a").live
    folder = shop.catalog.store.root / digest
    folder.chmod(0o755)
    (folder / "adapter_model.safetensors").unlink()
    error = refusal(shop.live, "a")
    assert error.status == 404 and "Publish the adapter again" in error.message
    assert str(shop.catalog.state_dir) not in error.message
    assert shop.publish("a").live == digest
    assert resolved(shop.live, "a").version.digest == digest


def test_a_version_is_judged_by_the_rules_of_this_server(shop: Shop) -> None:
    shop.publish("a")
    strict = LiveAdapters(shop.catalog, replace(RULES, limits=EngineLimits(max_lora_rank=4)), None)
    error = refusal(strict, "a")
    assert error.status == 404 and "rank_too_large" in error.message
    assert strict.names() == []


def test_whose_template_is_used(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """One that somebody vouches for wins over the server's, one that merely lies there gives way."""
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shop = Shop(tmp_path / "state", make_adapter, stated_template="stated")
    folder = shop.folder(16, chat_template__jinja=own)
    source = AdapterSource("a", str(folder))
    publish(source, shop.catalog, RULES)
    assert resolved(shop.live, "a").template is None
    publish(source, shop.catalog, RULES, replace=True, chat=ChatOverride(template=own))
    assert resolved(shop.live, "a").template == own, "the same version, and now somebody vouches for it"


def test_a_change_is_seen_from_another_thread(shop: Shop) -> None:
    async def work() -> None:
        await asyncio.to_thread(shop.publish, "a")
        assert resolved(shop.live, "a")

    asyncio.run(work())
