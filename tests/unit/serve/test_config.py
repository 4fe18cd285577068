"""The flags of the front side: keys that nobody else gets to see, limits, and chat settings by name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.config import (
    FrontSettings,
    add_own_flags,
    front_settings,
    read_config,
    read_own_flags,
    read_prompt_templates,
)
from serve.routes import RouteKind
from vllm_lora_ext.errors import BadSetting

UNSTATED = object()
ENVIRONMENT = ("VLLM_API_KEY", "VLLM_LORA_ADMIN_KEY")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys in the environment are the test's own, and gone after it."""
    with monkeypatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, "")
        yield


def parsed(*argv: str, **vllms: Any) -> argparse.Namespace:
    """What vLLM's parser makes of a command line with our flags."""
    parser = argparse.ArgumentParser()
    add_own_flags(parser)
    parser.add_argument("--api-key", action="extend", nargs="+")
    parser.add_argument("--host")
    parser.add_argument("--uds")
    args = parser.parse_args(argv)
    for name, value in vllms.items():
        setattr(args, name, value)
    return args


def settings(*argv: str) -> FrontSettings:
    return front_settings(parsed(*argv))


def answer(found: FrontSettings, key: str | None, kind: RouteKind = RouteKind.OPEN) -> int | None:
    """The status that a request with this key gets; None if it passes."""
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    error = found.keys.check(kind, headers)
    return None if error is None else error.status


def test_without_flags_all_is_as_it_is_documented() -> None:
    found = settings("--host", "127.0.0.1")
    assert (found.turn_seconds, found.max_queue, found.max_queue_per_adapter) == (2.0, 1024, 256)
    assert (found.metrics_max_adapters, found.allow_route) == (1000, ())
    assert answer(found, None) is answer(found, None, RouteKind.ADMIN_CHANGE) is None


def test_where_only_vllms_flags_were_parsed_it_is_the_same() -> None:
    plain = front_settings(argparse.Namespace(api_key=None, host="127.0.0.1"))
    assert repr(plain) == repr(settings("--host", "127.0.0.1"))


def test_flags_are_taken_over() -> None:
    found = settings(
        *("--turn-seconds", "0.5", "--max-queue", "7", "--max-queue-per-adapter", "3"),
        *("--metrics-max-adapters", "0", "--allow-route", "/a", "--allow-route", "/b*"),
    )
    assert (found.turn_seconds, found.max_queue, found.max_queue_per_adapter) == (0.5, 7, 3)
    assert (found.metrics_max_adapters, found.allow_route) == (0, ("/a", "/b*"))


@pytest.mark.parametrize("by_environment", [True, False])
def test_keys_are_ours_and_vllm_sees_none(by_environment: bool) -> None:
    argv = ["--host", "0.0.0.0"]
    if by_environment:
        os.environ.update(VLLM_API_KEY="api-1", VLLM_LORA_ADMIN_KEY="admin-1")
    else:
        argv += ["--api-key", "api-1", "--api-key", "api-2", "--admin-key", "admin-1"]
    args = parsed(*argv)
    found = front_settings(args)
    assert args.api_key is args.admin_key is None
    assert not any(name in os.environ for name in ENVIRONMENT), "a worker inherits them"
    assert "api-1" not in repr(found) and "admin-1" not in repr(found)
    assert answer(found, None) == answer(found, "wrong") == 401
    assert answer(found, "api-1") is answer(found, "admin-1", RouteKind.ADMIN_CHANGE) is None
    assert answer(found, "api-2") == (401 if by_environment else None)
    assert answer(found, "api-1", RouteKind.ADMIN_CHANGE) == 403


def test_a_stated_key_wins_over_the_environment() -> None:
    os.environ["VLLM_API_KEY"] = "old"
    found = settings("--api-key", "new")
    assert answer(found, "new") is None
    assert answer(found, "old") == 401


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--host", "127.0.0.1"], None),
        (["--host", "localhost"], None),
        (["--host", "::1"], None),
        (["--uds", "/tmp/socket"], None),
        ([], 403),  # vLLM then listens to all
        (["--host", "0.0.0.0"], 403),
        (["--host", "10.0.0.1"], 403),
    ],
)
def test_changes_need_the_admin_key_where_others_can_reach_the_server(
    argv: list[str], status: int | None
) -> None:
    assert answer(settings(*argv), None, RouteKind.ADMIN_CHANGE) == status


@pytest.mark.parametrize(
    "argv",
    [
        ["--turn-seconds", "0"],
        ["--turn-seconds", "-1"],
        ["--turn-seconds", "nan"],
        ["--turn-seconds", "inf"],
        ["--turn-seconds", "soon"],
        ["--max-queue", "0"],
        ["--max-queue-per-adapter", "0"],
        ["--metrics-max-adapters", "-1"],
        ["--keep-versions", "0"],
    ],
    ids=" ".join,
)
def test_values_that_are_none_are_told_with_their_flag(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert argv[0] in capsys.readouterr().err


def test_keys_are_not_passed_on_to_vllm() -> None:
    own = read_own_flags(["base", "--api-key", "k1", "k2", "--admin-key", "k3", "--port", "1"])
    assert own.passed_on == ("base", "--port", "1")
    assert own.api_keys == ("k1", "k2")


def test_prompt_templates_are_by_name() -> None:
    chat = read_prompt_templates(["小李=Q: {instruction}\\n\\nA: ", "org/b=x=y {instruction}"])
    assert chat["小李"].prompt_text == "Q: {instruction}\\n\\nA: "
    assert chat["org/b"].prompt_text == "x=y {instruction}"


@pytest.mark.parametrize(
    "value", ["Human: {instruction}", "{instruction}=x", "=x", "name", "name=", "a=no slot"]
)
def test_a_prompt_template_that_is_none(value: str) -> None:
    with pytest.raises(BadSetting):
        read_prompt_templates([value])


def test_the_config_tells_what_was_stated() -> None:
    vllms = dict.fromkeys(
        (
            *("model", "served_model_name", "enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras"),
            *("kv_cache_memory_bytes", "gpu_memory_utilization", "enforce_eager"),
        ),
        UNSTATED,
    )
    argv = [
        "--adapters",
        "a",
        "--adapters",
        "x=b",
        "--no-watch",
        "--state-dir",
        "s",
        "--prompt-template",
        "x={instruction}",
    ]
    args = parsed(
        *argv, **{**vllms, "max_loras": 4, "served_model_name": "n"}, model_tag="tag", lora_modules=None
    )
    args.host = UNSTATED
    config = read_config(args, UNSTATED)
    assert config.adapters == ("a", "x=b") and config.base_model == "tag"
    assert not config.watch and config.wants_adapters and config.state_dir == Path("s")
    assert config.stated == {"max_loras": 4, "served_model_name": "n"}
    assert config.base_names == ("n",)
    assert set(config.chat) == {"x"} and not config.require_proof


def test_a_proof_is_required_by_a_flag_of_its_own() -> None:
    assert settings("--require-proof").require_proof and not settings().require_proof
