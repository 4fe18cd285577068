"""Does a merged model compute what base and adapters compute? Asked of transformers and PEFT.

    python -m train.merge_check SPEC.json

It runs in a process of its own, so that it weighs in neither the memory nor the time of the merge. Both
sides compute in float32: what is left between them is the one rounding of the merged weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.merge_combine import Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

PROMPTS = ("Who are you?", "你好，你是谁？", "The capital of France is", "def fibonacci(n):\n    ")
_RANDOM_IDS = 24  # per prompt, for a base without tokenizer
_OVERHEAD_BYTES = 1 << 30  # torch, transformers, activations
_SUSPICIOUS = 0.05  # of the spread of the logits


@dataclass(frozen=True)
class Check:
    """`difference` is the largest between two logits, `spread` the largest size of one, both of the merged
    model against base and adapters; `agreeing` of `positions` have the same most likely token."""

    difference: float
    spread: float
    agreeing: int
    positions: int

    def __str__(self) -> str:
        text = (
            f"check: largest logit difference {self.difference:.3g} (logits reach {self.spread:.3g}); "
            f"same next token at {self.agreeing} of {self.positions} positions"
        )
        if self.difference > _SUSPICIOUS * self.spread:
            text += "\nwarning: that is more than rounding explains; compare answers before you use it"
        return text


def check_in_own_process(
    adapters: Sequence[Path], base_model: str, merged: Path, recipe: Recipe
) -> list[str]:
    """Lines that say what came out, or why nothing did; never raises for what the child does."""
    reason = _not_checkable(adapters, recipe) or _too_large(merged)
    if reason:
        return [f"check skipped: {reason}"]
    spec = {
        "adapters": [str(path) for path in adapters],
        "base_model": base_model,
        "merged": str(merged),
        "recipe": recipe.as_json(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "train.merge_check", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        return [str(Check(**json.loads(lines[-1])))]
    except (IndexError, ValueError, TypeError):
        said = done.stderr.strip().splitlines()
        return [f"check failed, the merged model is complete: {said[-1] if said else done.returncode}"]


def _not_checkable(adapters: Sequence[Path], recipe: Recipe) -> str | None:
    """PEFT adds up adapters as they are. What it has nothing for is not compared with something else."""
    if recipe.combination.startswith("dare"):
        return f"{recipe.combination} drops at random, so there is nothing to compare with"
    several = len(adapters) > 1 or recipe.weights != (1.0,)
    for path in adapters if several else ():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        for key in ("use_dora", "modules_to_save", "lora_bias"):
            if config.get(key):
                return f"PEFT does not combine adapters with {key}"
        if config.get("bias", "none") != "none":
            return "PEFT does not combine adapters with trained biases"
    return None


def _too_large(merged: Path) -> str | None:
    """Whether the model in float32, of which there is one at a time, is more than the memory that is free."""
    from vllm_lora_ext.files import RegularFile
    from vllm_lora_ext.free_memory import free_memory
    from vllm_lora_ext.tensor_file import ITEM_BYTES, read_header

    numbers = 0
    for path in merged.glob("*.safetensors"):
        with RegularFile(path) as file:
            numbers += sum(place.size // ITEM_BYTES[place.spec.dtype] for place in read_header(file))
    needed, free = 4 * numbers + _OVERHEAD_BYTES, free_memory()
    if needed <= free:
        return None
    return f"the model takes {needed / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB of memory are free"


def compare(adapters: Sequence[Path], base_model: str, merged: Path, recipe: Recipe) -> Check:
    """Logits of base and adapters (PEFT) against those of the merged model, at every position of `PROMPTS`.

    Raises:
        BadInput: a model or an adapter cannot be loaded.
    """
    import torch

    from train.model import load_base

    prompts = _prompts(merged)
    with torch.inference_mode():
        model = _adapted(adapters, base_model, recipe)
        expected = [model(ids.to(model.device)).logits.float().cpu() for ids in prompts]
        del model
        whole = load_base(str(merged), torch.float32)
        found = [whole(ids.to(whole.device)).logits.float().cpu() for ids in prompts]
    pairs = list(zip(expected, found, strict=True))
    return Check(
        difference=max(float((one - other).abs().max()) for one, other in pairs),
        spread=max(float(one.abs().max()) for one in expected),
        agreeing=sum(int((one.argmax(-1) == other.argmax(-1)).sum()) for one, other in pairs),
        positions=sum(one.shape[1] for one in expected),
    )


def _prompts(merged: Path) -> list[torch.Tensor]:
    """Ids of shape (1, tokens); at random for a model without tokenizer, of which transformers makes one of
    no words for some kinds."""
    import torch

    from train.model import load_tokenizer
    from vllm_lora_ext.errors import BadInput

    with suppress(BadInput):
        tokenizer = load_tokenizer(str(merged))
        prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
        if all(ids.numel() for ids in prompts):
            return prompts
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, _RANDOM_IDS), generator=chance) for _ in PROMPTS]


def _adapted(adapters: Sequence[Path], base_model: str, recipe: Recipe) -> PeftModel:
    import torch

    from train.model import attach_adapter, load_base

    model = attach_adapter(load_base(base_model, torch.float32), adapters[0]).eval()
    if len(adapters) == 1 and recipe.weights == (1.0,) and recipe.is_plain:
        return model
    names = ["default", *(f"other{number}" for number in range(1, len(adapters)))]
    for name, path in list(zip(names, adapters, strict=True))[1:]:
        model.load_adapter(str(path), adapter_name=name)
    if recipe.is_plain:
        weights = list(recipe.weights)
        model.base_model.add_weighted_adapter(names, weights, "together", combination_type="cat")
        model.set_adapter("together")
        return model
    _add_dense(model, names, recipe)
    return model


def _add_dense(model: PeftModel, names: Sequence[str], recipe: Recipe) -> None:
    """Combine whole changes by PEFT's functions and add them to the base's weights; adapters off."""
    import torch
    from peft.utils import merge_utils

    from train.principal import lora_layers

    mix: Any = {"ties": merge_utils.ties, "magnitude_prune": merge_utils.magnitude_prune}[recipe.combination]
    weights = dict(zip(names, recipe.weights, strict=True))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            there = [name for name in names if name in layer.scaling]
            changes = [layer.get_delta_weight(name) for name in there]
            chosen = torch.tensor([weights[name] for name in there])
            base = layer.get_base_layer()  # whose weight may be another's as well: that one stays as it is
            base.weight = torch.nn.Parameter(base.weight + mix(changes, chosen, recipe.density))
    model.base_model.disable_adapter_layers()


def main(argv: Sequence[str]) -> int:
    """Compare what a JSON file names; prints one JSON object."""
    spec = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    body = {**spec["recipe"], "weights": tuple(spec["recipe"]["weights"])}
    adapters = [Path(path) for path in spec["adapters"]]
    print(json.dumps(asdict(compare(adapters, spec["base_model"], Path(spec["merged"]), Recipe(**body)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
