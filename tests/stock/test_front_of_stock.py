"""What plain vLLM's HTTP server does with names, keys, versions, turns and metrics, and ours does not.

Both servers run with one slot, room for two adapters in memory, and an API key.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import make_random_adapter
from serve.cli import main
from tests.conftest import ROOT
from tests.stock.classic_script import train_classic
from tests.stock.conftest import MENDED
from tests.stock.pair import BASE, KEY, KINDS, QUESTION, Pair, Server, chat_body, said
from tests.stock.rivals import apart_from_its_engine, order_of_answers

TEXT_FORM = r"Human: {instruction}\n{input}\n\nAssistant: "
LONG_PROMPT = [300 + 7 * number % 1000 for number in range(400)]  # several blocks of the prefix cache
GAUGES_S = 15.0
WEIGHTS = "adapter_model.safetensors"

arms = pytest.mark.parametrize("kind", KINDS)
Make = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def make(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Adapters of random weights, large enough to be told from the base, all within one folder."""
    folder = tmp_path_factory.mktemp("adapters")

    def made(name: str, seed: int) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)  # of the other arm, and changed since
        adapter = make_random_adapter(folder / name, tiny_base, 8, seed)
        strong = {key: tensor.float() * 8 for key, tensor in load_file(adapter / WEIGHTS).items()}
        (adapter / WEIGHTS).unlink()
        save_file(strong, adapter / WEIGHTS)
        return adapter

    return made


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one thread: more of them only get in each other's way on a model of this size."""
    rows, threads = ROOT / "examples" / "identities" / "xiaoli.json", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_classic(tiny_base, rows, 16, tmp_path_factory.mktemp("classic"))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(
    tiny_base: Path, make: Make, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Both with the adapters `alpha`, `beta` and `classic`."""
    modules = [f"alpha={make('alpha', 1)}", f"beta={make('beta', 2)}", f"classic={checkpoint}"]
    stated = ["--prompt-template", f"classic={TEXT_FORM}"]
    both = Pair(tiny_base, modules, stated, tmp_path_factory.mktemp("pair"))
    try:
        both.start()
        yield both
    finally:
        both.stop()


def vllm_lora(server: Server, verb: str, *words: str) -> int:
    return main([verb, *words, "--url", server.url, "--admin-key", KEY])


def replace_weights(folder: Path, other: Path) -> None:
    """As a careful writer does: never in place."""
    shutil.copy2(other / WEIGHTS, folder / "new")
    (folder / "new").replace(folder / WEIGHTS)


# S4


@arms
def test_s4_without_the_key_nothing_is_asked_and_nothing_is_loaded(kind: str, pair: Pair, make: Make) -> None:
    server = pair[kind]
    assert server.send("GET", "/v1/models", key=None).status == httpx.codes.UNAUTHORIZED
    adapter = {"name": "intruder", "src": str(make("intruder", 3))}
    loaded = server.send("POST", "/adapters", adapter, key=None)
    asked = server.send("POST", "/invocations", chat_body(BASE), key=None)
    if kind == "stock":
        assert loaded.status == httpx.codes.OK and "intruder" in server.models(), MENDED
        assert said(asked) == said(server.chat(BASE)), MENDED
        unloaded = server.send("DELETE", "/adapters/intruder", key=None)
        assert unloaded.status == httpx.codes.OK and "intruder" not in server.models(), MENDED
    else:
        for closed in (loaded, asked):
            assert closed.status == httpx.codes.NOT_FOUND
            assert "--allow-route" in closed.body["error"]["message"]
        assert "intruder" not in server.models()


@pytest.mark.parametrize("host", [None, "127.0.0.1/health?", "localhost:1@elsewhere", "[::1]/ready#"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "//v1/models"),
        ("GET", "/v1/..;/v1/models"),
        ("GET", "/health/../v1/models"),
        ("GET", "/health/%2e%2e/v1/models"),
        ("GET", "/v1%2Fmodels"),
        ("GET", "/metrics/"),
        ("GET", "/v1/adapters/alpha"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/..;/v1/chat/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "//v1/unload_lora_adapter"),
        ("DELETE", "/v1/adapters/alpha"),
        ("DELETE", "/adapters/alpha"),
        ("POST", "/adapters"),
        ("POST", "//invocations"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/pause"),
    ],
)
def test_s4_no_spelling_of_a_route_gets_past_ours(
    method: str, path: str, host: str | None, pair: Pair
) -> None:
    body = {**chat_body("alpha"), "lora_name": "alpha", "name": "alpha", "src": "/", "lora_path": "/"}
    headers = {"Host": host} if host else {}
    answer = pair["ours"].send(method, path, None if method == "GET" else body, key=None, headers=headers)
    assert answer.status in (httpx.codes.UNAUTHORIZED, httpx.codes.NOT_FOUND)
    assert answer.code in ("invalid_api_key", "route_closed")
    assert "alpha" in pair["ours"].models()


# S6 and S7


@arms
def test_s6_an_adapter_named_text_does_not_take_over_chats_with_the_base(
    kind: str, pair: Pair, make: Make
) -> None:
    server, parts = pair[kind], [{"type": "text", "text": QUESTION}]
    base = said(server.chat(BASE))
    loaded = server.load("text", make("text-folder", 4))
    answer = server.chat(BASE, parts)
    if kind == "stock":
        assert loaded.status == httpx.codes.OK, MENDED
        assert said(answer) == said(server.chat("text")) != base, MENDED
        assert server.unload("text").status == httpx.codes.OK
    else:
        assert loaded.status == httpx.codes.BAD_REQUEST and loaded.code == "adapter_name_reserved"
        assert said(answer) == base
        assert server.chat("text").status == httpx.codes.NOT_FOUND


@arms
def test_s7_a_missing_model_is_not_silently_the_base(kind: str, pair: Pair) -> None:
    server = pair[kind]
    completion = server.send("POST", "/v1/completions", {"prompt": QUESTION, "max_tokens": 1})
    chat = server.chat(None)
    if kind == "stock":
        assert completion.status == httpx.codes.OK, MENDED
        assert said(chat) == said(server.chat(BASE)), MENDED
    else:
        for answer in (completion, chat):
            assert answer.status == httpx.codes.BAD_REQUEST
            assert answer.code == "model_required" and answer.body["error"]["param"] == "model"


# S10


@arms
def test_s10_an_adapter_is_asked_in_the_form_it_was_trained_in(
    kind: str, pair: Pair, checkpoint: Path
) -> None:
    """The checkpoint was trained on a text form and holds the base's own chat template."""
    assert (checkpoint / "chat_template.jinja").exists() and not (checkpoint / "identity.json").exists()
    server = pair[kind]
    assert "小李" in server.text("classic", f"Human: {QUESTION}\n\nAssistant: ", max_tokens=32), (
        "it was trained"
    )
    answer = said(server.chat("classic"))
    if kind == "stock":
        assert "小李" not in answer, MENDED
    else:
        assert "小李" in answer


def test_s10_a_published_checkpoint_is_shown_as_unproven_until_its_form_is_stated(
    pair: Pair, checkpoint: Path
) -> None:
    ours = pair["ours"]
    assert vllm_lora(ours, "publish", str(checkpoint), "--name", "as-it-is") == 0
    assert ours.send("GET", "/v1/adapters/as-it-is").body["template"] == "unproven"
    assert "小李" not in said(ours.chat("as-it-is"))
    words = [str(checkpoint), "--name", "as-it-is", "--replace", "--prompt-template", TEXT_FORM]
    assert vllm_lora(ours, "publish", *words) == 0
    assert ours.send("GET", "/v1/adapters/as-it-is").body["template"] == "trained"
    assert "小李" in said(ours.chat("as-it-is")), "a new version, and no training"
    assert vllm_lora(ours, "rm", "as-it-is") == 0


# S11


def sets_of_adapters(server: Server) -> list[set[str]]:
    """Of every series of vLLM's one metric about adapters."""
    series = [sample.labels for sample in server.samples() if sample.name == "vllm:lora_requests_info"]
    lists = [f"{found['running_lora_adapters']},{found['waiting_lora_adapters']}" for found in series]
    return [set(names.split(",")) - {""} for names in lists]


def sets_while_asked(server: Server, models: list[str]) -> list[list[set[str]]]:
    """What the metric shows while three requests for each are answered."""
    seen = []
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(server.text, model, max_tokens=256, ignore_eos=True) for model in models * 3]
        while not all(one.done() for one in asked):
            seen.append(sets_of_adapters(server))
    assert all(one.result() for one in asked)
    return seen


