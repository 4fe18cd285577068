"""The only reader and writer of PEFT adapter folders: `adapter_config.json` and the header of the weights.

Reading never stops at the first problem: what is wrong comes back as findings, all of them at once.
Weights stay on disk; only the safetensors header is read. Files are opened by their known names and
nothing else in a folder is looked at: optimizer states and sub-checkpoints beside them are no concern.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from vllm_lora_ext.files import RegularFile, TooLarge, read_whole
from vllm_lora_ext.findings import file_finding as file_finding
from vllm_lora_ext.findings import fold as fold
from vllm_lora_ext.peft_config import SAVE_AGAIN, judge_config, pattern_name, resolve_pattern
from vllm_lora_ext.spec import AdapterSpec, Finding, TensorSpec, folder_name, printable
from vllm_lora_ext.strict_json import JsonRefused, parse_object, plain_number
from vllm_lora_ext.targeting import untargeted
from vllm_lora_ext.tensor_file import MAX_TENSORS, HeaderRefused, TensorPlace, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_OF_FULL_MODELS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("adapter_model.bin", "adapter_model.pt")
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 16 << 30
_MAX_PARTS = 4  # of a name, which is how deep a folder of adapters is looked through
_MAX_ENTRIES = 10_000  # files and folders beside the adapter's
_COPY_AGAIN = "Copy it again, or save the adapter with PEFT again."

TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>[\w.-]+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)


@dataclass(frozen=True)
class AdapterReading:
    """What a folder holds: `spec` unless it is unreadable, and every finding on the way."""

    spec: AdapterSpec | None
    findings: tuple[Finding, ...]
    places: tuple[TensorPlace, ...] = ()


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder means to be an adapter: it has a config or weights of one, or nobody may look."""
    return any(_may_exist(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE, *PICKLES))


def _may_exist(path: Path, follow_links: bool = True) -> bool:
    try:
        path.stat(follow_symlinks=follow_links)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:  # whoever reads it is told why it cannot be read
        return True
    return True


def adapter_folders(directory: Path) -> dict[str, Path]:
    """Name -> folder of the adapters of a directory: itself if it is one, else its visible folders.

    A folder that is no adapter and holds adapters gives names of several parts, `org/name`; one that cannot
    be looked into counts as an adapter, which is then refused.

    Raises:
        OSError: `directory` itself cannot be listed, which is not the same as being empty.
    """
    folders = _visible_folders(directory)
    if is_adapter_folder(directory):
        return {public_name(directory): directory}
    found = {}
    for folder in folders:
        inner = {} if is_adapter_folder(folder) else _inner_adapters(folder, _MAX_PARTS - 1)
        found.update(inner or {public_name(folder): folder})
    return found


def public_name(folder: Path) -> str:
    """The folder's name in Unicode's composed form: some file systems keep names in the other one.

    What is no UTF-8 is written as `\\xff`, so that every name can be printed; none with it is taken.
    """
    name = folder_name(folder)
    try:
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half characters that come from no file system
        name = name.encode("ascii", "backslashreplace").decode()
    return unicodedata.normalize("NFC", name)


def _inner_adapters(folder: Path, depth: int) -> dict[str, Path]:
    """The adapters below a folder that is none, with its name before theirs."""
    try:
        below = _visible_folders(folder)
    except OSError:
        return {}
    found: dict[str, Path] = {}
    for inner in below:
        if is_adapter_folder(inner):
            found[public_name(inner)] = inner
        elif depth > 1:
            found.update(_inner_adapters(inner, depth - 1))
    return {f"{public_name(folder)}/{name}": adapter for name, adapter in found.items()}


def _visible_folders(directory: Path) -> list[Path]:
    """Neither hidden ones nor the checkpoints that a training run leaves on its way."""
    entries = sorted(directory.iterdir())
    return [
        entry
        for entry in entries
        if not entry.name.startswith((".", "checkpoint-")) and _may_be_folder(entry)
    ]


def _may_be_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return True


