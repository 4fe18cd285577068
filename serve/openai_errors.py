"""What a client is told when a request fails: OpenAI's error object, as its clients read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(eq=False)  # not frozen: contextlib writes `__traceback__` to whatever passes through it
class ApiError(Exception):
    """An answer that is an error; `code` is for programs, `message` for people, `param` says which field."""

    status: int
    message: str
    code: str
    type: str = "invalid_request_error"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the answer: all four keys are always there, and `code` is a string."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}
