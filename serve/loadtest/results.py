"""What a load test found, and its files: `results.json`, `requests.csv`, pictures, `report.html`."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.loadtest.check import CheckReport
from serve.loadtest.counters import Count
from serve.loadtest.own_cost import ClientLimit, OwnCost
from serve.loadtest.records import RequestRecord, RunRecord
from serve.loadtest.stats import Figures
from serve.loadtest.sweep import Saturation
from serve.loadtest.victim import VictimReport
from vllm_lora_ext.errors import BadData, BadSetting, OutputExists

RESULTS_FILE = "results.json"
REQUESTS_FILE = "requests.csv"
COMPARISON_FILE = "comparison.json"
PAGE_FILE = "report.html"
FORMAT = 1
_COLUMNS = (
    "run", "phase", "index", "model", "due_s", "begun_s", "sent_s", "ttft_ms", "tpot_ms", "e2el_ms",
    "prompt_tokens", "output_tokens", "prompt_number", "answered_by", "error", "detail", "itl_ms",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """One run: what was asked (`shares` of the models), what came, and whether it can be trusted.

    `level` is its place in a sweep. `offered_per_s` is None in a closed loop. `client_bound` says why
    the figures are the client's rather than the server's.
    """

    label: str
    run: RunRecord
    warmup: tuple[RequestRecord, ...]
    figures: Figures
    cost: OwnCost
    client_bound: tuple[str, ...]
    shares: Mapping[str, float]
    adapters: int
    level: float | None = None
    offered_per_s: float | None = None
    check: CheckReport | None = None
    counters: tuple[Count, ...] = ()

    @property
    def ended_early(self) -> str | None:
        """Why not everything was measured."""
        return self.run.ended_early


@dataclass(frozen=True)
class LoadTestResult:
    """All of one call. `sweep` is what was varied."""

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    server: Mapping[str, Any]
    started: str
    runs: tuple[RunResult, ...] = ()
    sweep: str | None = None
    saturation: Saturation | None = None
    victim: VictimReport | None = None
    limit: ClientLimit | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedRun:
    """One run as `results.json` keeps it: its figures, and of each answered request what intervals need.

    `values` are milliseconds by metric, one block for each request; `done_s` and `tokens` belong together.
    """

    label: str
    level: float | None
    figures: Mapping[str, Any]
    check: Mapping[str, Any] | None
    client_bound: tuple[str, ...]
    ended_early: str | None
    values: Mapping[str, Sequence[Sequence[float]]]
    done_s: Sequence[float]
    tokens: Sequence[int]


@dataclass(frozen=True)
class SavedResult:
    """A `results.json` that was read; `name` is its folder's."""

    name: str
    settings: Mapping[str, Any]
    server: Mapping[str, Any]
    sweep: str | None
    runs: tuple[SavedRun, ...]


def require_place(folder: Path, overwrite: bool, comparison: bool = False) -> None:
    """Make sure, before anything is measured, that results may be written to `folder`, and can be.

    Raises:
        OutputExists: something is there that is not ours to replace; a comparison replaces comparisons only.
        BadSetting: nothing can be written there.
    """
    folder = folder.resolve()
    if folder.exists():
        mark = COMPARISON_FILE if comparison else RESULTS_FILE
        if not folder.is_dir() or (any(folder.iterdir()) and not _is_ours(folder, mark)):
            what = "a comparison" if comparison else "a load test's results"
            raise OutputExists(str(folder), f"holds something else than {what}", "Name another folder.")
        if (folder / mark).is_file() and not overwrite:
            rule = "holds earlier results"
            raise OutputExists(str(folder), rule, "Name another folder, or say --overwrite.")
    beside = _beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        beside.rmdir()
    except OSError as error:
        raise BadSetting(f"--output {folder}", f"cannot be written ({error.strerror})") from error


def write_folder(folder: Path, files: Mapping[str, bytes], overwrite: bool, comparison: bool = False) -> None:
    """Write all files beside and rename, so that a folder is whole or as it was.

    Raises:
        OutputExists, BadSetting: something came there meanwhile, or it can no longer be written.
    """
    require_place(folder, overwrite, comparison)
    folder = folder.resolve()
    beside = _beside(folder)
    beside.mkdir()
    try:
        for name, body in files.items():
            (beside / name).write_bytes(body)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _is_ours(folder: Path, mark: str) -> bool:
    """Whether every file is one that we write, and the JSON is of our form."""
    known = {RESULTS_FILE, REQUESTS_FILE, COMPARISON_FILE, PAGE_FILE}
    if any(
        (entry.name not in known and entry.suffix != ".png") or entry.is_dir() for entry in folder.iterdir()
    ):
        return False
    try:
        body = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and "format" in body and ("runs" in body or "comparison" in body)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name[:100]}.{os.getpid()}")


def as_json(result: LoadTestResult, with_requests: bool = True) -> dict[str, Any]:
    """Everything but single chunks' times; those are in `requests.csv`."""
    body = {
        "format": FORMAT,
        "started": result.started,
        "settings": _plain(result.settings),
        "machine": result.machine,
        "server": result.server,
        "sweep": result.sweep,
        "saturation": _plain(result.saturation),
        "client_limit": _plain(result.limit),
        "victim": _plain(result.victim),
        "notes": result.notes,
        "runs": [_run_json(run, with_requests) for run in result.runs],
    }
    return {name: value for name, value in body.items() if value is not None}


