"""What the gauges of refused and failed adapters count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from serve.adapter_view import PROOF, judged_badly
from serve.metrics import Metrics
from serve.proving import FAILED as PROOF_FAILED
from tests.unit.serve.front_side import RULES
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.parity import Verdict
from vllm_lora_ext.sources import find_sources


def test_refused_folders_and_failed_proofs_are_counted(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter("a").parent
    make_adapter("b", lora_alpha=32)
    make_adapter("wrong", r="8")
    catalog = Catalog(tmp_path / "state")
    inbox = Inbox(catalog, RULES)
    inbox.take_all(inbox.scan(find_sources([str(folder)])))
    assert judged_badly(catalog) == (1, 0)
    live = catalog.entry("a").live
    catalog.record_proof(live, PROOF, {"verdict": str(Verdict.FAILED)})
    assert judged_badly(catalog) == (1, 1)


def test_the_words_are_those_of_the_proofs() -> None:
    from serve import adapter_view

    assert (str(Verdict.FAILED), PROOF_FAILED) == (adapter_view.FAILED, adapter_view.PROOF_FAILED)


def test_they_are_on_the_page() -> None:
    registry = CollectorRegistry()
    Metrics(registry=registry).judged(2, 1)
    assert registry.get_sample_value("vllm_lora_adapters_refused") == 2
    assert registry.get_sample_value("vllm_lora_adapters_proof_failed") == 1
