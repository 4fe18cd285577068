"""Which parts of vLLM we touch, by feature: what `compat` and `deploy/check_symbols.py` look up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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


# A line that is not indented is a symbol, or the class or module whose symbols the indented lines below
# it hold, with spaces between them.
_SERVE = """
vllm.entrypoints.cli.serve:ServeSubcommand
    cmd(args) validate(args)
vllm.entrypoints.launchers.cli_args:make_arg_parser(parser)
vllm.entrypoints.openai.models.protocol:LoRAModulePath(name, path)
vllm.entrypoints.openai.models.serving:OpenAIServingModels
    base_model_paths lora_id_counter lora_requests lora_resolvers model_name
    load_lora_adapter(request, base_model_name) unload_lora_adapter(request)
vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.background_tasks
vllm.entrypoints.serve:create_error_response(message)
vllm.entrypoints.serve.utils.api_utils:cli_env_setup
vllm.exceptions:GenerationError(message)
vllm.lora.request:LoRARequest
    base_model_name is_3d_lora_weight lora_int_id lora_name lora_path
vllm.platforms:current_platform.is_cpu
vllm.plugins.endpoint_plugins.interface:EndpointPlugin
    attach_router(app) init_state(engine_client, state, args)
vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat(request, messages, *, default_template)
vllm.utils.argparse_utils:FlexibleArgumentParser
vllm.v1.engine.async_llm:AsyncLLM
    check_health errored logger_manager remove_lora(lora_id) shutdown
    generate(prompt, sampling_params, request_id, *, lora_request)
    encode(prompt, pooling_params, request_id, *, lora_request)
vllm.v1.metrics.loggers:PrometheusStatLogger
    gauge_lora_info record(scheduler_stats)
vllm.v1.metrics.stats:SchedulerStats
    running_lora_adapters waiting_lora_adapters
"""
_ISOLATION = """
vllm.lora.layers:
    BaseLayerWithLoRA LoRAMapping.index_mapping LoRAMapping.prompt_mapping RowParallelLinearWithLoRA
vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA
    lora_a_stacked lora_b_stacked
vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA
    lora_a_stacked lora_b_stacked
vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA
    base_layer forward(x) lora_a_stacked lora_a_stacked_2d lora_b_stacked
vllm.lora.model_manager:LRUCacheLoRAModelManager
    _get_punica_wrapper(module_name) activate_adapter(lora_id) register_module(module_name, module)
vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase
    _sampler_indices indices_len
    update_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU(max_num_batched_tokens, max_batches)
vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU
    add_lora_linear(y, x, lora_a_stacked) add_lora_logits(y, x, lora_a_stacked)
vllm.platforms.cpu:CpuPlatform.get_punica_wrapper
"""
_COMPILE = """
vllm.config:CompilationMode
    DYNAMO_TRACE_ONCE NONE VLLM_COMPILE
vllm.platforms.cpu:CpuPlatform.check_and_update_config(vllm_config)
"""
_NO_FATAL_LOAD = """
vllm.distributed:
    get_pp_group get_tp_group
vllm.exceptions:
    GenerationError(message) LoRAAdapterNotFoundError(lora_name, lora_path)
vllm.lora.layers:BaseLayerWithLoRA
    reset_lora(index) set_lora(index, lora_a, lora_b)
vllm.lora.lora_model:LoRAModel
    _should_skip_module(module_name, skip_prefixes)
    from_lora_tensors(lora_model_id, tensors, peft_helper, *, device, dtype, weights_mapper, skip_prefixes)
vllm.lora.model_manager:LRUCacheLoRAModelManager
    _active_adapters _registered_adapters capacity lora_index_to_id lora_slots modules
    packed_modules_mapping remove_oldest_adapter supported_lora_modules vocab_size
    _add_adapter(lora) _create_merged_loras_inplace(lora_model) _deactivate_adapter(lora_id)
    _get_lora_layer_weights(lora_model, module_name) _get_module_to_save_weights(lora_model, module_name)
    _validate_moe_lora_format(lora_model)
    _validate_modules_to_save(lora_model) _validate_token_classification_lora(lora_model)
    activate_adapter(lora_id) deactivate_adapter(adapter_id) get_adapter(adapter_id)
    pin_adapter(lora_id) remove_adapter(adapter_id) set_adapter_mapping(mapping)
