"""`vllm-lora merge`: adapters and their base become one full model that any server can load."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from train.answers import base_model_of
from train.export import check_output
from train.merge_adapter import MergeAdapter, open_adapter
from train.merge_base import INDEX_FILE, MergeBase, Stored, open_base
from train.merge_chat import CONFIG, copy_files, write_chat
from train.merge_combine import COMBINATIONS, Recipe, blocks
from train.merge_plan import make_plan
from train.merge_stream import PartialMerge, partial_folder, partial_merge, write_index, write_shards
from train.model import first_line
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadInput, BadSetting, OutputExists, TrainingFailed
from vllm_lora_ext.files import ReadFailed
from vllm_lora_ext.peft_format import public_name

_FORMAT = 1  # of the partial folder and of how numbers come about: a merge of another one is not gone on with
_ROOM = (errno.ENOSPC, errno.EDQUOT)


def merge(
    adapters: Path | Sequence[Path], base_model: str | None, output_dir: Path, recipe: Recipe | None = None
) -> None:
    """Write base + adapters to `output_dir`, in the base's dtype, files and names; `recipe` says how.

    The update is computed and added in float32 and rounded once. In memory are some rows of one tensor and
    the two matrices of its adapter. A merge that was killed goes on where it was when it is called again.

    Raises:
        OutputExists: there is something at `output_dir`.
        AdapterRefused: an adapter does not fit the base.
        BadBaseModel, BadSetting: the base cannot be read, or is not named anywhere.
        BadInput: something that cannot be merged.
        TrainingFailed: the disk is full, or broken.
    """
    if output_dir.exists():  # also one of ours: a merged model is never replaced
        raise OutputExists(str(output_dir), "is there already", "Choose another --output-dir.")
    check_output(output_dir, overwrite=False)
    folders = [adapters] if isinstance(adapters, Path) else list(adapters)
    recipe = recipe or Recipe((1.0,) * len(folders))
    if len(recipe.weights) != len(folders):
        rule = f"must be one for each of {len(folders)} adapters, are {len(recipe.weights)}"
        raise BadSetting("--weights", rule, "Give them in the order of the adapters.")
    base_name = base_model_of(folders[0], base_model)
    with ExitStack() as stack:
        base_config = read_base_model(base_name)
        base = stack.enter_context(open_base(base_name))
        opened = [stack.enter_context(open_adapter(folder, base_config)) for folder in folders]
        with _told_what_is_left(base_name, output_dir):
            _merge(base, opened, output_dir, recipe)


@contextmanager
def _told_what_is_left(base_name: str, output_dir: Path) -> Iterator[None]:
    """Errors of disks, and an interruption, with what a person can do then."""
    fix = f"The same command goes on after the last whole file; those are in {partial_folder(output_dir)}."
    try:
        yield
    except BadInput:
        raise
    except (ReadFailed, ValueError) as error:  # a file that became shorter is the latter
        rule = f"cannot be read any more ({getattr(error, 'strerror', None) or first_line(error)})"
        raise TrainingFailed(base_name, rule, f"Check its files and those of the adapter. {fix}") from error
    except OSError as error:
        full = error.errno in _ROOM
        reason = "the disk is full" if full else error.strerror or first_line(error)
        raise TrainingFailed(str(output_dir), f"cannot be written ({reason})", fix) from error
    except KeyboardInterrupt:
        _say(fix)
        raise


def _merge(base: MergeBase, adapters: Sequence[MergeAdapter], output_dir: Path, recipe: Recipe) -> None:
    from tqdm import tqdm

    plan = make_plan(base, adapters)
    _judge_copies(base, adapters)
    _say_room(output_dir, plan.size_bytes)
    every_s = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets few lines
    with partial_merge(output_dir, _belongs_to(base, adapters, recipe)) as partial:
        if partial.resume():
            _say(f"going on with a merge that ended before: {len(partial.digests)} files are there")
        bar = tqdm(total=plan.size_bytes, desc="merging", unit="B", unit_scale=True, mininterval=every_s)
        with bar:
            write_shards(plan, recipe, partial, bar.update)
        write_index(plan, base.index, partial.folder, INDEX_FILE)
        copy_files(base, partial.folder, plan.is_untied)
        notices = write_chat(
            base, adapters, recipe, partial.folder, public_name(output_dir), _digests(partial)
        )
    if plan.is_untied:
        notices.append("embedding and head were one tensor and are two now, since only one of them changed")
    for notice in notices:
        _say(notice)


def _judge_copies(base: MergeBase, adapters: Sequence[MergeAdapter]) -> None:
    """Copies of the base's embedding beside an adapter must be the base's: else it was trained on another."""
    tensors = base.tensors
    for adapter in adapters:
        for name, copy in adapter.copies.items():
            stored = tensors.get(name.replace(".base_layer.", "."))
            if stored is None:  # of a tied head
                continue
            if stored.shape != copy.shape or not all(
                _are_near(stored, copy, *rows) for rows in blocks(stored)
            ):
                rule = f"brings {name}, which is not the tensor of {base.name}"
                fix = "Merge it into the base that it was trained on; new tokens cannot be merged."
                raise BadInput(str(adapter.path), rule, fix)


def _are_near(one: Stored, other: Stored, start: int, stop: int) -> bool:
    """Equal up to the rounding of bfloat16."""
    import torch

    return bool(torch.allclose(one.read(start, stop), other.read(start, stop), rtol=2**-7, atol=1e-4))


def _belongs_to(base: MergeBase, adapters: Sequence[MergeAdapter], recipe: Recipe) -> str:
    """Tells this merge from any other."""
    chats = [adapter.inspection.chat.canonical() for adapter in adapters]
    parts = [_FORMAT, base.digest(), [adapter.digest for adapter in adapters], chats, recipe.as_json()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digests(partial: PartialMerge) -> dict[str, str]:
    config = hashlib.sha256((partial.folder / CONFIG).read_bytes()).hexdigest()
    return {CONFIG: config, **partial.digests}


def _say_room(output_dir: Path, needed: int) -> None:
    """No refusal: some file systems compress, or share blocks."""
    free = shutil.disk_usage(output_dir.parent).free
    if free < needed:
        _say(f"warning: the model has {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on the disk")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Merge from command-line arguments; prints the folder of the merged model on stdout."""
    args = _parser().parse_args(argv)
    weights = tuple(args.weights or [1.0] * len(args.adapters))
    recipe = Recipe(weights, args.combination, args.density, args.seed)
    merge(args.adapters, args.base_model, args.output_dir, recipe)
    if args.check:
        from train.merge_check import check_in_own_process

        base_name = base_model_of(args.adapters[0], args.base_model)
        for line in check_in_own_process(args.adapters, base_name, args.output_dir, recipe):
            _say(line)
    print(args.output_dir)
    print("Serve it with: vllm-lora serve", args.output_dir, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lora merge",
        description="Merge adapters into their base model: one full model, no LoRA at run time.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "adapters", type=Path, nargs="+", metavar="DIR", help="an adapter's folder, or several"
    )
    parser.add_argument("--base-model", help="their base (default: the one that the first config names)")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="how much of each adapter (default: 1 each)"
    )
    parser.add_argument(
        "--combination", choices=COMBINATIONS, default="linear", help="of several adapters (default: linear)"
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="share of each adapter that ties, dare_* and magnitude_prune keep",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what dare_* drop (default: 0)")
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not compare the result with base and adapter afterwards",
    )
    return parser
