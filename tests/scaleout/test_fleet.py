"""A fleet of two real replicas: one answer everywhere, affinity, and the loss of a replica under load."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil

from serve.admin_client import ServerAdapters
from tests.scaleout.conftest import ADAPTERS, Child, Fleet, make_adapter
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import AdapterExists, AdapterUnknown
from vllm_lora_ext.sources import AdapterSource

_LOADS = re.compile(r"^vllm_lora_adapter_load_seconds_count\{.*\} (\S+)$", re.MULTILINE)
NAMES = [f"a{number:02}" for number in range(ADAPTERS)]


def ask(client: httpx2.Client, model: str, tokens: int = 2, **more: object) -> httpx2.Response:
    body = {"model": model, "prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body | more)


def loads(fleet: Fleet) -> float:
    """Adapters that were brought into memory so far, on all replicas together."""
    with fleet.client() as client:
        return sum(float(count) for count in _LOADS.findall(client.get("/metrics").text))


def test_it_answers_as_one_server_does(fleet: Fleet) -> None:
    with fleet.client() as client:
        models = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert models == ["tiny-base", *NAMES]
        answer = ask(client, "a03")
        assert answer.status_code == 200
        assert answer.json()["model"] == f"a03@{answer.headers['X-Adapter-Version']}"
        assert client.get("/v1/models/a03").json()["version"] == answer.headers["X-Adapter-Version"]
        unknown = ask(client, "a99")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert client.post("/v1/files").json()["error"]["code"] == "route_closed"
        assert client.post("/v1/completions", content=b"{").json()["error"]["code"] == "invalid_json"
        with client.stream(
            "POST",
            "/v1/completions",
            json={
                "model": "a04",
                "prompt": "hello",
                "max_tokens": 5,
                "stream": True,
                "ignore_eos": True,
            },
        ) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert lines[-1] == "data: [DONE]"
        assert len(lines) == 6
        page = client.get("/metrics").text
        assert len(set(re.findall(r'replica="(\w+)"', page))) == 2
        rows = {row["id"]: row for row in client.get("/v1/adapters").json()["data"]}
        assert rows["a03"]["requests"] == 1


def test_the_base_goes_everywhere_and_a_version_stays(fleet: Fleet) -> None:
    with fleet.client() as client:
        replicas = [ask(client, "tiny-base").headers["X-Replica"] for _ in range(6)]
        assert len(set(replicas)) == 2
        for name in NAMES[:4]:
            assert len({ask(client, name).headers["X-Replica"] for _ in range(4)}) == 1
        assert len({ask(client, name).headers["X-Replica"] for name in NAMES}) == 2


def test_a_change_is_seen_everywhere_once_it_is_answered(
    fleet: Fleet, tiny_base: Path, tmp_path: Path
) -> None:
    admin = ServerAdapters(fleet.url)
    first = AdapterSource("newcomer", str(make_adapter(tmp_path / "first", tiny_base, 100)))
    second = AdapterSource("newcomer", str(make_adapter(tmp_path / "second", tiny_base, 101)))
    children = [child.url for child in fleet.children()]
    assert len(children) == 2

    def versions() -> set[str]:
        with httpx2.Client(trust_env=False) as client:
            answers = [client.get(f"{url}/v1/models/newcomer") for url in children]
        return {str(answer.json().get("version")) for answer in answers}

    try:
        for source in (first, second):
            published = admin.publish(source, True, ChatOverride())
            assert versions() == {published["version"]}
        before = admin.rollback("newcomer", None)
        assert versions() == {before["version"]}
        split = admin.traffic("newcomer", {before["version"]: 50, published["version"]: 50})
        assert len(split["traffic"]) == 2
        admin.remove(["newcomer"])
        assert versions() == {"None"}
        for error, change in (
            (AdapterUnknown, lambda: admin.rollback("newcomer", None)),
            (AdapterExists, lambda: admin.publish(AdapterSource("a01", first.path), False, ChatOverride())),
        ):
            try:
                change()
            except error:
                continue
            raise AssertionError(f"no {error.__name__}")
    finally:
        admin.close()


def test_a_folder_that_comes_is_served_by_all(fleet: Fleet, tiny_base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "dropped", tiny_base, 200).rename(fleet.adapters / "dropped")
    deadline = time.monotonic() + 30
    for child in fleet.children():
        with httpx2.Client(base_url=child.url, trust_env=False) as client:
            while client.get("/v1/models/dropped").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_requests_meet_their_adapter_in_memory_more_often_than_with_random_routing(fleet: Fleet) -> None:
    """Both in turns over the same replicas: ours through the gateway, random ones straight to the servers."""
    chance = random.Random(7)
    requests = [chance.choice(NAMES) for _ in range(120)]
    servers = [httpx2.Client(base_url=child.url, trust_env=False, timeout=60) for child in fleet.children()]
    cold = {}
    with fleet.client() as client:
        for name in NAMES:  # so that nothing is cold for want of a first request
            assert ask(client, name).status_code == 200
        for policy in ("ours", "random", "ours again", "random again"):
            before = loads(fleet)
            for name in requests:
                way = client if policy.startswith("ours") else chance.choice(servers)
                assert ask(way, name).status_code == 200
            cold[policy] = loads(fleet) - before
    for server in servers:
        server.close()
    print("cold loads of 120 requests:", cold)
    assert cold["ours again"] < 0.5 * min(cold["random"], cold["random again"])


def test_a_server_that_is_killed_loses_nothing_that_had_not_begun(fleet: Fleet) -> None:
    with fleet.client() as client:
        place = {name: ask(client, name).headers["X-Replica"] for name in NAMES}
    streams = [
        name
        for replica in set(place.values())
        for name in [name for name in NAMES if place[name] == replica][:2]
    ]
    assert len(streams) == 4
    victim, killed, outcomes = fleet.children()[0], threading.Event(), list[tuple[str, str]]()
    under_way = set[str]()

    def stream(name: str) -> None:
        with fleet.client() as client:
            while not killed.is_set():
                outcomes.append(("stream", streamed(client, name, 480, lambda: under_way.add(name))))
                under_way.discard(name)

    def whole(name: str) -> None:
        with fleet.client() as client:
            while not killed.is_set():
                outcomes.append(("whole", str(ask(client, name, 60).status_code)))

    with ThreadPoolExecutor(10) as pool:
        working = [pool.submit(stream, name) for name in streams]
        working += [pool.submit(whole, name) for name in NAMES[:6]]
        deadline = time.monotonic() + 120
        while len(under_way) < 4:  # whichever replica it is, streams have begun on it
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        time.sleep(1.0)
        killed.set()
    for work in working:
        work.result()
    counts = Counter(outcomes)
    print("outcomes of a kill:", dict(counts))
    assert set(counts) == {("stream", "whole"), ("stream", "error event"), ("whole", "200")}
    assert counts["stream", "error event"] <= 2, "only those of the replica that was killed"
    started_at = back_again(fleet, victim, killed_at)
    print(
        f"killed; a new server after {started_at:.1f} s, an answer after {time.monotonic() - killed_at:.0f} s"
    )


def back_again(fleet: Fleet, victim: Child, killed_at: float) -> float:
    """Wait until two replicas answer; seconds until the new one's server was started."""
    while len([child for child in fleet.children() if child.pid != victim.pid]) < 2:
        assert time.monotonic() < killed_at + 60, "no new replica"
        time.sleep(0.1)
    started_at = time.monotonic() - killed_at
    with fleet.client() as client:
        while len(set(re.findall(r'replica="(\w+)"', client.get("/metrics").text))) < 2:
            assert time.monotonic() < killed_at + 240, "the new replica does not answer"
            time.sleep(0.5)
    return started_at


def streamed(
    client: httpx2.Client, name: str, tokens: int, begun: Callable[[], object] = lambda: None
) -> str:
    """How a stream ended; `begun` is called with its first event."""
    body = {"model": name, "prompt": "hello", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    lines = []
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        for line in answer.iter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
                if len(lines) == 1:
                    begun()
    if any("error" in json.loads(line) for line in lines if line != "[DONE]"):
        return "error event"
    return "whole" if lines[-1:] == ["[DONE]"] else f"cut after {len(lines)}"


def test_a_load_test_finds_no_wrong_answer_while_an_actor_is_killed(fleet: Fleet, tmp_path: Path) -> None:
    """The actor's server ends with it, and what the load test sees lost are streams that had begun."""
    victim, output = fleet.children()[0], tmp_path / "result"
    flags = [
        *("--url", fleet.url, "--models", *NAMES[:6], "--base-share", "0", "--check", "--check-prompts", "1"),
        *("--request-rate", "4", "--num-prompts", "60", "--output-len", "24", "--output", str(output)),
    ]
    command = [sys.executable, "-P", "-m", "vllm_lora_ext", "loadtest", *flags]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    server = psutil.Process(victim.pid)
    asked = sum_of_requests(fleet)
    while sum_of_requests(fleet) < asked + 25:  # what the answers are alone, the warm-up, some of the load
        assert running.poll() is None, running.communicate()
        time.sleep(0.2)
    os.kill(victim.actor_pid, signal.SIGKILL)
    killed_at = time.monotonic()
    server.wait(10)
    _, said = running.communicate(timeout=180)
    assert (output / "results.json").exists(), said
    (run,) = json.loads((output / "results.json").read_text())["runs"]
    with (output / "requests.csv").open(newline="") as file:
        errors = Counter(row["error"] for row in csv.DictReader(file) if row["phase"] == "load")
    print("under the load test:", dict(errors), "compared", run["check"]["compared"])
    assert run["check"]["wrong"] == []
    assert run["check"]["compared"] + sum(errors.values()) - errors[""] == 60
    assert errors[""] >= 60 - 8, "more are lost than were being streamed"
    back_again(fleet, victim, killed_at)


def sum_of_requests(fleet: Fleet) -> int:
    """Requests for adapters that the fleet has accepted so far."""
    with fleet.client() as client:
        return sum(row["requests"] for row in client.get("/v1/adapters").json()["data"])


def test_without_its_controller_the_fleet_goes_on_and_the_next_one_takes_changes(
    fleet: Fleet, tiny_base: Path, tmp_path: Path
) -> None:
    raylet = psutil.Process(fleet.children()[0].actor_pid).parent()
    assert raylet is not None
    (controller,) = [one for one in raylet.children() if "vllm-lora:controller" in " ".join(one.cmdline())]
    controller.kill()
    killed_at = time.monotonic()
    with fleet.client() as client:
        while time.monotonic() < killed_at + 12:  # longer than replicas wait for one that is there
            assert ask(client, "a05").status_code == 200
            time.sleep(0.2)
    admin = ServerAdapters(fleet.url)
    source = AdapterSource("later", str(make_adapter(tmp_path / "later", tiny_base, 300)))
    published = admin.publish(source, False, ChatOverride())
    admin.close()
    print(f"published {time.monotonic() - killed_at:.0f} s after the controller was killed")
    for child in fleet.children():
        with httpx2.Client(base_url=child.url, trust_env=False) as client:
            assert client.get("/v1/models/later").json()["version"] == published["version"]