def named_base_model(path: Path) -> str | None:
    """The base model that an adapter's config names; None if there is none to read."""
    config, _ = _read_config(path / CONFIG_FILE, follow_links=True)
    named = (config or {}).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def read_adapter(path: Path, name: str | None = None, follow_links: bool = True) -> AdapterReading:
    """Read one adapter folder; `name` is its public name, by default the folder's.

    `follow_links` is for folders of the operator, where hub caches, git-sync and Kubernetes put links.
    """
    name = public_name(path) if name is None else name
    findings = _judge_folder(path, follow_links)
    if findings:
        return AdapterReading(None, tuple(findings))
    config, findings = _read_config(path / CONFIG_FILE, follow_links)
    places, size, weight_findings = _read_weights(path, follow_links)
    findings += weight_findings
    if config is not None:
        findings += judge_config(config)
    if config is None or places is None or any(finding.code in _UNREADABLE for finding in findings):
        return AdapterReading(None, tuple(fold(findings)))
    modules = modules_of(place.spec for place in places)
    if len(modules) > MAX_TENSORS // 2:  # more than there can be pairs
        rule = f"names {len(modules)} modules, at most {MAX_TENSORS // 2} are taken"
        findings.append(Finding("too_large", WEIGHTS_FILE, rule, "Train a smaller adapter."))
        return AdapterReading(None, tuple(fold(findings)))
    spec = _spec(name, path, config, places, size, modules)
    findings += _judge_targeting(config, modules)
    return AdapterReading(spec, tuple(fold(findings)), places)


# With one of these there is no rank, alpha or pattern to speak of.
_UNREADABLE = (
    "rank_invalid",
    "alpha_invalid",
    "pattern_unsupported",
    "config_invalid",
    "target_modules_invalid",
)


def _spec(
    name: str,
    path: Path,
    config: Mapping[str, Any],
    places: tuple[TensorPlace, ...],
    size: int,
    modules: list[str],
) -> AdapterSpec:
    tensors = tuple(sorted((place.spec for place in places), key=attrgetter("name")))
    base_model = config.get("base_model_name_or_path")
    return AdapterSpec(
        name=name,
        path=path,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        rank=config["r"],
        alpha=config["lora_alpha"],
        tensors=tensors,
        size_bytes=size,
        ranks=resolve_pattern(config.get("rank_pattern") or {}, modules),
        alphas=resolve_pattern(config.get("alpha_pattern") or {}, modules),
        use_rslora=config.get("use_rslora") is True,
        heads=tuple(config.get("modules_to_save") or ()),
        target_parameters=tuple(config.get("target_parameters") or ()),
    )


def modules_of(tensors: Iterable[TensorSpec]) -> list[str]:
    """The modules that have an A or a B among `tensors`, by name."""
    matches = (TENSOR_NAME.fullmatch(tensor.name) for tensor in tensors)
    return sorted({match["module"] for match in matches if match})


def _judge_targeting(config: Mapping[str, Any], modules: list[str]) -> list[Finding]:
    missed = untargeted(config, modules)
    if not missed:
        return []
    rule = (
        f"do not name {len(missed)} of the {len(modules)} modules in {WEIGHTS_FILE}, for example {missed[0]}"
    )
    fix = "Save the adapter again, with the config that it was trained with."
    return [Finding("target_modules_mismatch", "target_modules", rule, fix)]


def _judge_folder(path: Path, follow_links: bool) -> list[Finding]:
    name = printable(public_name(path) or str(path))[:80]
    try:
        if not follow_links and path.is_symlink():
            return [Finding("link_refused", name, "is a link", "Upload the files themselves.")]
        if not path.is_dir():
            return [Finding("adapter_missing", name, "no such folder", "Check the path.")]
        with os.scandir(path) as entries:
            count = sum(1 for _ in itertools.islice(entries, _MAX_ENTRIES + 1))
    except (OSError, ValueError) as error:
        return [file_finding(error, name)]
    if not is_adapter_folder(path) and any(_may_exist(path / name) for name in _OF_FULL_MODELS):
        rule = "is not there: the folder is a full model, no adapter"
        return [Finding("config_missing", CONFIG_FILE, rule, "Serve it as a base: vllm-lora serve FOLDER.")]
    if count > _MAX_ENTRIES:
        rule = f"holds more than {_MAX_ENTRIES} files"
        return [Finding("too_many_files", name, rule, "Give the adapter a folder of its own.")]
    return []


