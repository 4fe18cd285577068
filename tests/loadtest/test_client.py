"""The client takes the times that the server kept, and survives whatever the server does."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

import serve.loadtest.client as client_module
from serve.loadtest.arrivals import arrival_times, constant_rate
from serve.loadtest.client import CUT_OFF, LoadPlan
from serve.loadtest.known_server import KnownAnswer, KnownServer
from serve.loadtest.own_cost import as_the_server_saw, known_server, try_rate
from serve.loadtest.popularity import make_popularity
from serve.loadtest.processes import INTERRUPTED, SERVER_GONE, run_load
from serve.loadtest.records import RequestRecord
from serve.loadtest.stats import percentile, values_of
from serve.loadtest.workload import Workload
from tests.loadtest.conftest import ADAPTERS, Serve, identity_answer

MODELS = make_popularity(ADAPTERS, "base", "uniform")
# seconds to the first chunk, between chunks, chunks; with 15 of them no percentile lies between two
DELAYS = [(0.10 + 0.02 * number, 0.02 + 0.004 * number, 12) for number in range(15)]


def plan(url: str, requests: int | None, rate: float | None = None, **more: Any) -> LoadPlan:
    arrivals = arrival_times(constant_rate(rate), requests or 0, 1.0, 0) if rate else None
    more.setdefault("max_concurrency", None if rate else 4)
    return LoadPlan(url, Workload(MODELS, arrivals=arrivals), requests, **more)


@pytest.mark.parametrize("processes", [1, 2])
def test_percentiles_are_those_of_the_known_delays_within_two_percent(processes: int) -> None:
    """The server tells in its answers when it read and wrote: what is compared is the client alone."""
    with known_server(DELAYS) as url:
        run = run_load(plan(url, 75, rate=30, keep_text=True), processes)
    true = [as_the_server_saw(record) for record in run.records]
    assert len(true) == 75 and run.ended_early is None
    assert all(cost.clock == "kernel" for cost in run.costs)
    for metric in ("ttft", "itl", "tpot", "e2el"):
        for share in (0.5, 0.9, 0.99):
            ours, servers = values_of(run.records, metric), values_of(true, metric)
            assert percentile(ours, share) == pytest.approx(percentile(servers, share), rel=0.02)
    known = sorted(first for first, _, _ in DELAYS * 5)
    assert percentile(values_of(true, "ttft"), 0.5) == pytest.approx(percentile(known, 0.5), rel=0.1)


def test_without_the_kernels_clock_times_are_taken_all_the_same(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "kernel_clock_reaches", lambda url: False)
    run = run_load(plan(serve().url, 8))
    assert run.costs[0].clock == "client"
    assert all(record.error is None and (record.ttft_s or 0) > 0.009 for record in run.records)


def test_every_request_is_sent_once_and_tokens_are_the_servers(serve: Serve) -> None:
    for processes in (1, 3):
        run = run_load(plan(serve().url, 30, keep_text=True), processes)
        assert Counter(record.index for record in run.records) == Counter(range(30))
        assert len(run.costs) == processes
        for record in run.records:
            assert record.text.startswith(f"I am {record.model}") and record.answered_by == record.model
            assert (record.output_tokens, len(record.chunks_s), record.prompt_tokens) == (11, 11, 16)


def test_a_closed_loop_keeps_so_many_in_flight(serve: Serve) -> None:
    connected: list[int] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        connected.append(len(server.connections))
        return KnownAnswer(("a", "b"), 0.3)

    server = serve(answer)
    run = run_load(plan(server.url, 20, max_concurrency=5))
    in_flight = [
        sum(other.sent_s <= record.sent_s < other.done_s for other in run.records) for record in run.records
    ]
    assert max(in_flight) == 5, "by the client's records"
    assert max(connected) == 5, "by what the server saw"


def test_an_open_loop_sends_when_it_is_due_whatever_the_server_does(serve: Serve) -> None:
    server = serve(lambda body: KnownAnswer(("a", "b"), 1.0))
    run = run_load(plan(server.url, 20, rate=40))
    assert all(-0.001 < (record.lag_s or 0) < 0.3 for record in run.records)
    assert max(record.sent_s for record in run.records) < min(record.done_s for record in run.records)


def test_a_run_by_the_clock_ends_and_lets_its_requests_finish(serve: Serve) -> None:
    run = run_load(plan(serve().url, None, duration_s=0.5, max_concurrency=3))
    assert len(run.records) > 10 and run.ended_early is None and run.planned is None
    assert all(record.error is None and record.sent_s < 0.6 for record in run.records)


FAILURES: dict[str, tuple[KnownAnswer, str]] = {
    "refused": (KnownAnswer(("no such model",), status=404), "HTTP 404"),
    "busy": (KnownAnswer(("try later",), status=429), "HTTP 429"),
    "broken": (KnownAnswer(("sorry",), status=500), "HTTP 500"),
    "cut": (KnownAnswer(("a", "b", "c"), 0.0, 0.01, cut_after=2), "connection broken"),
    "short": (KnownAnswer(("a", "b"), finished=False), "cut short"),
    "silent": (KnownAnswer((), finished=False), "no answer"),
    "slow": (KnownAnswer(("a",), 5.0), "timeout"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_is_counted_by_its_kind_and_never_tried_again(serve: Serve, kind: str) -> None:
    answer, expected = FAILURES[kind]
    asked: list[int] = []

    def sometimes(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        return answer if len(asked) % 2 else identity_answer(body)

    run = run_load(plan(serve(sometimes).url, 6, timeout_s=0.5, max_concurrency=1))
    assert Counter(record.error for record in run.records) == {expected: 3, None: 3}
    assert len(asked) == 6
    assert all(record.detail for record in run.records if record.error)


def test_figures_are_the_servers_even_where_the_client_is_busy_all_the_time() -> None:
    """64 requests leave at once and keep one event loop busy for longer than the time between two tokens."""
    with known_server() as url:
        run = run_load(plan(url, 128, max_concurrency=64, keep_text=True))
    true = [as_the_server_saw(record) for record in run.records]
    for metric in ("ttft", "itl", "tpot", "e2el"):
        for share in (0.5, 0.9):
            ours, servers = values_of(run.records, metric), values_of(true, metric)
            assert percentile(ours, share) == pytest.approx(percentile(servers, share), rel=0.05)


def test_an_answer_without_a_text_is_an_answer_and_odd_usage_is_none(serve: Serve) -> None:
    run = run_load(plan(serve(lambda body: KnownAnswer(())).url, 4))
    assert {record.error for record in run.records} == {None}
    odd = serve(lambda body: KnownAnswer(("a", "b"), usage={"prompt_tokens": None, "completion_tokens": "x"}))
    run = run_load(plan(odd.url, 4))
    assert {(record.error, record.output_tokens) for record in run.records} == {(None, 2)}


def test_streams_that_break_one_after_the_other_do_not_make_a_server_gone(serve: Serve) -> None:
    run = run_load(plan(serve(lambda body: FAILURES["cut"][0]).url, 12, max_concurrency=1))
    assert run.ended_early is None
    assert Counter(record.error for record in run.records) == {"connection broken": 12}


def test_no_time_is_negative_however_fast_the_answer_comes(serve: Serve) -> None:
    run = run_load(plan(serve(lambda body: KnownAnswer(("a",))).url, 40))
    assert all((record.ttft_s or 0) > 0 for record in run.records)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_dies_ends_the_run_and_what_was_measured_is_kept(processes: int) -> None:
    asked: list[int] = []

    def answer_and_die(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append(1)
        if len(asked) == 100:
            server.die()
        return identity_answer(body)

    server = KnownServer([{"id": "base"}], answer_and_die)
    with server.in_thread():
        run = run_load(plan(server.url, 100_000, max_concurrency=8), processes)
    assert run.ended_early == SERVER_GONE
    good = [record for record in run.records if record.error is None]
    assert len(good) > 20 and len(run.records) < 5000


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_keeps_what_was_measured(serve: Serve, processes: int) -> None:
    seen: list[RequestRecord] = []

    def interrupt_once(record: RequestRecord) -> None:
        seen.append(record)
        if len(seen) == 20:
            os.kill(os.getpid(), signal.SIGINT)

    run = run_load(plan(serve().url, 100_000), processes, interrupt_once)
    assert run.ended_early == INTERRUPTED
    assert len(run.records) >= 20
    assert {record.error for record in run.records} <= {None, CUT_OFF}


def test_a_client_process_that_ends_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    import serve.loadtest.processes as processes

    monkeypatch.setattr(processes, "_CHILD", processes._CHILD.replace("child()", "raise SystemExit(3)"))
    run = run_load(plan(serve().url, 10), 2)
    assert run.ended_early == "a client process ended with exit code 3" and not run.records


def test_an_address_that_takes_no_connection_is_no_connection() -> None:
    run = run_load(plan("http://127.0.0.1:9", 50, max_concurrency=1))
    assert {record.error for record in run.records} == {"no connection"}
    assert run.ended_early == SERVER_GONE and len(run.records) == 5


def test_a_rate_is_tried_against_a_real_server_of_known_delays() -> None:
    with known_server() as url:
        level = try_rate(url, 10, 1)
    assert level.sent_all and len(level.added) == 8
    assert 0 < level.busiest_share < 1
