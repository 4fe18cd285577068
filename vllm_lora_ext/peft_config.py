"""What may stand in `adapter_config.json`: types, values, and which modules it speaks of.

PEFT and vLLM read `rank_pattern`, `alpha_pattern` and a `target_modules` that is one string as regular
expressions. A tenant's expression can run for ever, so patterns have to be names; see targeting.py for
`target_modules`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vllm_lora_ext.spec import Finding, Severity

MAX_RANK = 1 << 16
MAX_ALPHA = 1e6  # people use 1 to a few thousand
SAVE_AGAIN = "Save it with PEFT again."
# More settings, names in a pattern or lists of layers than any trainer writes, and few enough to go through.
_MAX_SETTINGS, _MAX_ALTERNATIVES, _MAX_LAYER_LISTS = 500, 50_000, 8
_SAID = 100  # findings about one pattern
_LITERAL_KEY = re.compile(r"\^?[\w.-]+(\|\^?[\w.-]+)*")
_LITERAL_NAME = re.compile(r"[\w.-]{1,120}")

# Config keys that vLLM cannot serve when they are switched on, with the fix.
_PLAIN_LORA, _NO_NEW_TOKENS = (
    "Train an ordinary LoRA.",
    "Train without new tokens, or merge it into its base.",
)
_UNSUPPORTED = {
    "use_dora": "Train without DoRA, or merge the adapter into its base.",
    "lora_bias": "Train with lora_bias=False.",
    "trainable_token_indices": _NO_NEW_TOKENS,
    "layer_replication": "Train without layer_replication.",
    **dict.fromkeys(
        ("alora_invocation_tokens", "use_bdlora", "use_qalora", "arrow_config", "kasa_config"), _PLAIN_LORA
    ),
    **dict.fromkeys(("velora_config", "monteclora_config", "megatron_config"), _PLAIN_LORA),
}
# These only choose the first weights of the adapter (vllm/lora/peft_helper.py).
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Heads that vLLM takes whole from an adapter of a classification model (same file).
SERVED_HEADS = ("classifier", "score")
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_whole(value: Any) -> bool:
    return type(value) is int


_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        (
            *("fan_in_fan_out", "use_rslora", "use_dora", "inference_mode", "lora_bias", "use_qalora"),
            "ensure_weight_tying",
        ),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "peft_version", "megatron_core"),
        ("a text", lambda value: isinstance(value, str)),
    ),
    **dict.fromkeys(
        ("modules_to_save", "target_parameters"), ("a list of names", _is_names)
    ),
    **dict.fromkeys(
        ("exclude_modules", "layers_pattern"),
        ("a text or a list of names", lambda value: isinstance(value, str) or _is_names(value)),
    ),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda value: _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value))),
    ),
    "lora_dropout": ("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1),
    "task_type": (f"one of {', '.join(_TASKS)}", lambda value: value in _TASKS),
    "init_lora_weights": ("a text, true or false", lambda value: isinstance(value, bool | str)),
    **dict.fromkeys(
        ("auto_mapping", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        ("an object", lambda value: isinstance(value, dict)),
    ),
}  # fmt: skip
_NULL_REFUSED = ("lora_dropout", "inference_mode", "use_rslora", "fan_in_fan_out")
_JUDGED_ELSEWHERE = (
    *("peft_type", "r", "lora_alpha", "bias", "target_modules", "rank_pattern", "alpha_pattern"),
    *("runtime_config", "qalora_group_size", *_UNSUPPORTED),
)


def judge_config(config: Mapping[str, Any]) -> list[Finding]:
    """Everything in the config that PEFT would not load or vLLM cannot serve."""
    findings = []
    if config.get("peft_type") != "LORA":
        rule = f"is {shown(config.get('peft_type'))}; vLLM serves LORA only"
        fix = "Train a LoRA, or merge the adapter into its base."
        findings.append(Finding("peft_type_unsupported", "peft_type", rule, fix))
    if not is_rank(config.get("r")):
        rule = f"must be a whole number of at least 1, is {shown(config.get('r'))}"
        findings.append(Finding("rank_invalid", "r", rule, SAVE_AGAIN))
    findings += _judge_alpha("lora_alpha", config.get("lora_alpha"))
    findings += _judge_types(config)
    findings += _judge_features(config)
    return findings + judge_patterns(config) + _judge_targets(config)


def _judge_alpha(item: str, alpha: Any) -> list[Finding]:
    if type(alpha) in (int, float) and alpha == 0:
        rule = "is 0, so the adapter changes nothing"
        return [Finding("alpha_no_effect", item, rule, "Set the alpha that it was trained with.")]
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        rule = f"must be a number above 0 and at most {MAX_ALPHA:.0f}, is {shown(alpha)}"
        return [Finding("alpha_invalid", item, rule, SAVE_AGAIN)]
    return []


def _judge_types(config: Mapping[str, Any]) -> list[Finding]:
    if len(config) > _MAX_SETTINGS:
        rule = f"holds {len(config)} settings, at most {_MAX_SETTINGS} are read"
        return [Finding("config_invalid", "adapter_config.json", rule, SAVE_AGAIN)]
    findings = []
    for key, value in config.items():
        if key in _JUDGED_ELSEWHERE:
            continue
        if key not in _WANTED:
            if value:
                rule = f"is a setting that we do not know, {shown(value)}"
                fix = "If it changes what the adapter computes, it is not served as trained."
                findings.append(Finding("setting_unknown", shown(key), rule, fix, Severity.UNPROVEN))
            continue
        wanted, fits = _WANTED[key]
        if (value is None and key not in _NULL_REFUSED) or fits(value):
            continue
        findings.append(Finding("config_invalid", key, f"must be {wanted}, is {shown(value)}", SAVE_AGAIN))
    return findings


def _judge_features(config: Mapping[str, Any]) -> list[Finding]:
    findings = []
    if config.get("bias", "none") != "none":
        rule = f"is {shown(config['bias'])}; vLLM serves adapters without trained biases only"
        findings.append(Finding("feature_unsupported", "bias", rule, "Train with bias='none'."))
    for key, fix in _UNSUPPORTED.items():
        if config.get(key):
            code = "vocab_unsupported" if fix is _NO_NEW_TOKENS else "feature_unsupported"
            findings.append(Finding(code, key, "is set, and vLLM cannot serve it", fix))
    heads = config.get("modules_to_save") or []
    if _is_names(heads) and (others := sorted(set(heads) - set(SERVED_HEADS))):
        rule = f"holds {shown(others)}; vLLM takes whole modules of classification heads only"
        fix = "Train without modules_to_save, or merge the adapter into its base."
        findings.append(Finding("feature_unsupported", "modules_to_save", rule, fix))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _HARMLESS_INITS and init.lower() != "gaussian":
        rule = f"is {shown(init)}, which changed the base during training"
        fix = "Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA."
        findings.append(Finding("init_unsupported", "init_lora_weights", rule, fix))
    if init == "orthogonal" and is_rank(config.get("r")) and config["r"] % 2:
        rule = f"is 'orthogonal', which needs an even rank; r is {config['r']}"
        findings.append(Finding("rank_invalid", "init_lora_weights", rule, SAVE_AGAIN))
    return findings


def judge_patterns(config: Mapping[str, Any]) -> list[Finding]:
    """Names, `a|b` and a leading `^` are all that a pattern needs; anything more is refused unread."""
    findings: list[Finding] = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is None:
            continue
        if not isinstance(pattern, dict):
            rule = f"must be an object, is {shown(pattern)}"
            findings.append(Finding("pattern_unsupported", name, rule, SAVE_AGAIN))
            continue
        findings += itertools.islice(_judge_pattern(name, pattern), _SAID)
    return findings


def _judge_pattern(name: str, pattern: Mapping[str, Any]) -> Iterator[Finding]:
    names = sum(key.count("|") + 1 for key in pattern)
    if names > _MAX_ALTERNATIVES:
        rule = f"holds {names} names, at most {_MAX_ALTERNATIVES} are gone through"
        yield Finding("pattern_unsupported", name, rule, "Name modules by the end of their names.")
        return
    for key, value in pattern.items():
        if not _LITERAL_KEY.fullmatch(key):
            rule = f"key {shown(key)} is more than module names"
            fix = "Write the names of the modules, as PEFT's own examples do."
            yield Finding("pattern_unsupported", name, rule, fix)
        elif name == "alpha_pattern":
            yield from _judge_alpha(f"alpha_pattern {key[:80]}", value)
        elif not is_rank(value):
            rule = f"{key[:80]} must be a whole number of at least 1, is {shown(value)}"
            yield Finding("rank_invalid", name, rule, SAVE_AGAIN)


def resolve_pattern(pattern: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """A checked pattern as module -> value; the first key that matches wins (PEFT's `get_pattern_key`)."""
    if not pattern:
        return {}
    literal = LiteralPattern(pattern)
    values = ((module, literal.value_of(pattern_name(module))) for module in modules)
    return {module: value for module, value in values if value is not None}


class LiteralPattern:
    """A checked pattern without expressions: the first key that names the end of a module's name wins.

    PEFT reads keys as expressions, where a '.' is any character; of names as modules have them, both
    readings are one.
    """

    def __init__(self, pattern: Mapping[str, Any]) -> None:
        self._keys: dict[str, tuple[int, Any]] = {}
        for order, (key, value) in enumerate(pattern.items()):
            for name in key.split("|"):
                self._keys.setdefault(name, (order, value))

    def value_of(self, module: str) -> Any:
        """The value for a module, None if no key names it."""
        found = [item for name in dotted_suffixes(module) if (item := self._keys.get(name))]
        if whole := self._keys.get(f"^{module}"):
            found.append(whole)
        return min(found, key=_order)[1] if found else None


def _order(item: tuple[int, Any]) -> int:
    return item[0]


def pattern_name(module: str) -> str:
    """What patterns call a module: fused experts go by their parameters (vllm/lora/peft_helper.py)."""
    if module.endswith(".experts.base_layer"):
        return module.removesuffix("base_layer") + "gate_up_proj"
    return module + ".down_proj" if module.endswith(".experts") else module


def _judge_targets(config: Mapping[str, Any]) -> list[Finding]:
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    findings = []
    named = (isinstance(targets, str) and targets) or (_is_names(targets) and targets)
    if not named and not (targets in (None, []) and config.get("target_parameters")):
        rule = f"must name the modules, is {shown(targets)}"
        findings.append(Finding("target_modules_invalid", "target_modules", rule, SAVE_AGAIN))
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        rule = "is one text, so layers_to_transform and layers_pattern must not be set"
        findings.append(Finding("target_modules_invalid", "target_modules", rule, SAVE_AGAIN))
    if pattern and layers is None:
        rule = "is set without layers_to_transform"
        findings.append(Finding("target_modules_invalid", "layers_pattern", rule, SAVE_AGAIN))
    names: list[str] = pattern if isinstance(pattern, list) and _is_names(pattern) else []
    if isinstance(pattern, str) and pattern:
        names = [pattern]
    if len(names) > _MAX_LAYER_LISTS or not all(map(_LITERAL_NAME.fullmatch, names)):
        rule = f"{shown(pattern)} is more than up to {_MAX_LAYER_LISTS} names"
        fix = "Write the name of the list of layers, for example 'layers'."
        findings.append(Finding("pattern_unsupported", "layers_pattern", rule, fix))
    return findings


def dotted_suffixes(module: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`: what a name in a config may call a module by."""
    suffixes = [module]
    while (dot := module.find(".") + 1) and (module := module[dot:]):
        suffixes.append(module)
    return suffixes


def is_rank(value: object) -> bool:
    """A whole number that can be a rank."""
    return type(value) is int and 1 <= value <= MAX_RANK


def shown(value: object) -> str:
    """A value of somebody else's as it may stand in a message: printable, and not endless."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number without end"
    return text if len(text) <= 60 else text[:57] + "..."