vllm.lora.peft_helper:PEFTHelper
    from_dict(config_dict) validate_legal(lora_config)
vllm.lora.request:LoRARequest
    is_3d_lora_weight load_inplace lora_int_id lora_name lora_path
vllm.lora.utils:
    get_adapter_absolute_path(lora_path) is_base_embedding_weights(name)
    parse_fine_tuned_lora_name(name, weights_mapper)
vllm.lora.worker_manager:LRUCacheWorkerLoRAManager
    _adapter_manager _manager_cls list_adapters max_position_embeddings
    _load_adapter(lora_request) add_adapter(lora_request)
    remove_adapter(adapter_id) set_active_adapters(requests, mapping)
vllm.utils.cache:LRUCache
    pinned_items remove_oldest touch(key)
vllm.v1.core.kv_cache_manager:KVCacheManager
    evict_blocks(block_ids) get_block_ids(request_id)
vllm.v1.core.sched.scheduler:Scheduler
    finish_requests(request_ids, finished_status) kv_cache_manager requests
    update_from_output(scheduler_output, model_runner_output)
vllm.v1.engine:
    EngineCoreOutput(request_id, new_token_ids, *, finish_reason, stop_reason, events, trace_headers)
    EngineCoreOutputs.outputs
vllm.v1.engine.async_llm:AsyncLLM
    generate(prompt, sampling_params, request_id, *, lora_request)
vllm.v1.outputs:
    AsyncModelRunnerOutput.get_output ModelRunnerOutput
vllm.v1.request:
    Request.client_index Request.get_finished_reason Request.is_finished Request.lora_request
    Request.take_events Request.trace_headers RequestStatus.FINISHED_ERROR
vllm.v1.worker.gpu_model_runner:GPUModelRunner
    execute_model(scheduler_output, intermediate_tensors) sample_tokens(grammar_output)
vllm.v1.worker.gpu.model_runner:GPUModelRunner
    execute_model(scheduler_output, intermediate_tensors) sample_tokens(grammar_output)
vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager
"""
_STAGED_LOADING = """
vllm.v1.engine.async_llm:AsyncLLM
    add_lora(lora_request) collective_rpc(method, timeout, args, kwargs)
vllm.v1.worker.worker_base:WorkerBase.model_runner
vllm.sampling_params:SamplingParams
"""


def symbols_of(table: str) -> tuple[str, ...]:
    """The symbols of a table as above."""
    symbols: list[str] = []
    owner = ""
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            owner = line
            symbols.append(line)
            continue
        if symbols[-1] == owner:
            symbols.pop()  # it was no symbol of its own
        dot = "" if owner.endswith(":") else "."
        symbols += [f"{owner}{dot}{name}" for name in re.findall(r"[^\s(]+(?:\([^)]*\))?", line)]
    return tuple(symbols)


FEATURES: tuple[Feature, ...] = (
    Feature(
        "serve",
        symbols_of(_SERVE),
        off="the command line, the loading of adapters and /ready may fail while they are used",
        safety=True,
    ),
    Feature(
        "isolation",
        symbols_of(_ISOLATION),
        off="a request for the base model may be answered with an adapter's weights",
        safety=True,
        platform="cpu",
    ),
    Feature(
        "compile",
        symbols_of(_COMPILE),
        off="the model is not compiled while LoRA is on, and answers on the CPU are slower",
        platform="cpu",
    ),
    Feature(
        "no-fatal-load",
        symbols_of(_NO_FATAL_LOAD),
        off="an adapter that fails to load may end the engine, or be answered for by the base model",
        safety=True,
    ),
    Feature(
        "staged-loading",
        symbols_of(_STAGED_LOADING),
        off="an adapter is loaded in one step of the engine, in which all requests wait",
    ),
)
