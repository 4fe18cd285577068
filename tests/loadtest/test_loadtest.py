"""The command as people use it: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from serve.cli import main
from serve.loadtest.known_server import KnownAnswer, KnownServer
from serve.loadtest.own_cost import ClientLimit, remember_limit
from tests.loadtest.conftest import ADAPTERS, CARDS, Serve, identity_answer, logprob

FILES = {"results.json", "requests.csv", "report.html", "ttft.png", "popularity.png", "timeline.png"}
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def known_limit() -> None:
    """No test waits for a calibration."""
    for processes in (1, 2):
        remember_limit(ClientLimit(1000.0, 2.0, processes, "nothing"))


def loadtest(server: KnownServer | str, *flags: str | Path) -> int:
    url = server if isinstance(server, str) else server.url
    return main(["loadtest", "--url", url, *map(str, flags)])


def test_the_table_has_a_row_for_each_model_and_for_the_whole(serve: Serve, capsys: Captured) -> None:
    assert loadtest(serve(), "--num-prompts", "40", "--goodput", "ttft:1000") == 0
    out = capsys.readouterr().out
    for word in (*ADAPTERS, "base model (base)", "adapters", "cold", "warm", "all", "good/s", "Jain index"):
        assert word in out
    assert "vllm bench serve" in out and "ms of CPU per request" in out


def test_json_is_the_only_thing_on_stdout(serve: Serve, capsys: Captured) -> None:
    assert loadtest(serve(), "--num-prompts", "20", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    (run,) = report["runs"]
    assert run["figures"]["whole"]["completed"] == 20
    assert {row["name"] for row in run["figures"]["models"]} <= {"base", *ADAPTERS}
    assert report["machine"]["cores"] and report["settings"]["seed"] == 0


def test_the_output_folder_holds_all_of_it(serve: Serve, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "out" / "first"
    assert loadtest(serve(), "--num-prompts", "24", "--check", "--output", folder) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    rows = list(csv.DictReader((folder / "requests.csv").read_text().splitlines()))
    assert [row["phase"] for row in rows].count("load") == 24
    assert all(float(row["ttft_ms"]) > 0 and row["itl_ms"] for row in rows)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "xiaoli" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "the page needs nothing else"
    assert (folder / "ttft.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_single_answer_is_reported_and_written(serve: Serve, tmp_path: Path) -> None:
    def broken(body: Mapping[str, Any]) -> KnownAnswer:
        return KnownAnswer(("sorry",), status=500) if body.get("stream") else identity_answer(body)

    assert loadtest(serve(broken), "--num-prompts", "4", "--output", tmp_path / "out") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_names_that_look_like_formulas_are_drawn_as_they_are(serve: Serve, tmp_path: Path) -> None:
    cards = [{"id": name} for name in ("$x_$", "a$\\frac{$", "=1+1")]
    server = serve(lambda body: KnownAnswer(("a",)), cards)
    assert loadtest(server, "--num-prompts", "6", "--output", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "'=1+1" in (tmp_path / "out" / "requests.csv").read_text()


def test_a_folder_that_cannot_be_written_is_told_before_the_run(serve: Serve, tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        return identity_answer(body)

    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "sub", tmp_path / "file", Path("/proc/nothing/here")):
        assert loadtest(serve(answer), "--num-prompts", "4", "--output", place) == 2
    assert not asked


def test_a_link_to_a_folder_is_followed(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert loadtest(serve(), "--num-prompts", "4", "--output", tmp_path / "link") == 0
    assert (tmp_path / "real" / "results.json").is_file()


def test_a_folder_that_holds_something_is_never_overwritten(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "results.json").write_text("{}")
    (foreign / "thesis.txt").write_text("mine")
    assert loadtest(server, "--num-prompts", "4", "--output", foreign, "--overwrite") == 2
    assert (foreign / "thesis.txt").read_text() == "mine"
    (tmp_path / "mine.txt").write_text("mine")
    assert loadtest(server, "--num-prompts", "4", "--output", tmp_path, "--overwrite") == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"
    results = tmp_path / "results"
    assert loadtest(server, "--num-prompts", "4", "--output", results) == 0
    assert loadtest(server, "--num-prompts", "4", "--output", results) == 2
    assert loadtest(server, "--num-prompts", "4", "--output", results, "--overwrite") == 0


def test_a_check_passes_where_everybody_is_himself(serve: Serve, capsys: Captured) -> None:
    assert loadtest(serve(), "--num-prompts", "24", "--check") == 0
    assert "24 answers compared, 24 same, 0 changed" in capsys.readouterr().out


def test_a_wrong_identity_fails_with_both_texts(serve: Serve, capsys: Captured) -> None:
    def mixed_up(body: Mapping[str, Any]) -> KnownAnswer:
        wrong = body.get("stream") and body["model"] == "base"
        return identity_answer(body, "otto" if wrong else None)

    assert loadtest(serve(mixed_up), "--num-prompts", "30", "--check") == 1
    out = capsys.readouterr().out
    assert "to base was answered as otto: 'I am otto" in out
    assert "alone it answers 'I am base" in out
    flags = ("--models", "base", "xiaoli", "--num-prompts", "12", "--check")
    assert loadtest(serve(mixed_up), *flags) == 1, "otto was not asked, and is served"
    assert "to base was answered as otto" in capsys.readouterr().out
    assert loadtest(serve(mixed_up), "--sweep", "adapters=1,2", "--num-prompts", "12", "--check") == 1
    assert "alone it answers 'I am base" in " ".join(capsys.readouterr().out.split())


def test_drift_at_a_near_tie_is_counted_and_does_not_fail(serve: Serve, capsys: Captured) -> None:
    def drifting(body: Mapping[str, Any]) -> KnownAnswer:
        answer = identity_answer(body)
        if not body.get("stream"):
            tie = logprob("made ", -0.70, **{"done ": -0.72})
            return KnownAnswer(
                answer.pieces, logprobs=[tie if p == "made " else logprob(p) for p in answer.pieces]
            )
        return KnownAnswer(tuple("done " if piece == "made " else piece for piece in answer.pieces))

    server = serve(drifting)
    assert loadtest(server, "--num-prompts", "12", "--check") == 0
    out = capsys.readouterr().out
    assert "12 changed, largest gap 0.02 nats, 0 of a wrong identity" in out
    assert "at token 4: 'done ' for 'made ', gap 0.020 nats" in out
    assert loadtest(server, "--num-prompts", "12", "--check", "--check-max-gap", "0.01") == 1
    assert "CHANGED: 12 of them by more than 0.01 nats" in capsys.readouterr().out


def test_a_server_without_logprobs_or_ignore_eos_is_checked_by_its_texts(
    serve: Serve, capsys: Captured
) -> None:
    def strict(body: Mapping[str, Any]) -> KnownAnswer:
        if "logprobs" in body or "ignore_eos" in body:
            return KnownAnswer(("unknown field",), status=400)
        return identity_answer(body)

    assert (
        loadtest(serve(strict, [{"id": "one"}, {"id": "base"}]), "--models", "base", "--num-prompts", "8")
        == 0
    )
    assert "does not take ignore_eos" in capsys.readouterr().out
    assert loadtest(serve(strict), "--num-prompts", "8", "--check") == 0


def test_an_unknown_adapter_is_bad_input_with_the_nearest_name(serve: Serve, capsys: Captured) -> None:
    server = serve()
    assert loadtest(server, "--models", "xiaolu", "--num-prompts", "4") == 2
    assert "xiaolu: the server has no model of that name. Did you mean xiaoli?" in capsys.readouterr().err
    assert loadtest(server, "--victim", "nobody") == 2
    assert loadtest(server, "--sweep", "adapters=1,9") == 2
    assert "asks for 9 adapters, 3 are served" in capsys.readouterr().err


def test_a_server_that_is_not_there_says_what_to_start(capsys: Captured) -> None:
    assert loadtest("http://127.0.0.1:9", "--num-prompts", "4") == 1
    assert "vllm-lora serve" in capsys.readouterr().err


def test_a_server_that_dies_in_the_middle_leaves_what_was_measured(tmp_path: Path, capsys: Captured) -> None:
    asked: list[int] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        if len(asked) > 60:
            server.die()
        return identity_answer(body)

    server = KnownServer(CARDS, answer)
    with server.in_thread():
        assert loadtest(server, "--num-prompts", "5000", "--output", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "ENDED EARLY (the server no longer takes connections)" in out and "of 5000 planned" in out
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["figures"]["whole"]["completed"] > 30 and run["ended_early"]


def test_failed_requests_are_told_with_the_servers_words(serve: Serve, capsys: Captured) -> None:
    def picky(body: Mapping[str, Any]) -> KnownAnswer:
        busy = body["model"] == "otto" and body["max_tokens"] > 1
        return KnownAnswer(("otto is being admitted",), status=429) if busy else identity_answer(body)

    assert loadtest(serve(picky), "--num-prompts", "24", "--lora-request-distribution", "distinct") == 1
    out = capsys.readouterr().out
    assert "6 x HTTP 429" in out and "otto is being admitted" in out


def test_everything_at_once_is_a_load_too(serve: Serve, capsys: Captured) -> None:
    assert loadtest(serve(), "--num-prompts", "20", "--request-rate", "inf") == 0
    assert "all at once" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://127.0.0.1:abc", "http://[::1", ""])
def test_what_is_no_address_is_bad_input(url: str, capsys: Captured) -> None:
    assert loadtest(url, "--num-prompts", "4") == 2
    assert "http://HOST:PORT" in capsys.readouterr().err


def test_a_password_in_the_address_is_kept_nowhere(serve: Serve, tmp_path: Path, capsys: Captured) -> None:
    url = serve().url.replace("http://", "http://me:secret@")
    assert loadtest(url, "--num-prompts", "4", "--output", tmp_path / "out") == 0
    assert "secret" not in capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes()


def test_counters_that_fail_after_the_run_cost_nothing_that_was_measured(
    serve: Serve, tmp_path: Path, capsys: Captured
) -> None:
    asked: list[int] = []

    def page() -> str:
        asked.append(1)
        if len(asked) > 4:
            return "vllm:request_success_total NaN\n"
        names = ("request_success", "prompt_tokens", "generation_tokens")
        return "".join(f"vllm:{name}_total 0\n" for name in names)

    server = serve(pages={"/metrics": ("text/plain", page)})
    assert loadtest(server, "--num-prompts", "8", "--prometheus", "--output", tmp_path / "out") == 1
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_ends_with_130_and_what_was_measured_is_written(
    serve: Serve, tmp_path: Path, processes: str
) -> None:
    asked: list[int] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        if len(asked) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return identity_answer(body)

    flags = ("--num-prompts", "50000", "--client-processes", processes, "--output", tmp_path / "out")
    assert loadtest(serve(answer), *flags) == 130
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["ended_early"] == "interrupted" and run["figures"]["whole"]["completed"] > 10


@pytest.mark.parametrize("stage", ["warm-up", "victim", "sweep"])
def test_ctrl_c_at_other_times_ends_with_130(serve: Serve, tmp_path: Path, stage: str) -> None:
    asked: list[int] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        if len(asked) == {"warm-up": 4, "victim": 60, "sweep": 30}[stage]:
            os.kill(os.getpid(), signal.SIGINT)
        return KnownAnswer(("word ",) * 4, 0.05, 0.01)

    flags = {
        "warm-up": ("--num-prompts", "50"),
        "victim": ("--victim", "marina", "--victim-window", "1"),
        "sweep": ("--sweep", "concurrency=1,2,4", "--num-prompts", "16"),
    }[stage]
    assert loadtest(serve(answer), *flags, "--output", tmp_path / "out") == 130
    assert (tmp_path / "out").exists() == (stage != "warm-up")


def test_a_rate_that_the_client_cannot_keep_is_marked(serve: Serve, capsys: Captured) -> None:
    flags = ("--num-prompts", "400", "--request-rate", "5000", "--warmup", "0")
    assert loadtest(serve(), *flags) == 1
    assert "CLIENT-BOUND: requests left" in capsys.readouterr().out


def test_a_sweep_puts_its_levels_side_by_side(serve: Serve, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    flags = ("--sweep", "adapters=1,3", "--num-prompts", "12", "--check", "--output", out)
    assert loadtest(serve(), *flags) == 0
    text = capsys.readouterr().out
    assert "sweep over adapters" in text and "saturat" in text
    body = json.loads((out / "results.json").read_text())
    assert [run["adapters"] for run in body["runs"]][:2] == [1, 3]
    assert (out / "throughput_against_adapters.png").is_file()
    rate = tmp_path / "rate"
    assert loadtest(serve(), "--sweep", "rate=20,40", "--duration", "0.5", "--output", rate) in (0, 1)
    assert (rate / "latency_against_rate.png").is_file()


def test_results_are_compared_with_intervals(serve: Serve, tmp_path: Path, capsys: Captured) -> None:
    def slower(body: Mapping[str, Any]) -> KnownAnswer:
        answer = identity_answer(body)
        return KnownAnswer(answer.pieces, 0.05, 0.004, logprobs=answer.logprobs)

    for name, answer in (("ours", identity_answer), ("theirs", slower)):
        assert loadtest(serve(answer), "--num-prompts", "40", "--check", "--output", tmp_path / name) == 0
    capsys.readouterr()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs" / "results.json"
    flags = ["--compare", str(ours), str(theirs)]
    assert main(["loadtest", *flags, "--output", str(tmp_path / "both")]) == 0
    table = capsys.readouterr().out
    assert "theirs against ours" in table and re.search(r"TTFT p50 ms .*\[.*\] │ clear", table)
    assert (tmp_path / "both" / "comparison.png").is_file()
    assert main(["loadtest", *flags, "--output", str(ours), "--overwrite"]) == 2, "a comparison is no run"
    assert (ours / "results.json").is_file()
    capsys.readouterr()
    assert main(["loadtest", *flags, "--json"]) == 0
    figures = {item["figure"]: item for item in json.loads(capsys.readouterr().out)}
    assert figures["TTFT p50 ms"]["ratio"]["low"] > 1
    assert main(["loadtest", "--compare", str(ours), str(tmp_path / "nowhere")]) == 2
    body = json.loads((ours / "results.json").read_text())
    for damage in ({}, {**body, "runs": [{**body["runs"][0], "figures": []}]}, {**body, "settings": []}):
        (tmp_path / "other.json").write_text(json.dumps(damage))
        assert main(["loadtest", "--compare", str(ours), str(tmp_path / "other.json")]) == 2


def test_the_requests_of_a_run_can_be_asked_again(serve: Serve, tmp_path: Path, capsys: Captured) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert loadtest(serve(), "--num-prompts", "15", "--request-rate", "30", "--output", first) == 0
    trace = first / "requests.csv"
    assert loadtest(serve(), "--trace", trace, "--trace-speed", "2", "--output", again) == 0

    def models(folder: Path) -> list[str]:
        rows = csv.DictReader((folder / "requests.csv").read_text().splitlines())
        return [
            row["model"]
            for row in sorted(rows, key=lambda row: float(row["sent_s"]))
            if row["phase"] == "load"
        ]

    assert models(first) == models(again)


def test_the_servers_counters_are_held_against_ours(serve: Serve, capsys: Captured) -> None:
    counted = {"requests": 100, "prompt": 1000, "generation": 5000}
    lost = 0

    def counting(body: Mapping[str, Any]) -> KnownAnswer:
        answer = identity_answer(body)
        counted["requests"] += 1 - lost
        counted["prompt"] += sum(len(message["content"].split()) for message in body["messages"])
        counted["generation"] += len(answer.pieces)
        return answer

    def page() -> str:
        return (
            f'vllm:request_success_total{{finished_reason="stop"}} {counted["requests"] - 60}\n'
            f'vllm:request_success_total{{finished_reason="length"}} 60\n'
            f"vllm:prompt_tokens_total {counted['prompt']}\n"
            f"vllm:generation_tokens_total {counted['generation']}\n"
            'vllm:lora_requests_info{max_lora="2",running_lora_adapters=""} 1\n'
        )

    server = serve(counting, pages={"/metrics": ("text/plain", page)})
    assert loadtest(server, "--num-prompts", "20", "--prometheus") == 0
    out = capsys.readouterr().out
    assert "counters agree: requests: server 20, client 20" in out
    assert "counters agree: output tokens" in out
    lost = 1
    assert loadtest(server, "--num-prompts", "20", "--prometheus") == 1
    assert "counters DIFFER: requests: server 0, client 20" in capsys.readouterr().out
    assert loadtest(serve(), "--num-prompts", "4", "--prometheus") == 1
    assert "/metrics: is not there" in capsys.readouterr().err


def test_the_servers_slots_tell_cold_from_warm(serve: Serve, capsys: Captured) -> None:
    page = ("text/plain", lambda: 'vllm:lora_requests_info{max_lora="1"} 1\n')
    flags = ["--num-prompts", "24", "--max-concurrency", "1", "--base-share", "0", "--json"]
    flags += ["--lora-request-distribution", "distinct"]
    assert loadtest(serve(pages={"/metrics": page}), *flags) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["server"]["adapter_slots"] == 1
    assert body["runs"][0]["figures"]["cold"]["requests"] == 27  # the warm-up's three too


def test_a_dry_run_prints_the_schedule_and_sends_nothing(serve: Serve, capsys: Captured) -> None:
    asked: list[int] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        return identity_answer(body)

    flags = ("--num-prompts", "5", "--request-rate", "10", "--dry-run", "--json")
    assert loadtest(serve(answer), *flags) == 0
    schedule = json.loads(capsys.readouterr().out)
    assert len(schedule) == 5 and schedule[-1]["due_s"] == pytest.approx(0.5) and not asked


def test_a_victim_is_reported_with_an_interval(serve: Serve, tmp_path: Path, capsys: Captured) -> None:
    flags = (
        "--victim",
        "marina",
        "--victim-rounds",
        "2",
        "--victim-window",
        "0.4",
        "--output",
        tmp_path / "out",
    )
    assert loadtest(serve(), *flags) == 0
    assert "change, 95 % interval" in capsys.readouterr().out
    assert (tmp_path / "out" / "victim.png").is_file()
    assert loadtest(serve(cards=CARDS[:2]), "--victim", "xiaoli") == 2
    assert "needs two other adapters" in capsys.readouterr().err
