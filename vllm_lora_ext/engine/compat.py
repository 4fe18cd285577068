"""Which parts of vLLM we touch. Checked once at start, so that an unknown vLLM is refused clearly."""

from __future__ import annotations

import importlib

from vllm_lora_ext.errors import MissingPackage

TESTED_VERSION = "0.32"

# module -> attributes that this project calls, replaces or subclasses
SYMBOLS = {
    "vllm.entrypoints.cli.serve": ("ServeSubcommand.cmd", "ServeSubcommand.validate"),
    "vllm.entrypoints.launchers.cli_args": ("make_arg_parser",),
    "vllm.entrypoints.openai.models.protocol": ("LoRAModulePath",),
    "vllm.entrypoints.openai.models.serving": (
        "OpenAIServingModels.load_lora_adapter",
        "OpenAIServingModels.unload_lora_adapter",
    ),
    "vllm.entrypoints.serve": ("create_error_response",),
    "vllm.entrypoints.serve.engine.protocol": ("ErrorResponse",),
    "vllm.entrypoints.serve.lora.protocol": ("LoadLoRAAdapterRequest",),
    "vllm.entrypoints.serve.utils.api_utils": ("cli_env_setup",),
    "vllm.v1.engine.async_llm": ("AsyncLLM.shutdown", "AsyncLLM.errored", "AsyncLLM.check_health"),
    "vllm.renderers.online_renderer": ("OnlineRenderer.preprocess_chat",),
    "vllm.utils.argparse_utils": ("FlexibleArgumentParser",),
}
CPU_SYMBOLS = {
    "vllm.platforms.cpu": ("CpuPlatform.get_punica_wrapper",),
    "vllm.lora.punica_wrapper.punica_cpu": (
        "PunicaWrapperCPU.add_lora_linear",
        "PunicaWrapperCPU.add_lora_embedding",
        "PunicaWrapperCPU.add_lora_logits",
        "PunicaWrapperCPU.token_lora_indices",
        "PunicaWrapperCPU.sampler_indices",
    ),
}


def missing_symbols(symbols: dict[str, tuple[str, ...]]) -> list[str]:
    """The symbols that the installed vLLM does not have, as `module.attribute`."""
    missing = []
    for module_name, attributes in symbols.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        for attribute in attributes:
            owner: object = module
            for part in attribute.split("."):
                owner = getattr(owner, part, None)
            if owner is None:
                missing.append(f"{module_name}.{attribute}")
    return missing


def check(symbols: dict[str, tuple[str, ...]]) -> None:
    """Refuse a vLLM that lacks what we touch.

    Raises:
        MissingPackage: with every symbol that is missing.
    """
    missing = missing_symbols(symbols)
    if missing:
        raise MissingPackage(
            "the installed vLLM",
            f"lacks {', '.join(missing)}, which vllm-lora touches",
            f"Install the vLLM that it was tested with: {TESTED_VERSION}.",
        )
