"""What a changing route asks for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.openai_errors import ApiError

_PREFIX = "/v1/adapters/"


@dataclass(frozen=True)
class Change:
    """One change: `verb` is publish, rollback, traffic or remove."""

    verb: str
    name: str

    def to_of(self, body: Mapping[str, Any]) -> str | None:
        """The version that a rollback asks for; None for the one before. Raises ApiError."""
        to = body.get("to")
        if to is not None and (not isinstance(to, str) or not to):
            raise ApiError(400, "to: must be a text.", "invalid_value", param="to")
        return to

    def percent_of(self, body: Mapping[str, Any]) -> dict[str, int]:
        """How traffic is to be split. Raises ApiError."""
        value = body.get("traffic")
        if not isinstance(value, dict) or not all(type(share) is int for share in value.values()):
            message = (
                "traffic: must give each version, by the beginning of its digest, a whole number of percent."
            )
            raise ApiError(400, message, "invalid_value", param="traffic")
        return value


def change_of(method: str, path: str) -> Change:
    """The change that a route stands for.

    Raises:
        ApiError: 501 for vLLM's own routes, which name folders that not every replica has.
    """
    if not path.startswith(_PREFIX):
        message = f"{path}: is not there with several replicas. Use PUT and DELETE /v1/adapters/NAME."
        raise ApiError(501, message, "not_with_replicas")
    name = path.removeprefix(_PREFIX)
    for suffix, verb in (("/rollback", "rollback"), ("/traffic", "traffic")):
        if name.endswith(suffix) and method in ("POST", "PUT"):
            return Change(verb, name.removesuffix(suffix))
    return Change("remove" if method == "DELETE" else "publish", name)
