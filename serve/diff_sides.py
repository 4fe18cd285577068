"""The two sides of `vllm-lora diff`: adapter folders, or versions in a state folder; and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.config_difference import BaseDifference, NamedBase, SettingDifference
from vllm_lora_ext.contract import ChatSettings, read_chat_settings, read_provenance
from vllm_lora_ext.difference import Weights, WeightsDifference, compare_tensors, compare_weights
from vllm_lora_ext.errors import AdapterRefused, BadBaseModel, BadInput, BadSetting
from vllm_lora_ext.files import RegularFile, read_whole
from vllm_lora_ext.peft_format import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    file_finding,
    read_adapter,
)
from vllm_lora_ext.spec import AdapterSpec, Severity
from vllm_lora_ext.strict_json import JsonRefused, parse_object
from vllm_lora_ext.tensor_file import HeaderRefused, TensorPlace, read_header

if TYPE_CHECKING:
    from train.diff_answers import AnswerDifference

LORA = "LORA"


@dataclass(frozen=True)
class Side:
    """One adapter, read: `text` is what the user called it; `spec` is None if it is no LoRA."""

    text: str
    folder: Path
    config: Mapping[str, Any]
    chat: ChatSettings
    base: NamedBase
    spec: AdapterSpec | None

    @property
    def peft_type(self) -> str:
        """As its config writes it, for example `LORA`."""
        return str(self.config["peft_type"])


@dataclass(frozen=True)
class Difference:
    """All that was found; `weights` is None where two PEFT types cannot be compared."""

    first: Side
    second: Side
    base: BaseDifference
    config: tuple[SettingDifference, ...]
    chat: tuple[SettingDifference, ...]
    weights: WeightsDifference | None
    answers: tuple[AnswerDifference, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether the two compute, or are asked, or answer otherwise. A base that cannot be told is no
        difference; one that is another is."""
        return (
            self.base.state == "other"
            or any(setting.counts for setting in (*self.config, *self.chat))
            or self.weights is None
            or self.weights.differs
            or any(answer.differs for answer in self.answers)
        )


@contextmanager
def open_side(text: str, state_dir: Path | None) -> Iterator[Side]:
    """Read a folder or, with `state_dir`, a version in it that `NAME` or `NAME@DIGEST` calls.

    Raises:
        BadSetting: there is no such folder.
        AdapterRefused, BadInput: it is no adapter, or cannot be read.
        AdapterUnknown, VersionMissing, VersionDamaged: the state folder does not have it whole.
    """
    if state_dir is None:
        yield _read_folder(text)
        return
    if not state_dir.is_dir():
        raise BadSetting(str(state_dir), "no such state folder", "The server prints which when it starts.")
    name, _, digest = text.partition("@")
    with Catalog(state_dir, readonly=True) as catalog:
        version, base = catalog.resolve(name, digest or None), catalog.base()
        with catalog.store.lease(version.digest) as stored:
            known = base and base["fingerprint"] == version.base
            named = NamedBase(base["name"] if known else None, version.base or None)
            yield _read(f"{name}@{version.short}", stored.folder, stored.chat, named)


def _read_folder(text: str) -> Side:
    folder = Path(text)
    if not folder.is_dir():
        fix = "Give an adapter's folder, or --state-dir for the names that were published there."
        raise BadSetting(text, "no such folder", fix)
    return _read(text, folder, read_chat_settings(folder), None)


def _read(text: str, folder: Path, chat: ChatSettings, base: NamedBase | None) -> Side:
    config = _read_config(text, folder)
    spec = None
    if config.get("peft_type") == LORA:
        reading = read_adapter(folder)
        spec = reading.spec
        if spec is None:
            findings = [item for item in reading.findings if item.severity is Severity.REFUSED]
            raise AdapterRefused(text, findings)
    return Side(text, folder, config, chat, base or _named_base(folder, config), spec)


def _read_config(text: str, folder: Path) -> dict[str, Any]:
    try:
        config = parse_object(read_whole(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        rule = f"holds no {CONFIG_FILE}, so it is no PEFT adapter"
        raise BadInput(text, rule, "Give an adapter's folder.") from None
    except JsonRefused as error:
        raise BadInput(f"{text}/{CONFIG_FILE}", error.rule, "Save it with PEFT again.") from error
    except (OSError, ValueError) as error:
        raise AdapterRefused(text, [file_finding(error, CONFIG_FILE)]) from error
    if not isinstance(config.get("peft_type"), str):
        raise BadInput(f"{text}/{CONFIG_FILE}", "does not say its peft_type", "Save it with PEFT again.")
    return config


def _named_base(folder: Path, config: Mapping[str, Any]) -> NamedBase:
    """What the config names; its fingerprint from `identity.json`, else from the base if that is here."""
    name = config.get("base_model_name_or_path")
    name = name if isinstance(name, str) and name else None
    stated = read_provenance(folder).get("base_model")
    if isinstance(stated, dict) and isinstance(stated.get("fingerprint"), str):
        return NamedBase(name, stated["fingerprint"])
    try:
        return NamedBase(name, read_base_model(name, offline=True).fingerprint if name else None)
    except BadBaseModel:
        return NamedBase(name)


def compare_sides(first: Side, second: Side) -> WeightsDifference | None:
    """What sets the weights apart; None if one adapter is of another PEFT type than the other.

    Raises:
        AdapterRefused, BadInput: the weights of one cannot be read.
    """
    if first.peft_type != second.peft_type:
        return None
    with ExitStack() as files:
        ours, theirs = (_open(side, files) for side in (first, second))
        try:
            if first.spec is None or second.spec is None:
                return compare_tensors(ours, theirs)
            return compare_weights(Weights(*ours, first.spec), Weights(*theirs, second.spec))
        except (OSError, ValueError) as error:
            raise AdapterRefused(
                f"{first.text} or {second.text}", [file_finding(error, WEIGHTS_FILE)]
            ) from error


def _open(side: Side, files: ExitStack) -> tuple[RegularFile, tuple[TensorPlace, ...]]:
    """An open file and where its tensors are."""
    try:
        file = files.enter_context(RegularFile(side.folder / WEIGHTS_FILE))
        return file, read_header(file)
    except FileNotFoundError:
        fix = "Save it with PEFT again, with safe_serialization=True."
        raise BadInput(side.text, f"holds no {WEIGHTS_FILE}", fix) from None
    except HeaderRefused as error:
        raise BadInput(f"{side.text}/{WEIGHTS_FILE}", error.rule, "Copy it again.") from error
    except (OSError, ValueError) as error:
        raise AdapterRefused(side.text, [file_finding(error, WEIGHTS_FILE)]) from error
