"""Checkpoints of a run: whole or not there, and only ever gone on from with the same settings."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import TrainConfig
from vllm_lora_ext.errors import BadSetting, TrainingFailed

if TYPE_CHECKING:
    import torch

SETTINGS_FILE = "settings.json"
WEIGHTS_FILE = "trained.safetensors"
BEST_FILE = "best.safetensors"
COMPLETE_FILE = "complete"
KEPT = 2  # the newest may be cut short by a kill; the one before it is whole
EVERY_S = 60.0  # by default at the end of an epoch, and not more often than this
LAST_S = 10.0  # what a run has done since the last one is saved once more at its end, if it is worth it
# What may differ between a run and its continuation: it changes no weight.
_FREE = (
    "overwrite",
    "resume",
    "preview",
    "dry_run",
    "logging_steps",
    "save_steps",
    "report_to",
    "publish",
    "serve_check",
    "gradient_checkpointing",
    "data",  # where the data lie; what is in them has a digest
    "output_dir",
)


class Checkpoints:
    """The hidden folder of a run, beside the place of its adapter."""

    def __init__(self, config: TrainConfig) -> None:
        self.folder = config.checkpoint_dir
        self._settings = _settings(config)
        self._resume, self._overwrite = config.resume, config.overwrite

    def begin(self, **facts: str) -> Path | None:
        """The checkpoint to go on from, None for a new run; the folder is there then.

        `facts` are what else must be the same: digest of the data, fingerprint and dtype of the base.

        Raises:
            BadSetting: an interrupted run is there and nothing is said about it; or settings or facts have
                changed since it began.
            TrainingFailed: the folder cannot be written.
        """
        settings = {**self._settings, **facts}
        self.require_intended()
        last = self.last()
        if last is not None and self._resume:
            self._require_same(settings)
            return last
        self.remove()
        text = json.dumps(settings, ensure_ascii=False, indent=1) + "\n"
        try:
            self.folder.mkdir(parents=True)
            (self.folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            rule = f"cannot be written ({error.strerror})"
            raise TrainingFailed(
                str(self.folder), rule, "Free some space, or change --output-dir."
            ) from error
        return None

    def require_intended(self) -> None:
        """Raises:
        BadSetting: an interrupted run is there, and nothing is said about it.
        """
        last = self.last()
        if last is not None and not self._resume and not self._overwrite:
            raise BadSetting(
                str(self.folder),
                f"an interrupted run of this name has a checkpoint ({last.name})",
                "Add --resume to go on from it, or --overwrite to begin anew.",
            )

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = [path.parent for path in self.folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def way_back(self) -> str:
        """What to tell somebody whose run broke off."""
        last = self.last()
        if last is None:
            return "No checkpoint was written yet."
        return f"Go on from {last} with the same command and --resume."

    def remove(self) -> None:
        """Remove all of it: the run is finished, or begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _require_same(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads((self.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        changed = sorted(name for name in settings if before.get(name) != settings[name])
        if changed:
            raise BadSetting(
                f"--resume: {', '.join(changed)}",
                "differs from the run that is to be resumed"
                if len(changed) == 1
                else "differ from the run that is to be resumed",
                f"Give what {self.folder / SETTINGS_FILE} says, or --overwrite to begin anew.",
            )


def changed_settings(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Which settings that matter are not those of a finished run; `before` is what its folder states."""
    rate = {} if config.learning_rate is not None else {"learning_rate": before.get("learning_rate")}
    now = {**_settings(config), **rate}  # a folder states the rate that the default came to
    return sorted(name for name, value in now.items() if before.get(name) != value)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What has to be the same for a run to be gone on with."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in _FREE
    }


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write what is trained under a temporary name and rename it."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    partial.rename(path)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Put saved weights back in place; the parameters stay the same objects."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path), strict=False)


class Pace:
    """Says when the next checkpoint is due: every so many steps, else at an epoch's end after a minute."""

    def __init__(self, save_steps: int) -> None:
        self._steps, self._last = save_steps, time.monotonic()

    def is_due(self, step: int, last_step: int, epoch_ended: bool) -> bool:
        """Asked after each step and each epoch."""
        passed = time.monotonic() - self._last
        if step >= last_step and passed >= LAST_S:
            return True
        if self._steps:
            return not epoch_ended and step % self._steps == 0
        return epoch_ended and passed >= EVERY_S

    def saved(self) -> None:
        """Count from now on."""
        self._last = time.monotonic()