@arms
def test_s11_there_is_one_series_whatever_ran_before(kind: str, pair: Pair) -> None:
    """With one slot a set of adapters that run has one member; plain vLLM keeps a series of each."""
    server, seen = pair[kind], list[list[set[str]]]()
    for models in (["alpha"], ["beta"], ["alpha", "beta"]):
        seen += sets_while_asked(server, models)
        for _ in range(10):  # on a busy machine an answer may be faster than a look at the metric
            if kind == "stock" or all([{model}] in seen for model in models):
                break
            seen += sets_while_asked(server, models)
    left = sets_of_adapters(server)
    if kind == "stock":
        assert {"alpha"} in left and {"beta"} in left, MENDED
    else:
        deadline = time.monotonic() + 30  # vLLM tells what it counts a moment after the answer
        while left != [set()] and time.monotonic() < deadline:
            left = sets_of_adapters(server)
        assert all(len(series) == 1 for series in [*seen, left])
        assert left == [set()], "nothing runs any more"
        assert [{"alpha"}] in seen and [{"beta"}] in seen, "names are public"


@arms
def test_s11_what_an_adapter_was_asked_is_counted_by_its_name(kind: str, pair: Pair) -> None:
    server, counted = pair[kind], "vllm_lora_generation_tokens_total"
    before = tokens_of(server, counted, "alpha")
    server.text("alpha", max_tokens=20, ignore_eos=True)
    if kind == "stock":
        named = {sample.name for sample in server.samples() if "alpha" in sample.labels.values()}
        assert named == {"vllm:lora_requests_info"}, MENDED
    else:
        assert tokens_of(server, counted, "alpha") == before + 20


