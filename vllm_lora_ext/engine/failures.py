"""An adapter that cannot be used ends its own requests, with the reason, and nobody else's.

The worker marks its step's output; the scheduler, in the engine core's process, ends the
adapter's requests before it looks at their tokens, and forgets their KV blocks, which were
computed without the adapter; the front turns the mark into an error for the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm.exceptions import GenerationError
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

_MARK = "vllm_lora_failed_adapters"
_REASON = "vllm_lora: "  # begins the stop reason of a request that failed


def marks_failures(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `execute_model` or `sample_tokens` of a model runner: its output tells what failed."""

    def marked(runner: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(runner, *args, **kwargs)
        manager = getattr(runner, "lora_manager", None)
        if manager is not None and output is not None and (failed := manager.take_failed()):
            mark(output, failed)
        return output

    return marked


def mark(output: ModelRunnerOutput | AsyncModelRunnerOutput, failed: dict[int, str]) -> None:
    """Note the failed adapters, id -> reason, in a step's output, now or when it arrives."""
    if not isinstance(output, AsyncModelRunnerOutput):
        setattr(output, _MARK, failed)
        return
    upstream = output.get_output

    def get_output() -> ModelRunnerOutput:
        arrived = upstream()
        setattr(arrived, _MARK, failed)
        return arrived

    output.get_output = get_output


def ends_failed_requests(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.update_from_output`: requests of failed adapters end before their tokens count."""

    def update_from_output(
        scheduler: Scheduler, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        failed = getattr(model_runner_output, _MARK, None)
        ended = end_requests(scheduler, failed) if failed else []
        outputs: dict[int, EngineCoreOutputs] = method(scheduler, scheduler_output, model_runner_output)
        for client, output in ended:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return outputs

    return update_from_output


def end_requests(scheduler: Scheduler, failed: dict[int, str]) -> list[tuple[int, EngineCoreOutput]]:
    """End every request of the failed adapters, waiting ones too, and uncache all their blocks.

    Returns the last output of each, with the client that it is for.
    """
    reasons = {}
    blocks: set[int] = set()
    for request in scheduler.requests.values():
        adapter = request.lora_request
        if adapter is not None and adapter.lora_int_id in failed and not request.is_finished():
            reasons[request.request_id] = failed[adapter.lora_int_id]
            for group in scheduler.kv_cache_manager.get_block_ids(request.request_id):
                blocks.update(group)
    scheduler.kv_cache_manager.evict_blocks(blocks)
    ended = scheduler.finish_requests(reasons, RequestStatus.FINISHED_ERROR)
    return [
        (
            request.client_index,
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=_REASON + reasons[request.request_id],
                events=request.take_events(),
                trace_headers=request.trace_headers,
            ),
        )
        for request in ended
    ]


def raises_reasons(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AsyncLLM.generate`: a request that failed with its adapter ends with the reason."""

    async def generate(engine: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(method(engine, *args, **kwargs)) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    reason = completion.stop_reason
                    if isinstance(reason, str) and reason.startswith(_REASON):
                        raise GenerationError(reason.removeprefix(_REASON))
                yield output

    return generate
