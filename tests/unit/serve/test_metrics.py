"""Figures per adapter, in a number of series that never grows past its bound (S11)."""

from __future__ import annotations

from collections import Counter as Tally
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from serve.metrics import Metrics, OneSeries

INFO = "vllm:lora_requests_info"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"vllm_lora_{name}", labels)


def serve_one(metrics: Metrics, adapter: str) -> None:
    metrics.started(adapter)
    metrics.first_token(adapter, 0.2)
    metrics.finished(adapter, 1.5)
    metrics.tokens(adapter, 7, 11)


def test_a_request_is_counted_for_its_adapter(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry=registry, base_names=["base"])
    serve_one(metrics, "小李")
    serve_one(metrics, "小李@0123456789ab")  # a version counts for its adapter
    serve_one(metrics, "base")
    metrics.failed("小李", "context_length_exceeded")
    for name, adapter, expected in (
        ("requests_total", "小李", 2),
        ("prompt_tokens_total", "小李", 14),
        ("generation_tokens_total", "小李", 22),
        ("time_to_first_token_seconds_count", "小李", 2),
        ("e2e_request_latency_seconds_sum", "小李", 3.0),
        ("requests_total", "base", 1),
    ):
        assert value(registry, name, adapter=adapter) == expected, name
    assert value(registry, "errors_total", adapter="小李", code="context_length_exceeded") == 1
    assert b'adapter="\xe5\xb0\x8f\xe6\x9d\x8e"' in generate_latest(registry)


def test_what_belongs_to_no_adapter(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry=registry)
    assert value(registry, "adapters", state="slot") == 0  # there from the start
    metrics.loaded(0.03)
    metrics.load_failed()
    metrics.evicted()
    metrics.refused("queue_full")
    metrics.adapters(slot=4, cached=40, stored=956)
    metrics.requests(running=3, waiting=5)
    assert value(registry, "adapter_load_seconds_bucket", le="0.05") == 1
    assert value(registry, "adapter_load_failures_total") == 1
    assert value(registry, "adapter_evictions_total") == 1
    assert value(registry, "refusals_total", reason="queue_full") == 1
    for state, number in (("slot", 4), ("cached", 40), ("stored", 956)):
        assert value(registry, "adapters", state=state) == number
    assert value(registry, "requests_running") == 3
    assert value(registry, "requests_waiting") == 5


def test_the_first_names_keep_their_label_and_the_rest_are_other(registry: CollectorRegistry) -> None:
    metrics = Metrics(2, registry, ["base"])
    for adapter in ("a", "b", "c", "d", "a", "base", "c"):
        metrics.started(adapter)
        metrics.failed(adapter, "engine_error")
    for name, more in (("requests_total", {}), ("errors_total", {"code": "engine_error"})):
        found = {label: value(registry, name, adapter=label, **more) for label in ("a", "b", "other", "base")}
        assert found == {"a": 2, "b": 1, "other": 3, "base": 1}
        assert value(registry, name, adapter="c", **more) is None


@given(st.lists(st.sampled_from([f"adapter-{number}" for number in range(20)]), max_size=60))
def test_nothing_is_lost_and_labels_stay_bounded(asked: list[str]) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(5, registry, ["base"])
    for adapter in asked:
        metrics.started(adapter)
    (family,) = (metric for metric in registry.collect() if metric.name == "vllm_lora_requests")
    counts = {
        sample.labels["adapter"]: sample.value for sample in family.samples if sample.name.endswith("_total")
    }
    first = list(dict.fromkeys(asked))[:5]
    expected = Tally(adapter if adapter in first else "other" for adapter in asked)
    assert counts == {"base": 0, **expected}


def test_threads_share_the_labels(registry: CollectorRegistry) -> None:
    metrics = Metrics(10, registry)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(metrics.started, [f"adapter-{number % 40}" for number in range(2000)]))
    (family,) = (metric for metric in registry.collect() if metric.name == "vllm_lora_requests")
    counts = [sample.value for sample in family.samples if sample.name.endswith("_total")]
    assert len(counts) == 11
    assert sum(counts) == 2000


def test_every_name_has_our_prefix_and_says_what_it_is(registry: CollectorRegistry) -> None:
    Metrics(registry=registry)
    metrics = list(registry.collect())
    assert len(metrics) == 15
    assert all(metric.name.startswith("vllm_lora_") and metric.documentation for metric in metrics)


@pytest.fixture
def gauge(registry: CollectorRegistry) -> Gauge:
    """As vLLM makes it (vllm/v1/metrics/loggers.py)."""
    return Gauge(
        name=INFO,
        documentation="Running stats on lora requests.",
        multiprocess_mode="sum",
        labelnames=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        registry=registry,
    )


def log(info: Gauge | OneSeries, running: str, waiting: str = "") -> None:
    """As vLLM does after every step."""
    labels = {"running_lora_adapters": running, "waiting_lora_adapters": waiting, "max_lora": 4}
    info.labels(**labels).set_to_current_time()


def series(registry: CollectorRegistry) -> list[dict[str, str]]:
    return [sample.labels for metric in registry.collect() for sample in metric.samples]


def test_sets_of_adapters_make_one_series_and_not_one_each(registry: CollectorRegistry, gauge: Gauge) -> None:
    for number in range(5):
        log(gauge, f"a{number}")
    assert len(series(registry)) == 5  # vLLM's own
    one = OneSeries(gauge, registry)
    for number in range(5):
        log(one, f"a{number}@0123456789ab,a{number}@ba9876543210,b@0123456789ab", "org/小李@0123456789ab")
        assert series(registry) == [
            {
                "max_lora": "4",
                "running_lora_adapters": f"a{number},b",
                "waiting_lora_adapters": "org/小李",
            }
        ]
    log(one, "")
    assert series(registry) == [{"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}]


def test_gateways_read_the_same_lines_as_from_vllm(registry: CollectorRegistry, gauge: Gauge) -> None:
    labels = {"running_lora_adapters": "a", "waiting_lora_adapters": "", "max_lora": 4}
    gauge.labels(**labels).set(1.5)
    before = generate_latest(registry)
    one = OneSeries(gauge, registry)
    one.labels(**labels).set(1.5)
    assert set(generate_latest(registry).splitlines()) == set(before.splitlines())
    one.clear()
    assert series(registry) == []


def test_no_reader_ever_finds_none_or_two(registry: CollectorRegistry, gauge: Gauge) -> None:
    one = OneSeries(gauge, registry)
    log(one, "a")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [log(one, f"a{number}") for number in range(5000)])
        while not writing.done():
            assert len(series(registry)) == 1


def test_vllm_can_take_it_out_of_the_registry_and_make_its_gauge_again(
    registry: CollectorRegistry, gauge: Gauge
) -> None:
    one = OneSeries(gauge, registry)
    assert one._name == INFO  # vllm/v1/metrics/prometheus.py, unregister_vllm_metrics
    registry.unregister(one)
    Gauge(INFO, "again", registry=registry)