def _read_config(path: Path, follow_links: bool) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    if not _may_exist(path, follow_links=False):
        rule = "is not there, so this is not a PEFT adapter"
        return None, [Finding("config_missing", CONFIG_FILE, rule, SAVE_AGAIN)]
    try:
        return parse_object(read_whole(path, MAX_CONFIG_BYTES, follow_links)), []
    except TooLarge:
        rule = f"is larger than {MAX_CONFIG_BYTES} bytes"
        return None, [Finding("config_too_large", CONFIG_FILE, rule, SAVE_AGAIN)]
    except JsonRefused as error:
        return None, [Finding(f"config_{error.code}", CONFIG_FILE, error.rule, SAVE_AGAIN)]
    except (OSError, ValueError) as error:
        return None, [file_finding(error, CONFIG_FILE)]


def _read_weights(
    path: Path, follow_links: bool
) -> tuple[tuple[TensorPlace, ...] | None, int, list[Finding]]:
    weights = path / WEIGHTS_FILE
    if not _may_exist(weights, follow_links=False):
        return None, 0, [_missing_weights(path)]
    try:
        with RegularFile(weights, follow_links) as file:
            if file.size > MAX_WEIGHTS_BYTES:
                rule = f"has {file.size} bytes, at most {MAX_WEIGHTS_BYTES} are taken"
                return None, 0, [Finding("too_large", WEIGHTS_FILE, rule, "Train a smaller adapter.")]
            places = read_header(file)
    except HeaderRefused as error:
        return None, 0, [Finding(error.code, WEIGHTS_FILE, error.rule, _COPY_AGAIN)]
    except (OSError, ValueError) as error:
        return None, 0, [file_finding(error, WEIGHTS_FILE)]
    if not places:
        return (), 0, [Finding("adapter_empty", WEIGHTS_FILE, "holds no tensor", "Train it again.")]
    return places, file.size, []


def _missing_weights(path: Path) -> Finding:
    pickles = [name for name in PICKLES if os.path.lexists(path / name)]
    if pickles:
        rule = "is a pickle, which can run code when it is loaded"
        fix = (
            "Convert it where you trust it: PeftModel.from_pretrained(base, folder)"
            ".save_pretrained(folder, safe_serialization=True)."
        )
        return Finding("pickle_refused", pickles[0], rule, fix)
    fix = "Copy the weights, or save the adapter with PEFT again."
    return Finding("weights_missing", WEIGHTS_FILE, "is not there", fix)


def canonical_config(spec: AdapterSpec) -> dict[str, Any]:
    """The config of an adapter as we keep it: what decides what it computes, in one form only.

    A whole number is written as one, whatever way it came. Modules stand under their full names, so no
    pattern is left to interpret. Loads in PEFT and vLLM.
    """
    modules = modules_of(spec.tensors)
    targets = [module for module in modules if not (spec.target_parameters and ".experts" in module)]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": plain_number(spec.alpha),
        "bias": "none",
        "target_modules": targets or None,
        "use_rslora": spec.use_rslora,
        "rank_pattern": _differing(spec.ranks, spec.rank, modules),
        "alpha_pattern": _differing(spec.alphas, spec.alpha, modules),
        "inference_mode": True,
    }
    if spec.heads:
        config |= {"modules_to_save": sorted(spec.heads), "task_type": "SEQ_CLS"}
    if spec.target_parameters:
        config["target_parameters"] = sorted(spec.target_parameters)
    return config


def _differing(values: Mapping[str, Any], usual: Any, modules: list[str]) -> dict[str, Any]:
    """Pattern -> value where it is not the usual one; by last name where all modules of that name agree.

    Short, because vLLM goes through all patterns for every module.
    """
    by_last_name: dict[str, set[Any]] = {}
    for module in modules:
        last = pattern_name(module).rpartition(".")[2]
        by_last_name.setdefault(last, set()).add(values.get(module, usual))
    pattern = {}
    for module, value in sorted(values.items()):
        last = pattern_name(module).rpartition(".")[2]
        if value != usual:
            short = len(by_last_name[last]) == 1
            pattern[last if short else f"^{pattern_name(module)}"] = plain_number(value)
    return pattern
