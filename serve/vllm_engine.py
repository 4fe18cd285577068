"""vLLM's engine as the manager sees it, and what else of a running vLLM we hold on to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.drain import Drain
from serve.metrics import OneSeries
from serve.served import ServedVersion
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadBaseModel
from vllm_lora_ext.parity import Answer, CannotScore

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.lora.request import LoRARequest
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.engine.async_llm import AsyncLLM

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")

_LABEL_ID = 1  # of a request that only names its adapter; the engine never sees it


class VllmEngine:
    """Implements the manager's `AdapterEngine`; a handle is the `LoRARequest` of a loaded adapter.

    `templates` are the chat templates of what may be asked for, by `name@digest12`.
    """

    def __init__(self, client: AsyncLLM, models: OpenAIServingModels) -> None:
        from vllm.platforms import current_platform

        self._client, self._models = client, models
        self.templates: dict[str, str] = {}
        self._slots_are_pointers = current_platform.is_cpu()
        self.resolvers, models.lora_resolvers = list(models.lora_resolvers), []
        models.load_lora_adapter = models.unload_lora_adapter = _closed  # another way in, for closed routes

    def announce(self, version: ServedVersion) -> None:
        """Let vLLM's handlers find it by its full name."""
        self._models.lora_requests[version.model] = self._request(version, _LABEL_ID)
        if version.template is not None:
            self.templates[version.model] = version.template

    def withdraw(self, version: ServedVersion) -> None:
        """Let them not."""
        self._models.lora_requests.pop(version.model, None)
        self.templates.pop(version.model, None)

    async def load(self, version: ServedVersion) -> LoRARequest:
        """Bring it into the memory of every worker, beside the engine's steps.

        Raises:
            RuntimeError: with the reason, without paths of this machine.
        """
        from vllm_lora_ext.engine.calls import add_lora_staged

        request = self._request(version, self._models.lora_id_counter.inc(1))
        try:
            await add_lora_staged(self._client, request, activate=False)
        except Exception as error:
            reason = str(error).replace(request.lora_path, "its folder") or type(error).__name__
            raise RuntimeError(reason) from error
        return request

    async def place(self, handle: LoRARequest) -> None:
        """Copy it into a slot, between steps; on the CPU slots are pointers, which the step itself sets."""
        if not self._slots_are_pointers:
            from vllm_lora_ext.engine.calls import place_adapter

            await place_adapter(self._client, handle)

    async def unload(self, handle: LoRARequest) -> None:
        """Take it out of memory."""
        await self._client.remove_lora(handle.lora_int_id)

    def scorer(self, model: ModelConfig) -> VllmScorer:
        """What proofs ask; to be made before `generate` takes turns."""
        return VllmScorer(self._client, model)

    def _request(self, version: ServedVersion, number: int) -> LoRARequest:
        from vllm.lora.request import LoRARequest

        options = version.version.options
        return LoRARequest(
            lora_name=version.model,
            lora_int_id=number,
            lora_path=str(version.stored.folder),
            base_model_name=options.get("base_model_name"),
            is_3d_lora_weight=bool(options.get("is_3d_lora_weight")),
        )


class VllmScorer:
    """Implements `serve.proving.Scorer`; a handle is the `LoRARequest` of a loaded adapter."""

    def __init__(self, client: AsyncLLM, model: ModelConfig) -> None:
        self._generate = client.generate  # the engine's own: turns are the prover's business
        self._tokenizer, self._model = client.get_tokenizer, model

    async def score(self, handle: LoRARequest | None, ids: Sequence[int]) -> list[float]:
        """The logarithm of each token's probability but the first's, given those before it.

        Raises:
            CannotScore: the engine takes no such request, or gives no scores.
        """
        if not self._model.logprobs_mode.endswith("logprobs"):
            raise CannotScore(f"--logprobs-mode {self._model.logprobs_mode} gives no probabilities", True)
        output = await self._ask(handle, ids, max_tokens=1, prompt_logprobs=0)
        scores = list(output.prompt_logprobs or ())[1:]
        if len(scores) != len(ids) - 1 or not all(scores):
            raise CannotScore("it gives no scores of prompts")
        return [float(of[token].logprob) for of, token in zip(scores, ids[1:], strict=True)]

    async def answer(self, handle: LoRARequest | None, ids: Sequence[int], most: int) -> Answer:
        """The greedy answer, with its end token if it ended.

        Raises:
            CannotScore: the engine takes no such request.
        """
        output = await self._ask(handle, ids, max_tokens=most)
        (completion,) = output.outputs
        return Answer(tuple(completion.token_ids), completion.finish_reason == "stop")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in no chat template."""
        ids: list[int] = self._tokenizer().encode(text)
        return ids

    async def _ask(self, handle: LoRARequest | None, ids: Sequence[int], **params: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if max(ids) >= self._model.get_vocab_size():
            raise CannotScore("the probe has tokens that this base does not know", True)
        if len(ids) + params["max_tokens"] > self._model.max_model_len:
            raise CannotScore(
                f"the probe is longer than --max-model-len {self._model.max_model_len}", for_good=True
            )
        asked = SamplingParams(
            temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **params
        )
        prompt, number = {"prompt_token_ids": list(ids)}, f"proof-{uuid.uuid4().hex}"
        outputs = [output async for output in self._generate(prompt, asked, number, lora_request=handle)]
        if not outputs:
            raise CannotScore("it gives no answer")
        return outputs[-1]


def base_mark(model: str) -> str:
    """What names a base for proofs: of a folder also the sizes and times of its weights, which may change."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(states).encode()).hexdigest()[:12]
    return f"{model} {digest}" if states else model


