"""What must hold on a GPU: vLLM's own kernels stay, our loading and our failures are active.

Skipped with the reason where there is no GPU; nothing else needs one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.models import make_random_adapter, make_random_base
from tests.arm import Arm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

PROMPT = list(range(3, 30))
SETTINGS = {
    "max_loras": 2,
    "max_cpu_loras": 2,
    "max_lora_rank": 64,
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_base(tmp_path_factory.mktemp("gpu") / "base", "qwen2-0.5b")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_random_adapter(folder / f"a{i}", base, rank, i) for i, rank in enumerate((8, 16, 64, 8))]


@pytest.fixture(scope="module")
def ours(base: Path, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arm]:
    with Arm(base, tmp_path_factory.mktemp("log") / "ours.log", plugin=True, **SETTINGS) as arm:
        for number, folder in enumerate(folders, 1):
            arm("name", name=folder.name, path=str(folder), number=number)
        yield arm


def test_the_cpu_kernels_are_inert_and_answers_are_those_of_plain_vllm(
    ours: Arm, base: Path, folders: list[Path], tmp_path: Path
) -> None:
    (parts,) = ours("call", method="vllm_lora_installed_parts")
    assert "SafeWorkerLoRAManager" in parts and "GroupedPunicaWrapper" not in parts
    rows = [(PROMPT, None), (PROMPT, "a0"), (PROMPT, "a1"), (PROMPT, None)]
    answers = ours.generate(rows)
    with Arm(base, tmp_path / "plain.log", plugin=False, **SETTINGS) as plain:
        for number, folder in enumerate(folders, 1):
            plain("name", name=folder.name, path=str(folder), number=number)
        expected = plain.generate(rows)
    assert [row["tokens"] for row in answers] == [row["tokens"] for row in expected]


def test_a_load_that_fails_ends_its_own_requests_only(ours: Arm, base: Path, tmp_path: Path) -> None:
    (alone,) = ours.generate([(PROMPT, None)])
    lost = make_random_adapter(tmp_path / "lost", base, 8, 9)
    ours("name", name="lost", path=str(lost), number=90)
    shutil.rmtree(lost)
    answers = ours.generate([(PROMPT, None), (PROMPT, "lost"), (PROMPT, "a0")])
    assert answers[0]["tokens"] == alone["tokens"]
    assert answers[1]["finish_reason"] == "error" and "lost" in answers[1]["stop_reason"]
    assert answers[2]["finish_reason"] == "length"


def test_slots_do_not_grow_with_the_adapters_that_pass_through(ours: Arm) -> None:
    for name in ("a0", "a1", "a2", "a3", "a0"):
        ours.generate([(PROMPT, name)])
    assert len(ours("listed")) <= SETTINGS["max_cpu_loras"]


def test_what_lora_costs_is_measured(base: Path, tmp_path: Path) -> None:
    """Printed, not judged: a test asserts no time."""
    from benchmarks import bench_lora_tax

    report = tmp_path / "tax.json"
    flags = ["--arms", "none,stock,ours", "--loads", "base,eight", "--rounds", "3"]
    bench_lora_tax.main([*flags, "--json-out", str(report)])
    print(json.dumps(json.loads(report.read_text()), indent=1))
