"""`vllm-lora diff A B`: what sets two adapters apart: settings, chat, modules, answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.diff_sides import Difference, compare_sides, open_side
from serve.diff_tables import print_difference
from serve.flags import add_allow_flag, at_least
from vllm_lora_ext.config_difference import SettingDifference, compare_bases, compare_chats, compare_configs
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.files import read_whole

if TYPE_CHECKING:
    from train.diff_answers import AnswerDifference

_MAX_TOKENS, _MAX_PROMPTS_BYTES = 128, 1 << 20


def main(argv: Sequence[str]) -> int:
    """Print what sets two adapters apart; with `--exit-code` 1 if anything does, else 0."""
    args = _parser().parse_args(argv)
    prompts = _prompts(args)
    with ExitStack() as open_sides:
        first, second = (
            open_sides.enter_context(open_side(text, args.state_dir)) for text in (args.first, args.second)
        )
        found = Difference(
            first,
            second,
            compare_bases(first.base, second.base),
            tuple(compare_configs(first.config, second.config)),
            tuple(compare_chats(first.chat, second.chat)),
            compare_sides(first, second),
        )
        if prompts:
            found = dataclasses.replace(found, answers=_answers(found, prompts, args))
    if args.json:
        print(json.dumps(_data(found), ensure_ascii=False, indent=2))
    else:
        print_difference(found, one_row_each=args.modules)
    return 1 if args.exit_code and found.differs else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lora diff",
        description="What sets two adapters apart: settings, chat settings, each module's update, answers.",
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A", help="an adapter's folder")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="A and B are names in this state folder, or versions of them: NAME, NAME@DIGEST",
    )
    parser.add_argument("--modules", action="store_true", help="a row for each module")
    parser.add_argument("--json", action="store_true", help="print data")
    parser.add_argument(
        "--exit-code", action="store_true", help="end with 1 if the two differ, as git diff does"
    )
    answers = parser.add_argument_group("answers", "ask both, greedily, with PEFT on their base")
    asked = answers.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    asked.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, in UTF-8")
    answers.add_argument("--base-model", metavar="DIR_OR_HUB_ID", help="default: the one that both name")
    answers.add_argument(
        "--max-tokens", type=at_least(1), metavar="N", help=f"of an answer (default: {_MAX_TOKENS})"
    )
    add_allow_flag(answers)
    return parser


def _prompts(args: argparse.Namespace) -> list[str]:
    if not (args.prompt or args.prompts):
        for flag in ("base_model", "max_tokens", "allow"):
            if getattr(args, flag):
                name = f"--{flag.replace('_', '-')}"
                raise BadSetting(name, "is for answers, and nothing is asked", "Give --prompt TEXT.")
        return []
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = read_whole(args.prompts, _MAX_PROMPTS_BYTES).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            rule = f"cannot be read ({reason})"
            raise BadSetting(str(args.prompts), rule, "Give a text file, one prompt a line.") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise BadSetting(str(args.prompts), "holds no prompt", "Write one prompt a line.")
    return [prompt.encode("utf-8", "replace").decode() for prompt in prompts]  # a shell may pass half a sign


def _answers(
    found: Difference, prompts: Sequence[str], args: argparse.Namespace
) -> tuple[AnswerDifference, ...]:
    from train.diff_answers import Speaker, compare_answers

    base = args.base_model or _agreed_base(found)
    speakers = [Speaker(side.folder, side.chat, side.config) for side in (found.first, found.second)]
    most = args.max_tokens or _MAX_TOKENS
    return tuple(compare_answers(speakers[0], speakers[1], prompts, base, most, args.allow))


def _agreed_base(found: Difference) -> str:
    """The base that both name, or the only one that is named."""
    names = [side.base.name for side in (found.first, found.second) if side.base.name]
    fix = "Give the base of both with --base-model."
    if not names:
        raise BadSetting("the base model", "is named by neither adapter", fix)
    if found.base.state == "other" or (len(names) == 2 and found.base.state == "unknown"):
        rule = f"is {found.base.first} of the first and {found.base.second} of the second"
        raise BadSetting("the base model", rule, fix)
    return next((name for name in names if Path(name).is_dir()), names[0])


def _data(found: Difference) -> dict[str, Any]:
    sides = {"first": found.first, "second": found.second}
    return {
        "differs": found.differs,
        **{which: {"adapter": side.text, "peft_type": side.peft_type} for which, side in sides.items()},
        "base": dataclasses.asdict(found.base),
        "config": [_setting_data(setting) for setting in found.config],
        "chat": [_setting_data(setting) for setting in found.chat],
        "weights": None if found.weights is None else dataclasses.asdict(found.weights),
        "answers": [{**dataclasses.asdict(item), "differs": item.differs} for item in found.answers],
    }


def _setting_data(setting: SettingDifference) -> dict[str, Any]:
    return {**dataclasses.asdict(setting), "counts": setting.counts}
