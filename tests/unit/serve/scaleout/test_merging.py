"""Answers of all replicas, made one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve.scaleout.merging import merged_adapters, merged_metrics


def page(requests: int) -> str:
    registry = CollectorRegistry()
    counter = Counter("vllm_lora_requests_total", "Accepted.", ["adapter"], registry=registry)
    counter.labels('a"b\\c}').inc(requests)
    Histogram("vllm_lora_seconds", "Time.", registry=registry, buckets=(1, 2)).observe(requests)
    return generate_latest(registry).decode()


def test_metrics_of_all_have_the_replica_as_a_label() -> None:
    merged = merged_metrics({"r1": page(1), "r2": page(2)})
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert set(families) >= {"vllm_lora_requests", "vllm_lora_seconds"}
    samples = families["vllm_lora_requests"].samples
    counted = {sample.labels["replica"]: sample for sample in samples if sample.name.endswith("_total")}
    assert {replica: sample.value for replica, sample in counted.items()} == {"r1": 1.0, "r2": 2.0}
    assert counted["r1"].labels["adapter"] == 'a"b\\c}'
    assert merged.count("# TYPE vllm_lora_seconds histogram") == 1
    buckets = [sample for sample in families["vllm_lora_seconds"].samples if "_bucket" in sample.name]
    assert len(buckets) == 6


def test_a_page_of_nothing_is_empty() -> None:
    assert merged_metrics({}) == "\n" or merged_metrics({}) == ""


def test_an_adapter_is_what_all_replicas_make_of_it() -> None:
    one = {
        "id": "a",
        "state": "stored",
        "requests": 1,
        "running": 0,
        "waiting": 0,
        "last_used": None,
        "load_seconds": None,
    }
    two = {
        **one,
        "state": "slot",
        "requests": 4,
        "running": 2,
        "last_used": "2026-01-01",
        "load_seconds": 0.1,
    }
    merged = merged_adapters([{"data": [one, {**one, "id": "b", "state": "refused"}]}, {"data": [two]}])
    assert [row["id"] for row in merged["data"]] == ["a", "b"]
    assert merged["data"][0] == {**two, "requests": 5}
    assert merged["data"][1]["state"] == "refused"
