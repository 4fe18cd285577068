"""`vllm-lora convert`: any PEFT adapter becomes a LoRA that vLLM serves, exactly or with an error told."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.export import Extras, check_output, written_whole
from vllm_lora_ext.errors import BadBaseModel, BadSetting, OutputExists
from vllm_lora_ext.inspection import Rules, inspect_adapter, require_admitted
from vllm_lora_ext.peft_format import public_name

if TYPE_CHECKING:
    from train.conversion.check import Verdict
    from train.conversion.factors import Factors
    from train.conversion.plan import Plan
    from train.conversion.reduction import Limits, ModuleResult


@dataclass(frozen=True)
class Conversion:
    """What was made, by which `method`, of each module, and what the `check` at the end said."""

    peft_type: str
    method: str
    modules: tuple[ModuleResult, ...]
    is_exact: bool
    check: str
    findings: tuple[str, ...] = ()  # what a server says of it, short of refusing it


def convert(
    adapter_dir: Path,
    output_dir: Path,
    base_model: str | None = None,
    limits: Limits | None = None,
    initial_adapter: Path | None = None,
) -> Conversion:
    """Write `adapter_dir` as an ordinary LoRA to `output_dir`.

    Exact where mathematics allows it, at the rank that this takes. With a largest rank in `limits`, each
    module gets the smallest rank whose best approximation stays within the allowed error. `initial_adapter`
    is the adapter as it was before its first step, for methods that begin at a part of the base.

    Raises:
        OutputExists: there is something at `output_dir`.
        BadSetting: a flag is impossible, or one is needed that was not given.
        BadBaseModel: the base is needed, or given, and cannot be read.
        BadInput: the adapter cannot be read; no LoRA is equal to it, or close enough (`TooFar`).
        AdapterRefused: what came of it would not be served, for example because it fits another base.
        VllmLoraError: the check at the end found a difference; nothing was written.
    """
    from train.conversion.plan import make_plan
    from train.conversion.reduction import Limits, reduced
    from train.conversion.source import full_model_advice, open_source

    limits = limits or Limits()
    _require_possible(output_dir, limits)
    with open_source(adapter_dir) as source:
        plan = make_plan(source, base_model, initial_adapter)
        factors, results = reduced(plan.spectra(), limits, full_model_advice(source.peft_type))
        with written_whole(output_dir, False, Extras()) as staging:
            return _written(staging, plan, factors, results, public_name(output_dir))


def _require_possible(output_dir: Path, limits: Limits) -> None:
    from train.conversion.reduction import MAX_SERVED_RANK

    if limits.max_rank is not None and not 1 <= limits.max_rank <= MAX_SERVED_RANK:
        raise BadSetting(
            f"--max-rank {limits.max_rank}", f"must be from 1 to {MAX_SERVED_RANK}", "Choose another."
        )
    if not 0 < limits.max_error < 1:
        raise BadSetting(
            f"--max-error {limits.max_error}", "must lie between 0 and 1", "0.01 is one per cent."
        )
    if output_dir.exists() or output_dir.is_symlink():
        raise OutputExists(str(output_dir), "is there already", "Choose another --output-dir.")
    check_output(output_dir, overwrite=False)


def _written(
    folder: Path, plan: Plan, factors: Mapping[str, Factors], results: tuple[ModuleResult, ...], name: str
) -> Conversion:
    from train.conversion.reduction import EXACT
    from train.conversion.written import carry_chat_files, write_lora

    source, base = plan.source, plan.base
    named = source.config.get("base_model_name_or_path") if base is None else base.name
    write_lora(folder, factors, frozenset(plan.vocabulary), named, source.config.get("task_type"))
    is_exact = max(one.error for one in results) <= EXACT
    rules = Rules(base, (base.public_name,)) if base is not None else Rules()
    carry_chat_files(source.folder, folder, name, {})
    inspection = inspect_adapter(folder, rules, name)
    require_admitted(inspection)
    check = str(_checked(folder, plan, factors, is_exact))
    findings = tuple(str(finding) for finding in inspection.findings)
    conversion = Conversion(source.peft_type, plan.method, results, is_exact, check, findings)
    carry_chat_files(source.folder, folder, name, asdict(conversion))
    return conversion


def _checked(folder: Path, plan: Plan, factors: Mapping[str, Factors], is_exact: bool) -> Verdict:
    """Logits where there is a base and PEFT can load what there was; else each module's own outputs."""
    from train.conversion.check import compare_logits, compare_outputs, most_changed

    tokens = [token for name in plan.vocabulary for token in most_changed(factors[name])]
    if plan.changes is None:
        assert plan.base is not None
        return compare_logits(plan.source.folder, folder, plan.base.name, is_exact, tokens)
    if plan.base is not None and plan.peft_can_load:
        try:
            return compare_logits(plan.source.folder, folder, plan.base.name, is_exact, tokens)
        except BadBaseModel as error:  # its config was enough until here
            print(f"note: no logits were compared ({error})", file=sys.stderr)
    return compare_outputs(plan.changes, factors, is_exact)


def main(argv: Sequence[str]) -> int:
    """Convert from command-line arguments; stdout has a line for each module, or one JSON object."""
    from train.conversion.reduction import Limits, TooFar

    args = _parser().parse_args(argv)
    limits = Limits(args.max_rank, args.max_error)
    try:
        conversion = convert(args.adapter, args.output_dir, args.base_model, limits, args.initial_adapter)
    except TooFar as error:
        print("\n".join(_lines(error.results)), file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"output_dir": str(args.output_dir), **asdict(conversion)}, indent=2))
    else:
        print("\n".join(_lines(conversion.modules)))
    kind = "exact" if conversion.is_exact else "an approximation"
    print(f"{conversion.peft_type}: {conversion.method}; {kind}", file=sys.stderr)
    print("\n".join((*conversion.findings, f"checked: {conversion.check}")), file=sys.stderr)
    print(f"Serve it with: vllm-lora serve --adapters {args.output_dir}", file=sys.stderr)
    return 0


def _lines(results: Sequence[ModuleResult]) -> list[str]:
    width = max(len(one.module) for one in results)
    head = f"{'module':{width}}  rank  error"
    return [head, *(f"{one.module:{width}}  {one.rank:4}  {one.error:.2e}" for one in results)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lora convert",
        description="Make of any PEFT adapter a LoRA that vLLM serves, and check that it does the same.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", type=Path, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--base-model", help="its base (default: the one its config names, if it is here)")
    parser.add_argument("--max-rank", type=int, help="take the closest LoRA up to this rank (default: exact)")
    parser.add_argument(
        "--max-error",
        type=float,
        default=0.01,
        help="share of a module's change that --max-rank may leave out (default: %(default)s)",
    )
    parser.add_argument(
        "--initial-adapter",
        type=Path,
        metavar="DIR",
        help="PiSSA, OLoRA, CorDA: the adapter as it was before its first step",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser
