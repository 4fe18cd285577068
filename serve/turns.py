"""Stands in front of the engine's `generate` and `encode`: every request takes its turn, and is counted.

From here until the engine reports a request finished or aborted it has its place, whatever becomes of the
HTTP connection.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from serve.manager import AdapterFailed, Manager
from serve.metrics import Metrics

Outputs = Callable[..., AsyncIterator[Any]]


class TurnTaker:
    """Wraps the two methods; `failure` makes the exception that the front side of vLLM understands."""

    def __init__(
        self, manager: Manager, metrics: Metrics, base_name: str, failure: Callable[[str], Exception]
    ) -> None:
        self._manager, self._metrics, self._base_name, self._failure = manager, metrics, base_name, failure

    def wrap(self, method: Outputs) -> Outputs:
        """The same method, with turns. What it is given as `lora_request` only names the adapter."""

        async def in_turn(*given: Any, lora_request: Any = None, **named: Any) -> AsyncIterator[Any]:
            model = None if lora_request is None else lora_request.lora_name
            params = given[1] if len(given) > 1 else None  # vLLM passes those of `encode` by name
            account = _Account(self._metrics, model or self._base_name, params)
            try:
                async with self._manager.turn(model) as loaded:
                    outputs = method(*given, lora_request=loaded, **named)
                    async with aclosing(outputs) as stream:  # type: ignore[type-var]
                        async for output in stream:
                            account.note(output)
                            yield output
                account.ended = True
            except AdapterFailed as error:
                account.error = "adapter_failed"
                raise self._failure(str(error)) from error
            except Exception as error:
                account.error = type(error).__name__
                raise
            finally:
                account.close()

        return in_turn


class _Account:
    """What one request took."""

    def __init__(self, metrics: Metrics, model: str, params: Any) -> None:
        self._metrics, self._model = metrics, model
        kind = getattr(params, "output_kind", None)
        self._is_delta = kind is not None and kind.name == "DELTA"
        self._began = time.monotonic()
        self._first: float | None = None
        self._prompt = self._generated = 0
        self.ended = False
        self.error: str | None = None
        metrics.started(model)

    def note(self, output: Any) -> None:
        """One output of the engine: the first is the first token's."""
        if self._first is None:
            self._first = time.monotonic() - self._began
            self._metrics.first_token(self._model, self._first)
            self._prompt = len(output.prompt_token_ids or ())
        completions = getattr(output, "outputs", None)
        if isinstance(completions, list):
            count = sum(len(completion.token_ids) for completion in completions)
            self._generated = self._generated + count if self._is_delta else count

    def close(self) -> None:
        """It ended, well or not, or its client has left."""
        if self.error is not None:
            self._metrics.failed(self._model, self.error)
        if self.ended:
            self._metrics.finished(self._model, time.monotonic() - self._began)
        self._metrics.tokens(self._model, self._prompt, self._generated)
