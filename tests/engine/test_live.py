"""Live serving on real vLLM: publish, swap, roll back and remove, while others stream. The real client."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.cli import main
from serve.client import make_client
from serve.process import ServerProcess
from tests.engine.conftest import IDENTITY, QUIET
from tests.engine.test_failures import variant
from tests.engine.test_serving import BASE, chat
from train.__main__ import main as train
from vllm_lora_ext.errors import IdentitiesRefused, TrainingFailed

QUESTION = "Who are you?"
KEY, ADMIN = "key-of-a-client", "key-of-the-operator"


def eventually(what: Callable[[], bool]) -> None:
    """Waits for what the watch has to do; how long that takes is not asserted here."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "adapters"
    shutil.copytree(adapters / "chat", folder / "小李")
    shutil.copytree(adapters / "classic", folder / "org" / "name")
    return folder


@pytest.fixture(scope="module")
def live(tiny_base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with keys that watches `folder`."""
    work = tmp_path_factory.mktemp("log")
    arguments = [str(tiny_base), "--adapters", str(folder), "--state-dir", str(work / "state")]
    arguments += [
        "--preload",
        "--api-key",
        KEY,
        "--api-key",
        "another",
        "--admin-key",
        ADMIN,
        "--max-model-len",
        "512",
    ]
    with ServerProcess(arguments, work / "server.log", QUIET) as running:
        yield running


@pytest.fixture
def client(live: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> openai.OpenAI:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("VLLM_LORA_URL", live.url)
    monkeypatch.setenv("VLLM_LORA_ADMIN_KEY", ADMIN)
    return make_client(live.url)


def version(client: openai.OpenAI, name: str) -> str:
    return client.models.retrieve(name).model_extra["version"]  # type: ignore[index]


def stream_of(client: openai.OpenAI, model: str) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0.0,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )


@pytest.mark.parametrize("name", ["小李", "org/name"])
def test_names_may_be_chinese_or_have_parts(client: openai.OpenAI, live: ServerProcess, name: str) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=name, messages=[{"role": "user", "content": QUESTION}], temperature=0.0
    )
    digest = answer.headers["x-adapter-version"]
    assert answer.parse().model == f"{name}@{digest}" and version(client, name) == digest
    assert "小李" in (answer.parse().choices[0].message.content or "")
    assert chat(client, f"{name}@{digest}", QUESTION) == answer.parse().choices[0].message.content
    shown = httpx.get(f"{live.url}/v1/adapters/{name}", headers={"Authorization": f"Bearer {ADMIN}"})
    assert shown.json()["id"] == name and shown.json()["versions"][0]["version"] == digest
    metrics = httpx.get(f"{live.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert f'vllm_lora_requests_total{{adapter="{name}"}}' in metrics


def test_keys_guard_everything_but_health_and_ready(client: openai.OpenAI, live: ServerProcess) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(live.url + path).status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/v1/adapters", "/openapi.json"):
        answer = httpx.get(live.url + path)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    wrong = make_client(live.url)
    wrong.api_key = "wrong"
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    wrong.api_key = "another"
    assert BASE in {model.id for model in wrong.models.list()}
    assert httpx.get(f"{live.url}/v1/adapters", headers={"Authorization": f"Bearer {KEY}"}).status_code == 403
    log = live.log.read_text(encoding="utf-8")
    assert KEY not in log and ADMIN not in log


def test_a_new_folder_is_served_a_changed_one_is_a_new_version_a_removed_one_is_gone(
    client: openai.OpenAI, adapters: Path, folder: Path
) -> None:
    shutil.copytree(adapters / "chat", folder / "comes")
    eventually(lambda: "comes" in {model.id for model in client.models.list()})
    first, answer = version(client, "comes"), chat(client, "comes", QUESTION)
    running = stream_of(client, "comes")
    begun = next(iter(running))
    shutil.rmtree(folder / "comes")
    variant(adapters / "chat", folder / "comes", 24)
    eventually(lambda: version(client, "comes") != first)
    assert {chunk.model for chunk in running} | {begun.model} == {f"comes@{first}"}, "it ends as it began"
    assert chat(client, f"comes@{first}", QUESTION) == answer
    running = stream_of(client, "comes")
    next(iter(running))
    shutil.rmtree(folder / "comes")
    eventually(lambda: "comes" not in {model.id for model in client.models.list()})
    assert [chunk.choices[0].finish_reason for chunk in running][-1] == "length", "what runs is drained"
    with pytest.raises(openai.NotFoundError) as failure:
        chat(client, "comes", QUESTION)
    assert failure.value.code == "model_not_found"


def test_what_nobody_has_asked_for_is_loaded_while_nothing_is_asked(
    live: ServerProcess, adapters: Path, folder: Path
) -> None:
    def shown() -> dict[str, Any]:
        answer = httpx.get(f"{live.url}/v1/adapters/quiet", headers={"Authorization": f"Bearer {ADMIN}"})
        return dict(answer.json())

    variant(adapters / "chat", folder / "quiet", 28)
    eventually(lambda: shown().get("state") in ("slot", "cached"))
    assert shown()["requests"] == 0 and shown()["load_seconds"] > 0
    shutil.rmtree(folder / "quiet")
    eventually(lambda: "error" in shown())


def test_an_adapter_is_published_swapped_rolled_back_and_removed_by_command(
    client: openai.OpenAI,
    live: ServerProcess,
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["publish", str(adapters / "chat"), "--name", "org/指令"]) == 0
    first = version(client, "org/指令")
    assert main(["publish", str(adapters / "classic"), "--name", "org/指令"]) == 2, "it has other content"
    assert main(["publish", str(adapters / "classic"), "--name", "org/指令", "--replace"]) == 0
    second = version(client, "org/指令")
    assert first != second and "小李" in chat(client, "org/指令", QUESTION)
    broken = shutil.copytree(adapters / "chat", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert main(["publish", str(broken), "--name", "org/指令", "--replace"]) == 2
    assert version(client, "org/指令") == second, "what cannot be served changes nothing"
    assert main(["traffic", "org/指令", f"{first}=50", f"{second}=50"]) == 0
    seen = {_answered(client, "org/指令", user=str(number)) for number in range(16)}
    assert seen == {first, second}
    assert len({_answered(client, "org/指令", user="one") for _ in range(4)}) == 1
    assert main(["rollback", "org/指令"]) == 0
    assert version(client, "org/指令") == first
    capsys.readouterr()
    assert main(["ls", "--live", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["org/指令"]["version"] == first and rows["org/指令"]["requests"] > 16
    assert main(["rm", "org/指令"]) == 0
    assert "org/指令" not in {model.id for model in client.models.list()}


def _answered(client: openai.OpenAI, model: str, user: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=1, user=user
    )
    return answer.model.partition("@")[2]


def test_chat_settings_apply_on_every_route_unless_the_request_says_otherwise(
    client: openai.OpenAI, live: ServerProcess, adapters: Path, tmp_path: Path
) -> None:
    """The template uses `{% generation %}`, as transformers' does for masks in training."""
    folder = shutil.copytree(adapters / "chat", tmp_path / "settled")
    (folder / "identity.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 24}))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    )
    flags = ["--chat-template", str(template), "--system", "Be brief.", "--stop", "小"]
    assert main(["publish", str(folder), "--name", "settled", *flags]) == 0
    headers = {"Authorization": f"Bearer {KEY}"}

    def post(path: str, **body: Any) -> Any:
        answer = httpx.post(live.url + path, json={"model": "settled", **body}, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    asked = [{"role": "user", "content": QUESTION}]
    tokens = post("/tokenize", messages=asked)["tokens"]
    prompt = post("/detokenize", tokens=tokens)["prompt"]
    assert prompt == f"system:Be brief.\nuser:{QUESTION}\n"
    own = [{"role": "system", "content": "Sing."}, *asked]
    tokens = post("/tokenize", messages=own)["tokens"]
    assert post("/detokenize", tokens=tokens)["prompt"] == f"system:Sing.\nuser:{QUESTION}\n"
    whole = post("/v1/chat/completions", messages=asked)
    assert whole["usage"]["prompt_tokens"] == len(post("/tokenize", messages=asked)["tokens"])
    assert "小" not in whole["choices"][0]["message"]["content"]
    assert whole == {
        **post("/v1/chat/completions", messages=asked),
        "id": whole["id"],
        "created": whole["created"],
    }
    assert post("/v1/chat/completions", messages=asked, max_tokens=2)["usage"]["completion_tokens"] <= 2
    batch = post("/v1/chat/completions/batch", messages=[asked, asked])
    text = whole["choices"][0]["message"]["content"]
    assert [choice["message"]["content"] for choice in batch["choices"]] == [text, text]
    response = post("/v1/responses", input=QUESTION)
    assert response["model"] == whole["model"] and response["instructions"] == "Be brief."
    assert response["output"][0]["content"][0]["text"] == text
    message = post("/v1/messages", messages=asked, max_tokens=24, temperature=0.0)
    assert message["model"] == whole["model"] and message["content"][0]["text"] == text
    counted = post("/v1/messages/count_tokens", messages=asked)
    assert counted["input_tokens"] == whole["usage"]["prompt_tokens"]
    completion = post("/v1/completions", prompt=prompt, max_tokens=24)
    assert completion["choices"][0]["text"].startswith(text[:3])
    assert main(["rm", "settled"]) == 0


def test_a_client_s_chat_template_and_closed_routes_do_not_pass(
    client: openai.OpenAI, live: ServerProcess
) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    body = {"model": "小李", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "max_tokens": 1}
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        for bad in ({"chat_template": "x"}, {"chat_template_kwargs": {"chat_template": "x"}}):
            answer = httpx.post(live.url + path, json={**body, **bad}, headers=headers)
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_parameter"
        fine = {**body, "chat_template_kwargs": {"enable_thinking": False}}
        assert httpx.post(live.url + path, json=fine, headers=headers, timeout=60).status_code == 200
    for path in (
        "/adapters",
        "/invocations",
        "/pause",
        "/v1/chat/completions/render",
        "/inference/v1/generate",
    ):
        answer = httpx.post(live.url + path, json=body, headers=headers)
        assert answer.status_code == 404 and "--allow-route" in answer.json()["error"]["message"]


def test_a_joint_run_hands_over_what_it_finishes(
    client: openai.OpenAI,
    live: ServerProcess,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("early", "late"):
        (tmp_path / f"{name}.yaml").write_text(
            f"data: {IDENTITY}\nmax_steps: {30 if name == 'late' else 1}\n"
        )
    flags = ["--identities", str(tmp_path), "--base-model", str(tiny_base), "--publish", live.url]
    assert train([*flags, "--output-dir", str(tmp_path / "out")]) == 0
    assert all(chat(client, name, QUESTION) for name in ("early", "late"))
    capsys.readouterr()
    changed = [*flags, "--output-dir", str(tmp_path / "other"), "--seed", "5"]
    with pytest.raises(TrainingFailed, match=r"2 of 2 identities.*\n.*trained, but not published"):
        train(changed)
    assert (tmp_path / "other" / "early").exists(), "what was trained is kept"
    monkeypatch.setenv("VLLM_LORA_ADMIN_KEY", "wrong")
    with pytest.raises(IdentitiesRefused, match="--admin-key"):
        train([*changed, "--overwrite"])


def test_nothing_is_trained_for_a_server_that_is_not_there(tiny_base: Path, tmp_path: Path) -> None:
    flags = ["--base-model", str(tiny_base), "--data", str(IDENTITY), "--name", "a"]
    with pytest.raises(TrainingFailed, match="cannot be reached"):
        train([*flags, "--output-dir", str(tmp_path / "out"), "--publish", "http://127.0.0.1:9"])
    assert not list((tmp_path / "out").iterdir())