def json_bytes(body: Any) -> bytes:
    """JSON text; numbers that JSON does not know become null."""
    return (json.dumps(_finite(body), ensure_ascii=False, indent=1) + "\n").encode(errors="replace")


def requests_csv(result: LoadTestResult) -> bytes:
    """A line for each request, warm-up too. Times are milliseconds, or seconds after the run's start."""
    import io

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for run in result.runs:
        for phase, records in (("warmup", run.warmup), ("load", run.run.records)):
            writer.writerows(_csv_row(run.label, phase, record) for record in records)
    return text.getvalue().encode(errors="replace")


def read_result(place: Path) -> SavedResult:
    """A result of before, from its folder or its `results.json`.

    Raises:
        BadData: it is not one.
    """
    path = place / RESULTS_FILE if place.is_dir() else place
    fix = f"Name a folder that --output of a run made, or its {RESULTS_FILE}."
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["format"] != FORMAT:
            raise BadData(str(path), f"is of format {body['format']!r}, not {FORMAT}", "Measure again.")
        runs = tuple(map(_saved_run, body["runs"]))
        settings, server = body["settings"], body["server"]
        if not isinstance(settings, dict) or not isinstance(server, dict):
            raise TypeError("no mapping")
        return SavedResult(path.resolve().parent.name, settings, server, body.get("sweep"), runs)
    except OSError as error:
        raise BadData(str(path), f"cannot be read ({error.strerror})", fix) from error
    except BadData:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(str(path), "is no result of a load test, or a damaged one", fix) from error


def _saved_run(body: Mapping[str, Any]) -> SavedRun:
    """Raises an error of Python's if it is not what `_run_json` wrote."""
    requests, figures, check = body["requests"], body["figures"], body.get("check")
    values = {
        metric: [[float(value)] for value in requests[metric] if value is not None]
        for metric in ("ttft_ms", "tpot_ms", "e2el_ms")
    }
    values["itl_ms"] = [[float(gap) for gap in gaps] for gaps in requests["itl_ms"]]
    done_s, tokens = list(map(float, requests["done_s"])), list(map(int, requests["output_tokens"]))
    if not len(done_s) == len(tokens) == len(values["e2el_ms"]):
        raise ValueError("columns of different length")
    float(figures["whole"]["output_tokens_per_s"])
    if check is not None:
        for kind in ("changed", "wrong"):
            len(check[kind]) / max(1, check["compared"])
    return SavedRun(
        label=str(body["label"]),
        level=None if body.get("level") is None else float(body["level"]),
        figures=figures,
        check=check,
        client_bound=tuple(body["client_bound"]),
        ended_early=body.get("ended_early"),
        values=values,
        done_s=done_s,
        tokens=tokens,
    )


def _run_json(run: RunResult, with_requests: bool) -> dict[str, Any]:
    good = [record for record in run.run.records if record.error is None]
    body = {
        "label": run.label,
        "level": run.level,
        "adapters": run.adapters,
        "offered_per_s": run.offered_per_s,
        "planned": run.run.planned,
        "ended_early": run.ended_early,
        "client_bound": run.client_bound,
        "client_cost": _plain(run.cost),
        "asked_shares": dict(run.shares),
        "figures": _plain(run.figures),
        "error_details": _error_details(run.run.records),
        "check": _plain(run.check),
        "counters": _plain(run.counters) or None,
    }
    if with_requests:
        body["requests"] = {
            "model": [record.model for record in good],
            "sent_s": [_rounded(record.sent_s) for record in good],
            "done_s": [_rounded(record.done_s) for record in good],
            "output_tokens": [record.output_tokens for record in good],
            "ttft_ms": [_ms(record.ttft_s) for record in good],
            "tpot_ms": [_ms(record.tpot_s) for record in good],
            "e2el_ms": [_ms(record.e2el_s) for record in good],
            "itl_ms": [[_ms(gap) for gap in record.itl_s] for record in good],
        }
    return {name: value for name, value in body.items() if value is not None}


def _error_details(records: Sequence[RequestRecord]) -> dict[str, str]:
    """The first message of each kind of error."""
    details: dict[str, str] = {}
    for record in records:
        if record.error:
            details.setdefault(record.error, record.detail)
    return details


def _csv_row(label: str, phase: str, record: RequestRecord) -> Iterator[Any]:
    values = {
        "run": label,
        "phase": phase,
        "ttft_ms": _ms(record.ttft_s),
        "tpot_ms": _ms(record.tpot_s),
        "e2el_ms": _ms(record.e2el_s) if record.error is None else None,
        "due_s": None if record.due_s is None else _rounded(record.due_s),
        "begun_s": _rounded(record.begun_s),
        "sent_s": _rounded(record.sent_s),
        "itl_ms": " ".join(str(_ms(gap)) for gap in record.itl_s),
    }
    cells = (values[name] if name in values else getattr(record, name) for name in _COLUMNS)
    return (_no_formula(cell) if isinstance(cell, str) else cell for cell in cells)


def _no_formula(text: str) -> str:
    """What a server or a user wrote is text to a spreadsheet as well."""
    return f"'{text}" if text.startswith(("=", "+", "@", "\t", "\r")) else text


def _plain(value: Any) -> Any:
    if isinstance(value, Saturation):
        return {**dataclasses.asdict(value), "text": str(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
