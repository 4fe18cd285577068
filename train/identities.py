"""Several identities to be trained in one run: from a file, or a folder, to one `TrainConfig` for each.

A file holds settings for all, and under `identities` a mapping from name to settings (or a list of settings
with their `name`). A folder holds for each a file of rows, NAME.json, or settings, NAME.yaml, or both.
Flags win over an identity's own settings, these over those for all in the file, and these over `--config`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from train.config import TrainConfig, flag
from train.formats import TEXT_SUFFIXES
from train.settings_file import Body, read_body, typed_settings
from vllm_lora_ext.errors import BadInput, BadSetting, IdentitiesRefused, VllmLoraError
from vllm_lora_ext.names import name_key

MODES = ("fast", "exact")
_ROWS = (*TEXT_SUFFIXES, ".parquet")
_SETTINGS = (".yaml", ".yml")
# What all share: the base in memory, and what the command as a whole does.
FOR_ALL = (
    *("base_model", "method", "dtype", "gradient_checkpointing", "output_dir", "overwrite", "resume"),
    *("publish", "report_to", "preview", "dry_run"),
)
_REPORTERS = ("none", "tensorboard")


@dataclass(frozen=True)
class JointConfig:
    """The identities of one run, and how they share it."""

    configs: tuple[TrainConfig, ...]
    mode: str = flag(
        "fast: rows of all share each pass over the base; exact: each has passes of its own, and its weights "
        "are bit for bit those of a run alone",
        "fast",
        choices=MODES,
    )
    tokens_per_pass: int = flag("most tokens in one pass; more take several, which needs less memory", 4096)
    verify_one: str | None = flag(
        "train this one anew, alone, compare it with the folder that a joint run has left, and end",
        None,
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        if self.tokens_per_pass < 1:
            raise BadSetting(
                "--tokens-per-pass", f"{self.tokens_per_pass} is out of range", "Give 1 or more."
            )
        names = [config.name for config in self.configs]
        if self.verify_one is not None and self.verify_one not in names:
            rule, fix = "is none of the identities", f"They are: {', '.join(names)}."
            raise BadSetting(f"--verify-one {self.verify_one}", rule, fix)
        for item, rule, fix in self._contradictions():
            raise BadSetting(item, rule, fix)

    def _contradictions(self) -> Iterator[tuple[str, str, str]]:
        first = self.configs[0]
        if first.method == "full":
            yield "--method full", "trains the base itself, which several share", "Use --method lora."
        if first.method == "dora" and self.mode == "fast":
            rule = "trains in a way that rows of several identities cannot share"
            yield "--method dora", rule, "Use --mode exact."
        for name in first.report_to:
            if name not in _REPORTERS:
                rule = "has one run at a time in a process"
                yield f"--report-to {name}", rule, "Use tensorboard, or train one after another."


def read_identities(
    place: Path, common: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[TrainConfig, ...]:
    """One config for each identity that `place` names, in its order.

    Raises:
        BadSetting: `place` cannot be read, or holds no identity.
        IdentitiesRefused: names that stand there twice, settings that are unknown or out of range, files
            that are missing; all of them at once.
    """
    for key in ("name", "data"):
        if key in flags:
            rule, fix = "belongs to one identity, and there are several", "State it for each of them."
            raise BadSetting(f"--{key}", rule, fix)
    found = list(_of_folder(place) if place.is_dir() else _of_file(place))
    if not found:
        rule = "holds no identity"
        raise BadSetting(f"--identities {place}", rule, "See docs/joint-training.md for how it looks.")
    problems: list[tuple[str, VllmLoraError]] = [*_same_names([one.name for one in found])]
    configs = []
    for one in found:
        try:
            configs.append(one.config(common, flags))
        except BadInput as error:
            problems.append((one.name, error))
        else:
            problems += [(one.name, missing) for missing in _missing_files(configs[-1])]
    if problems:
        raise IdentitiesRefused(problems)
    return tuple(configs)


@dataclass(frozen=True)
class _Found:
    """An identity as it stands: settings of its own, those for all, and where it stands."""

    name: str
    own: Any
    where: str
    for_all: Body | None = None

    def config(self, common: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainConfig:
        if not isinstance(self.own, Body):
            raise BadSetting(
                self.where, "must hold settings as `key: value`", "For example `data: rows.json`."
            )
        own = typed_settings(self.own, self.where)
        for key in FOR_ALL:
            if key in own:
                rule = "is the same for all identities"
                raise BadSetting(f"{self.where}: {key}", rule, "State it once, above them or as a flag.")
        for_all = typed_settings(self.for_all, self.where.partition(":")[0]) if self.for_all else {}
        values = {**common, **for_all, **own, **flags, "name": self.name}
        needed = [item for item in fields(TrainConfig) if item.default is dataclasses.MISSING]
        missing = [item.name for item in needed if item.name not in values]
        if missing:
            rule = f"has no {' and no '.join(missing)}"
            raise BadSetting(self.where, rule, "State it there, for all, or as a flag.")
        return TrainConfig(**values)


def _of_file(path: Path) -> Iterator[_Found]:
    body = read_body(path)
    for key, _ in body.again:
        raise BadSetting(f"{path}: {key}", "stands there twice", "Leave one of them out.")
    stated = body.pop("identities", None)
    if isinstance(stated, Body):
        for name, own in (*stated.items(), *stated.again):
            yield _Found(str(name), own, f"{path}: {name}", body)
    elif isinstance(stated, list):
        for number, own in enumerate(stated, start=1):
            name = own.pop("name", None) if isinstance(own, Body) else None
            yield _Found(str(name or number), own, f"{path}: {name or f'identity {number}'}", body)
    else:
        rule = "has no `identities` with the settings of each by its name"
        raise BadSetting(str(path), rule, "See docs/joint-training.md for how it looks.")


def _of_folder(folder: Path) -> Iterator[_Found]:
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    rows: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if path.suffix.lower() in _ROWS:
            rows[path.stem].append(path)
    settings = [path for path in paths if path.suffix.lower() in _SETTINGS]
    for path in settings:
        body = read_body(path)
        beside = [str(found) for found in rows.pop(path.stem, ())]
        if beside and "data" not in body:
            body["data"] = beside
        yield _Found(str(body.pop("name", path.stem)), body, str(path))
    for name, files in rows.items():
        for path in files:
            body = Body(data=str(path))
            body.again = []
            yield _Found(name, body, str(path))


def _same_names(names: list[str]) -> Iterator[tuple[str, BadSetting]]:
    counts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        counts[name_key(name)].append(name)
    for same in counts.values():
        if len(same) > 1:
            rule = f"is the name of {len(same)} identities"
            yield same[0], BadSetting(" and ".join(dict.fromkeys(same)), rule, "Rename all but one.")


def _missing_files(config: TrainConfig) -> Iterator[BadSetting]:
    for name in config.data:
        path = Path(name)
        if path.suffix.lower() in _ROWS and not path.exists():
            yield BadSetting(name, "is not there", "Check `data`.")
