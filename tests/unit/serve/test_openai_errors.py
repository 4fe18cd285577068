"""An error reads as OpenAI's own clients expect it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from serve.openai_errors import ApiError


def test_the_body_is_openais_error_object() -> None:
    error = ApiError(404, "小李: is not served here.", "model_not_found", param="model")
    assert json.loads(json.dumps(error.body())) == {
        "error": {
            "message": "小李: is not served here.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert str(error) == error.message


def test_a_field_that_does_not_apply_is_null_and_not_missing() -> None:
    body = ApiError(503, "Try again.", "overloaded", type="server_error", headers={"Retry-After": "1"}).body()
    assert body["error"] == {
        "message": "Try again.",
        "type": "server_error",
        "param": None,
        "code": "overloaded",
    }


def test_it_passes_through_contexts_as_any_error_does() -> None:
    @contextlib.asynccontextmanager
    async def context() -> AsyncIterator[None]:
        yield

    async def fail() -> None:
        async with context():
            raise ApiError(400, "No.", "invalid_value")

    with pytest.raises(ApiError, match="No"):
        asyncio.run(fail())