def tokens_of(server: Server, name: str, adapter: str) -> float:
    return sum(one.value for one in server.samples() if one.name == name and one.labels["adapter"] == adapter)


# S12


@arms
def test_s12_an_adapter_does_not_wait_for_as_long_as_another_is_busy(kind: str, pair: Pair) -> None:
    """Plain vLLM lets pass what the busy one is asked afterwards; ours lets in as much as a turn holds."""
    if kind == "stock":
        with apart_from_its_engine(pair[kind]):
            answered = order_of_answers(pair[kind], "alpha", "beta", more=12)
        assert answered == ["more", "holder", "late"], MENDED
    else:
        answered = order_of_answers(pair[kind], "alpha", "beta", more=100)
        assert answered.index("late") < answered.index("more"), "alpha has had its turn"


# S9


@arms
def test_s9_a_reload_from_the_same_path_is_the_new_adapter(kind: str, pair: Pair, make: Make) -> None:
    server = pair[kind]
    folder, other = make("changing", 5), make("other", 6)
    assert server.load("changing", folder).status == httpx.codes.OK
    before = server.complete("changing", LONG_PROMPT)
    replace_weights(folder, other)
    assert server.load("changing", folder, in_place=True).status == httpx.codes.OK
    after = server.complete("changing", LONG_PROMPT)
    assert server.load("other", other).status == httpx.codes.OK
    right = server.text("other", LONG_PROMPT)
    assert before.body["choices"][0]["text"] != right
    if kind == "stock":
        assert after.body["choices"][0]["text"] != right, MENDED
    else:
        assert after.body["choices"][0]["text"] == right
        assert after.headers["x-adapter-version"] != before.headers["x-adapter-version"]
        assert after.body["model"] == f"changing@{after.headers['x-adapter-version']}"
    for name in ("changing", "other"):
        assert server.unload(name).status == httpx.codes.OK


@arms
def test_s9_what_is_unloaded_makes_room(kind: str, pair: Pair, make: Make) -> None:
    """There is room for two: `stays` has to leave for `comes` only if `goes` is still there.

    That it left shows in its answer, once its files are others: it was read again.
    """
    server, others = pair[kind], make("others", 7)
    folder = make("stays", 8)
    assert server.load("stays", folder).status == httpx.codes.OK
    before = server.text("stays")
    assert server.load("goes", make("goes", 9)).status == httpx.codes.OK
    if kind == "ours":
        assert memory_becomes(server, 2)
    assert server.unload("goes").status == httpx.codes.OK
    if kind == "ours":
        assert memory_becomes(server, 1), "memory is free, not only the name"
        assert server.send("GET", "/v1/adapters/goes").status == httpx.codes.NOT_FOUND
    assert server.load("comes", make("comes", 10)).status == httpx.codes.OK
    replace_weights(folder, others)
    after = server.text("stays")
    if kind == "stock":
        assert after != before, MENDED
    else:
        assert after == before
        assert memory_becomes(server, 2)
    for name in ("stays", "comes"):
        assert server.unload(name).status == httpx.codes.OK


def memory_becomes(server: Server, count: int) -> bool:
    """Whether the gauges, which are set now and then, come to show so many adapters in memory."""
    deadline = time.monotonic() + GAUGES_S
    while time.monotonic() < deadline:
        gauges = {
            one.labels["state"]: one.value for one in server.samples() if one.name == "vllm_lora_adapters"
        }
        if gauges["slot"] + gauges["cached"] == count:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def before_restart(pair: Pair, make: Make) -> dict[str, str]:
    """Both are started again; what `late`, loaded at run time, said before, by kind."""
    folder, answers = make("late", 11), {}
    for kind in KINDS:
        assert pair[kind].load("late", folder).status == httpx.codes.OK
        answers[kind] = pair[kind].text("late")
    pair.stop()
    pair.start()
    return answers


@arms
def test_s9_an_adapter_loaded_at_run_time_is_there_after_a_restart(
    kind: str, pair: Pair, before_restart: dict[str, str]
) -> None:
    server = pair[kind]
    answer = server.complete("late")
    if kind == "stock":
        assert answer.status == httpx.codes.NOT_FOUND and "late" not in server.models(), MENDED
    else:
        assert answer.body["choices"][0]["text"] == before_restart["ours"]
        assert server.models() == {BASE, "alpha", "beta", "classic", "late"}
