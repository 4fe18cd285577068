"""What admission costs: against the machine's own disk and SHA-256, for many adapters, and in memory.

    python -m benchmarks.bench_admission [--json-out FILE] [--skip-large]

- one adapter of 100 MB: `admit` against read + sha256 + write + fsync of its weights file, in turns
- 1,000 adapters of a tiny model: the first time, and at a restart
- the most memory that the admission of a 4 GB adapter takes, in a process of its own
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import tell
from serve.machine import describe_machine
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.intake import admit
from vllm_lora_ext.sources import find_sources
from vllm_lora_ext.spec import TensorSpec
from vllm_lora_ext.store import AdapterStore
from vllm_lora_ext.tensor_file import canonical_header

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1200,
}
MIB = 1 << 20


def write_adapter(folder: Path, base: BaseModel, rank: int, seed: int) -> Path:
    """An adapter of random bfloat16 numbers on every module of `base`."""
    folder.mkdir(parents=True)
    shapes = base.module_shapes() or {}
    tensors = {}
    for module, (out_features, in_features) in shapes.items():
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = TensorSpec("", "BF16", (rank, in_features))
        tensors[f"{stem}.lora_B.weight"] = TensorSpec("", "BF16", (out_features, rank))
    header, order = canonical_header(tensors)
    chance = np.random.default_rng(seed)
    # Bits of bfloat16 numbers between 0.0078 and 0.03.
    noise = (0x3C00 | chance.integers(0, 0x100, 4 * MIB, np.uint16)).astype(np.uint16).tobytes()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header)
        for name in order:
            left = 2 * int(np.prod(tensors[name].shape))
            while left:
                left -= file.write(noise[: min(left, len(noise))])
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    body = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


def plain_copy(source: Path, target: Path) -> None:
    """What the machine can do: read, sha256, write, fsync."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while piece := reader.read(MIB):
            digest.update(piece)
            writer.write(piece)
        os.fsync(writer.fileno())


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def compare_with_a_copy(work_dir: Path, rounds: int) -> dict[str, Any]:
    """`admit` and a plain copy in turns, medians."""
    base = BaseModel("base", {**CONFIG, "num_hidden_layers": 32})
    folder = write_adapter(work_dir / "large", base, rank=20, seed=0)
    weights = folder / "adapter_model.safetensors"
    admitted, copied = [], []
    for _ in range(rounds):
        copied.append(seconds(lambda: plain_copy(weights, work_dir / "copy")))
        (work_dir / "copy").unlink()
        admitted.append(seconds(lambda: admit(folder, AdapterStore(work_dir / "store"), Rules(base))))
        shutil.rmtree(work_dir / "store")
    size = weights.stat().st_size
    admit_s, copy_s = statistics.median(admitted), statistics.median(copied)
    return {
        "megabytes": round(size / 1e6, 1),
        "admit_s": round(admit_s, 3),
        "plain_copy_s": round(copy_s, 3),
        "share_of_the_machines_rate": round(copy_s / admit_s, 3),
        "rounds": rounds,
    }


def many(work_dir: Path, count: int) -> dict[str, Any]:
    """Seconds to take `count` small adapters the first time, and to find them unchanged at a restart."""
    base = BaseModel("base", TINY)
    for number in range(count):
        write_adapter(work_dir / "many" / f"adapter-{number:04}", base, rank=8, seed=number)

    def start() -> int:
        with Catalog(work_dir / "state") as catalog:
            inbox = Inbox(catalog, Rules(base))
            items = inbox.scan(find_sources([str(work_dir / "many")]))
            inbox.take_all(items)
            return len(catalog.names())

    first_s = seconds(start)
    restart_s = statistics.median(seconds(start) for _ in range(3))
    if start() != count:
        raise RuntimeError("not every adapter was taken")
    size = (work_dir / "many" / "adapter-0000" / "adapter_model.safetensors").stat().st_size
    return {
        "adapters": count,
        "megabytes_each": round(size / 1e6, 2),
        "first_s": round(first_s, 2),
        "restart_s": round(restart_s, 2),
    }


def memory_of_a_large_one(work_dir: Path) -> dict[str, Any]:
    """The most memory (RSS) of a process that admits an adapter of 4 GB."""
    base = BaseModel("base", {**CONFIG, "num_hidden_layers": 128})
    folder = write_adapter(work_dir / "huge", base, rank=200, seed=0)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.bench_admission",
            "--admit",
            str(folder),
            str(work_dir / "huge-store"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    size = (folder / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(folder)
    return {"gigabytes": round(size / 1e9, 2), **json.loads(done.stdout)}


def admit_alone(folder: Path, store: Path) -> None:
    """In the child: admit, and print the peak of the memory."""
    base = BaseModel("base", {**CONFIG, "num_hidden_layers": 128})
    spent = seconds(lambda: admit(folder, AdapterStore(store), Rules(base)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(spent, 1), "peak_megabytes": round(peak / 1e6)}))


def cache_folder() -> Path:
    """Where benchmarks work: on the disk of the checkout, outside git."""
    folder = Path(".cache") / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    """All three; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--work-dir", type=Path, help="default: .cache/benchmarks")
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--admit", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.admit:
        admit_alone(*args.admit)
        return
    report: dict[str, Any] = {"benchmark": "admission", **describe_machine()}
    with tempfile.TemporaryDirectory(dir=args.work_dir or cache_folder(), prefix="bench-") as folder:
        report["one"] = compare_with_a_copy(Path(folder), args.rounds)
        report["many"] = many(Path(folder), args.adapters)
        if not args.skip_large:
            report["memory"] = memory_of_a_large_one(Path(folder))
        subprocess.run(["chmod", "-R", "u+w", folder], check=False)
    tell(report, args.json_out)


if __name__ == "__main__":
    main()
