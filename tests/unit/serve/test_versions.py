"""The verbs on adapters: the same answers from a state folder and from a server, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.cli import main
from tests.adapter_server import AdapterServer
from tests.conftest import lora_tensors
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import StoreFailed
from vllm_lora_ext.inspection import Rules

MakeAdapter = Callable[..., Path]
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LORA_URL", "VLLM_LORA_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path: Path, base_folder: Path) -> Iterator[AdapterServer]:
    rules = Rules(read_base_model(str(base_folder)))
    with (
        Catalog(tmp_path / "state") as catalog,
        AdapterServer(catalog, rules).running() as server,
    ):
        yield server


@pytest.fixture(params=["disk", "server"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The flags that lead to a state folder, or to a server."""
    if request.param == "disk":
        (tmp_path / "state").mkdir()
        return ["--state-dir", str(tmp_path / "state")]
    return ["--url", request.getfixturevalue("server").url]


@pytest.fixture
def asked(where: list[str], capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb with `--json` and gives back its data."""

    def run(*argv: str) -> Any:
        capsys.readouterr()
        assert main([*argv, *where, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def two_versions(make_adapter: MakeAdapter, asked: Run) -> tuple[str, str]:
    """`xiaoli` with two versions; their digests, the live one last."""
    folder = make_adapter()
    first = asked("publish", str(folder))["version"]
    changed = make_adapter("changed", tensors={k: 2 * v for k, v in lora_tensors().items()})
    return first, asked("publish", str(changed), "--name", "xiaoli", "--replace")["version"]


@pytest.mark.parametrize("name", ["xiaoli", "小李", "org/name"])
def test_a_life_of_an_adapter(name: str, make_adapter: MakeAdapter, asked: Run) -> None:
    folder = str(make_adapter())
    published = asked("publish", folder, "--name", name)
    assert (published["id"], published["object"], published["rank"]) == (name, "adapter", 8)
    assert published["digest"].startswith(published["version"]) and len(published["version"]) == 12
    (listed,) = asked("ls")
    assert {**listed, "findings": []} == {**published, "findings": []}
    shown = asked("show", name)
    assert {key: shown[key] for key in ("id", "version", "admission")} == {
        key: published[key] for key in ("id", "version", "admission")
    }
    assert [(version["live"], version["source"] != "") for version in shown["versions"]] == [(True, True)]
    assert [event["what"] for event in shown["history"]] == ["publish"]
    assert shown["chat"] == {"template": None, "system_prompt": None, "stop": [], "sampling": {}}
    assert asked("rm", name) == [{"id": name, "object": "adapter", "deleted": True}]
    assert asked("ls") == []


def test_rolling_back_and_splitting_the_traffic(two_versions: tuple[str, str], asked: Run) -> None:
    first, second = two_versions
    assert asked("rollback", "xiaoli")["version"] == first
    assert asked("rollback", "xiaoli", "--to", second[:6])["version"] == second
    split = asked("traffic", "xiaoli", f"{first[:6]}=90", f"{second}=10")
    assert split["traffic"] == {first: 90, second: 10}
    assert asked("show", "xiaoli")["traffic"] == {first: 90, second: 10}
    assert asked("traffic", "xiaoli")["traffic"] == {}


def test_lines_for_people_are_data_on_stdout(
    two_versions: tuple[str, str], where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = two_versions

    def told(*argv: str) -> str:
        capsys.readouterr()
        assert main([*argv, *where]) == 0
        return capsys.readouterr().out

    assert told("rollback", "xiaoli") == f"xiaoli@{first}\n"
    assert (
        told("traffic", "xiaoli", f"{first}=90", f"{second}=10") == f"xiaoli@{first} 90\nxiaoli@{second} 10\n"
    )
    shown = told("show", "xiaoli")
    assert "90 %" in shown and "rollback" in shown and "xiaoli" in shown
    assert told("traffic", "xiaoli") == f"xiaoli@{first} 100\n"
    table = told("ls")
    assert all(word in table for word in ("xiaoli", first, "admitted"))
    assert told("rm", "xiaoli", "xiaoli") == "xiaoli\n"


def test_chat_settings_are_stated_with_an_adapter(
    make_adapter: MakeAdapter, tmp_path: Path, asked: Run
) -> None:
    folder, template = str(make_adapter()), tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    plain = asked("publish", folder)
    flags = ("--chat-template", str(template), "--system", "你是小李。", "--stop", "a", "--stop", "b\n")
    stated = asked("publish", folder, "--replace", *flags)
    assert stated["digest"] != plain["digest"] and stated["template"] == "trained"
    assert asked("show", "xiaoli")["chat"] == {
        "template": template.read_text(),
        "system_prompt": "你是小李。",
        "stop": ["a", "b\n"],
        "sampling": {},
    }


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["show", "nobody"], "'nobody'"),
        (["rollback", "nobody"], "'nobody'"),
        (["traffic", "nobody"], "'nobody'"),
        (["rm", "xiaoli", "nobody"], "'nobody'"),
        (["rollback", "xiaoli", "--to", "ffffffff"], "no version"),
        (["traffic", "xiaoli", "{first}=50"], "make 100"),
        (["traffic", "xiaoli", "{first}=150"], "make 100"),
        (["traffic", "xiaoli", "{first}=-1"], "DIGEST=PERCENT"),
        (["traffic", "xiaoli", "{first}"], "DIGEST=PERCENT"),
        (["traffic", "xiaoli", "{first}=1", "{first}=99"], "each once"),
    ],
)
def test_bad_input_changes_nothing(
    argv: list[str],
    told: str,
    two_versions: tuple[str, str],
    where: list[str],
    asked: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = asked("show", "xiaoli")
    assert main([*[word.format(first=two_versions[0]) for word in argv], *where]) == 2
    streams = capsys.readouterr()
    assert told in streams.err and streams.out == ""
    assert asked("show", "xiaoli") == before


def test_what_a_name_has_already_is_replaced_only_when_asked(
    make_adapter: MakeAdapter, where: list[str], asked: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    asked("publish", str(make_adapter()))
    other = make_adapter("other", tensors={k: 2 * v for k, v in lora_tensors().items()})
    assert main(["publish", str(other), "--name", "xiaoli", *where]) == 2
    assert "[adapter_exists]" in capsys.readouterr().err


def test_a_refused_adapter_is_told_with_every_finding(
    make_adapter: MakeAdapter, where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(make_adapter(use_dora=True, bias="all")), *where, "--json"]) == 2
    streams = capsys.readouterr()
    assert "bias" in streams.err and "use_dora" in streams.err and streams.out == ""


def test_a_folder_that_is_no_adapter(
    make_adapter: MakeAdapter, tmp_path: Path, where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter()
    for folder in (tmp_path / "adapters", tmp_path / "nowhere"):
        assert main(["publish", str(folder), *where]) == 2
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").touch()
    assert main(["publish", str(tmp_path / "pickle"), *where]) == 2
    assert "adapter_model.bin" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_ends_the_sending(
    make_adapter: MakeAdapter, server: AdapterServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter()
    (folder / "generation_config.json").mkdir()
    assert main(["publish", str(folder), "--url", server.url]) == 2
    assert "error: generation_config.json: " in capsys.readouterr().err
    assert server.catalog.names() == []


@pytest.mark.parametrize("name", ["", "../models", "x?y", "x/../../models", "a@b", "\x1b[31m", "x" * 65])
@pytest.mark.parametrize("verb", ["show", "rm", "rollback", "traffic"])
def test_what_is_no_name_is_never_asked_for(
    verb: str, name: str, server: AdapterServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, name, "--url", server.url]) == 2
    assert server.seen == [] and "\x1b" not in capsys.readouterr().err


def test_names_are_percent_encoded(make_adapter: MakeAdapter, server: AdapterServer) -> None:
    assert main(["publish", str(make_adapter()), "--name", "小李/v1", "--url", f"{server.url}/v1/"]) == 0
    assert server.seen == [("PUT", "/v1/adapters/%E5%B0%8F%E6%9D%8E/v1")]


def test_several_names_leave_together_or_not_at_all(make_adapter: MakeAdapter, server: AdapterServer) -> None:
    make_adapter()
    assert main(["publish", str(make_adapter("a")), "--url", server.url]) == 0
    assert main(["rm", "a", "b", "--url", server.url]) == 2
    assert server.catalog.names() == ["a"]


def test_the_live_table_is_a_servers(
    make_adapter: MakeAdapter, server: AdapterServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(make_adapter()), "--url", server.url]) == 0
    capsys.readouterr()
    for verb in (["ps"], ["ls", "--live"]):
        assert main([*verb, "--url", server.url]) == 0
        table = capsys.readouterr().out
        assert all(word in table for word in ("xiaoli", "slot", " 7 ", "2026-01-02T03:04:05", "12 ms"))
    assert main(["ps", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["requests"] == 7
    assert main(["ps", "--state-dir", str(tmp_path / "state")]) == 2
    assert "--url" in capsys.readouterr().err


def test_the_url_may_come_from_the_environment(
    server: AdapterServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_LORA_URL", server.url)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy is never asked for this machine
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("key", [None, "wrong", "ключ", "two words", "line\nbreak"])
def test_a_wrong_key(
    key: str | None,
    server: AdapterServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.admin_key = "right"
    flags = [] if key is None else ["--admin-key", key]
    assert main(["ls", "--url", server.url, *flags]) == 2
    told = capsys.readouterr().err
    assert "--admin-key" in told and "Traceback" not in told
    monkeypatch.setenv("VLLM_LORA_ADMIN_KEY", "right")
    assert main(["ls", "--url", server.url]) == 0


@pytest.mark.parametrize(
    ("status", "body", "code", "told"),
    [
        (404, b'{"detail":"Not Found"}', 1, "vllm-lora server"),  # FastAPI
        (404, b'{"error":{"message":"Not Found","type":"NotFoundError","code":404}}', 1, "vllm-lora server"),
        (404, b"<html>", 1, "vllm-lora server"),
        (404, b'{"error":{"message":"closed","code":"route_closed"}}', 1, "closed"),
        (200, b"<html>", 1, "vllm-lora server"),
        (200, b"[]", 1, "vllm-lora server"),
        (200, b"{}", 1, "vllm-lora server"),
        (200, b'{"object":"list","data":[{"id":"gpt"}]}', 1, "vllm-lora server"),
        (302, b"", 1, "vllm-lora server"),
        (200, b"[" * 100_000, 1, "vllm-lora server"),
        (400, b'{"error":{"message":"no \\u001b[31m good","code":"x"}}', 2, "good"),
        (
            403,
            b'{"error":{"message":"Start it with --admin-key","code":"admin_key_required"}}',
            2,
            "--admin-key",
        ),
        (409, b'{"error":{"message":"twins","code":"adapter_exists"}}', 2, "twins"),
        (
            422,
            b'{"error":{"message":"m","code":"adapter_refused","findings":[{"code":"c","item":"i"},3]}}',
            2,
            "[c] i",
        ),
        (429, b'{"error":{"message":"busy","code":"queue_full"}}', 1, "busy"),
        (500, b'{"error":{"message":"oops","code":"internal_error"}}', 1, "oops"),
        (507, b'{"error":{"message":"the disk is full","code":"store_failed"}}', 1, "the disk is full"),
    ],
)
def test_what_a_server_may_answer(
    status: int, body: bytes, code: int, told: str, server: AdapterServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = status, body
    for verb in (["ls"], ["show", "x"], ["rm", "x"], ["traffic", "x"], ["rollback", "x"]):
        assert main([*verb, "--url", server.url]) == code
        streams = capsys.readouterr()
        assert told in streams.err and streams.out == ""
        assert "\x1b" not in streams.err and "Traceback" not in streams.err


def test_a_full_disk_on_the_server(
    make_adapter: MakeAdapter, server: AdapterServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise StoreFailed("store", OSError(28, "no space"))

    server.fail = fail
    assert main(["publish", str(make_adapter()), "--url", server.url]) == 1
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb", [["ls"], ["ps"], ["show", "x"], ["rm", "x"], ["traffic", "x"], ["rollback", "x"]]
)
@pytest.mark.parametrize(
    ("url", "code"),
    [("http://127.0.0.1:9", 1), ("http://no.such.host.invalid", 1), ("127.0.0.1:8000", 2), ("ftp://x", 2)],
)
def test_nobody_there(verb: list[str], url: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--url", url]) == code
    told = capsys.readouterr().err
    assert ("vllm-lora serve" if code == 1 else "http://HOST:PORT") in told and "Traceback" not in told


def test_flags_of_a_state_folder_are_not_taken_for_a_server(
    make_adapter: MakeAdapter, server: AdapterServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make_adapter())
    for flags in (["--base-model", "x"], ["--allow", "x"], ["--keep-versions", "3"]):
        assert main(["publish", folder, "--url", server.url, *flags]) == 2
        assert f"{flags[0]}: " in capsys.readouterr().err
    assert main(["show", "xiaoli", "--verify", "--url", server.url]) == 2
    assert server.seen == []


def test_a_locked_state_folder_names_the_server(
    server: AdapterServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--state-dir", str(tmp_path / "state")]
    assert main(["rm", "x", *where]) == 2
    assert "in use by process" in capsys.readouterr().err
    with (tmp_path / "state" / "lock").open("a") as lock:
        lock.write(f"{server.url}\n")
    for verb in (["rm", "x"], ["rollback", "x"], ["traffic", "x"]):
        assert main([*verb, *where]) == 2
        assert f"--url {server.url}" in capsys.readouterr().err
    assert main(["ls", *where]) == 0


def test_no_state_folder_is_made_by_looking_for_one(tmp_path: Path) -> None:
    for verb in (["ls"], ["show", "x"], ["rm", "x"], ["rollback", "x"], ["traffic", "x"]):
        assert main([*verb, "--state-dir", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_show_tells_folders_and_names_apart(
    make_adapter: MakeAdapter,
    server: AdapterServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(make_adapter().parent)
    where = ["--url", server.url, "--json"]
    for folder in ("xiaoli", "./xiaoli", str(tmp_path / "adapters" / "xiaoli")):
        assert main(["show", folder, *where]) == 0
        assert len(json.loads(capsys.readouterr().out)["tensors"]) == 28
    assert main(["show", "./nowhere", *where]) == 2
    assert server.seen == []
    Path("plain").mkdir()
    assert main(["show", "plain", *where]) == 2
    assert server.seen == [("GET", "/v1/adapters/plain")]


def test_show_verifies_a_stored_version(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--state-dir", str(tmp_path / "state")]
    assert main(["publish", str(make_adapter()), *where, "--json"]) == 0
    digest = json.loads(capsys.readouterr().out)["digest"]
    assert main(["show", "xiaoli", "--verify", *where]) == 0
    weights = tmp_path / "state" / "store" / digest / "adapter_model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["show", "xiaoli", "--verify", *where]) == 1
    shutil.rmtree(weights.parent, ignore_errors=True)


def test_a_damaged_version_is_shown_as_refused(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--state-dir", str(tmp_path / "state"), "--json"]
    assert main(["publish", str(make_adapter()), *where]) == 0
    digest = json.loads(capsys.readouterr().out)["digest"]
    weights = tmp_path / "state" / "store" / digest / "adapter_model.safetensors"
    weights.parent.chmod(0o755)
    weights.unlink()
    assert main(["ls", *where]) == 0
    (adapter,) = json.loads(capsys.readouterr().out)
    assert (adapter["state"], adapter["findings"][0]["code"]) == ("refused", "version_damaged")