def engine_mark() -> str:
    """What names an engine for proofs: its version, and what it computes on."""
    import vllm
    from vllm.platforms import current_platform

    return f"vllm {vllm.__version__} {current_platform.device_name or current_platform.device_type}"


async def _closed(*_: Any, **__: Any) -> ErrorResponse:
    from vllm.entrypoints.serve import create_error_response

    return create_error_response("Adapters are loaded and unloaded by /v1/adapters on this server.")


def generation_error(reason: str) -> Exception:
    """What vLLM's handlers turn into an answer with the reason."""
    from vllm.exceptions import GenerationError

    error: Exception = GenerationError(reason)
    return error


async def prove_engine(client: AsyncLLM, vllm_config: Any, args: Namespace) -> None:
    """Before anybody is served: our parts are in every worker, and keep adapters apart.

    vLLM logs a plugin that cannot be imported and goes on without it, so somebody has to ask. From then on
    nothing leaves the engine's memory by itself.

    Raises:
        ServerFailed: a worker runs without our parts.
        IsolationBroken: a row was answered with another row's adapter.
    """
    from vllm_lora_ext.engine.calls import call_workers, own_residency, require_parts

    await require_parts(client)
    if not getattr(args, "no_isolation_check", False) and vllm_config.model_config.runner_type == "generate":
        await _check_isolation(client, vllm_config, args)
    await call_workers(client, own_residency)


async def _check_isolation(client: AsyncLLM, vllm_config: Any, args: Namespace) -> None:
    from vllm_lora_ext.engine.calls import prove_isolation
    from vllm_lora_ext.engine.isolation import LEAD, Engine

    model, lora = vllm_config.model_config, vllm_config.lora_config
    linears = {}
    with contextlib.suppress(BadBaseModel):
        linears = read_base_model(args.model).module_shapes() or {}
    if lora.target_modules is not None:
        linears = {
            name: shape for name, shape in linears.items() if name.endswith(tuple(lora.target_modules))
        }
    is_half = str(model.dtype) == "torch.float16"
    engine = Engine(client, model.get_vocab_size(), lora.max_loras, is_half, linears)
    started = time.monotonic()
    lead = await prove_isolation(engine)
    if lead is not None:
        seconds = time.monotonic() - started
        logger.info("Isolation check: adapters and base do not mix (lead %.0f, %.1f s)", lead, seconds)
        if lead < LEAD:
            logger.warning("Isolation check: this model's weights allow no lead of %.0f", LEAD)


def remember_death(client: AsyncLLM, args: Namespace) -> None:
    """Note in `args.engine_died` whether the engine was dead before it was told to stop.

    vLLM ends its server then as if it had been asked to, and afterwards both look alike.
    """
    upstream = client.shutdown

    def shutdown(*positional: Any, **named: Any) -> Any:
        if not hasattr(args, "engine_died"):  # it is called more than once
            args.engine_died = client.errored
        return upstream(*positional, **named)

    client.shutdown = shutdown


def drain_before_shutdown(client: AsyncLLM, drain: Drain, loop: asyncio.AbstractEventLoop) -> None:
    """Make `client.shutdown` let the accepted requests of `drain` end first; they share its timeout.

    vLLM calls it in a thread when it is told to stop, and once more in the event loop at the very end, where
    nothing could end any more.
    """
    upstream = client.shutdown

    def shutdown(timeout: float | None = None) -> None:
        began = time.monotonic()
        if loop.is_running() and not _in_event_loop():
            asyncio.run_coroutine_threadsafe(drain.stop(timeout or 0.0), loop).result()
        upstream(None if timeout is None else max(0.0, timeout - (time.monotonic() - began)))

    client.shutdown = shutdown


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def render_with_own_template(renderer: OnlineRenderer, templates: dict[str, str]) -> None:
    """Make every chat route (chat, responses, messages, tokenize) render `model`'s own template.

    They all go through `preprocess_chat`, whose `default_template` is used
    unless the request brings a template of its own.
    """
    upstream: Callable[..., Awaitable[Any]] = renderer.preprocess_chat

    async def preprocess_chat(request: Any, messages: list[Any], **kwargs: Any) -> Any:
        own = templates.get(getattr(request, "model", None) or "")
        if own is not None:
            kwargs["default_template"] = own
        return await upstream(request, messages, **kwargs)

    renderer.preprocess_chat = preprocess_chat


def show_one_series(client: AsyncLLM, max_loras: int) -> None:
    """vLLM's `lora_requests_info` as one series, which says truly what runs and what waits.

    vLLM puts every adapter with a request into both lists, one of them with the count 0.
    """
    manager = client.logger_manager
    for stat_logger in manager.stat_loggers if manager is not None else ():
        gauge = getattr(stat_logger, "gauge_lora_info", None)
        if gauge is None:
            continue
        stat_logger.gauge_lora_info = series = OneSeries(gauge)
        series.labels(
            max_lora=max_loras, waiting_lora_adapters="", running_lora_adapters=""
        ).set_to_current_time()
        stat_logger.record = _of_those_that_count(stat_logger.record)


def _of_those_that_count(record: Callable[..., None]) -> Callable[..., None]:
    def recorded(scheduler_stats: Any = None, *args: Any, **kwargs: Any) -> None:
        for name in ("running_lora_adapters", "waiting_lora_adapters"):
            counts = getattr(scheduler_stats, name, None)
            if counts:
                setattr(scheduler_stats, name, {key: count for key, count in counts.items() if count})
        record(scheduler_stats, *args, **kwargs)

    return recorded
