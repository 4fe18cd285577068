"""Which routes are open, and what each needs. What is not listed here is closed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum, auto

from serve.openai_errors import ApiError
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.names import ascii_shown


class RouteKind(Enum):
    """What a route needs: a key, the admin key, a `model` in its body."""

    FREE = auto()  # no key: load balancers ask
    OPEN = auto()  # no model in the body
    MODEL = auto()  # a JSON body with `model`
    ADMIN_READ = auto()
    ADMIN_CHANGE = auto()


_Methods = Mapping[str, RouteKind]

# `{id}` is one part of a path; `{name:path}` may hold anything, for the rule for names to answer.
_TABLE: Sequence[tuple[RouteKind, str, str]] = (
    (RouteKind.FREE, "GET", "/health /ready"),
    (RouteKind.OPEN, "GET", "/v1/models /v1/models/{id:path} /v1/responses/{id}"),
    (RouteKind.OPEN, "GET", "/ping /version /load /metrics /metrics/ /docs /redoc /openapi.json"),
    (RouteKind.OPEN, "POST", "/ping /v1/responses/{id}/cancel"),
    (RouteKind.MODEL, "POST", "/v1/chat/completions /v1/chat/completions/batch /v1/completions"),
    (RouteKind.MODEL, "POST", "/v1/responses /v1/messages /v1/messages/count_tokens"),
    (RouteKind.MODEL, "POST", "/v1/embeddings /pooling /classify /tokenize /detokenize"),
    (RouteKind.MODEL, "POST", "/score /v1/score /rerank /v1/rerank /v2/rerank"),
    (RouteKind.ADMIN_READ, "GET", "/v1/adapters /v1/adapters/{name:path}"),
    (RouteKind.ADMIN_CHANGE, "PUT", "/v1/adapters/{name:path} /v1/adapters/{name:path}/traffic"),
    (RouteKind.ADMIN_CHANGE, "DELETE", "/v1/adapters/{name:path}"),
    (RouteKind.ADMIN_CHANGE, "POST", "/v1/adapters/{name:path}/rollback"),
    (RouteKind.ADMIN_CHANGE, "POST", "/v1/load_lora_adapter /v1/unload_lora_adapter"),
)
_ADMIN = {RouteKind.ADMIN_READ, RouteKind.ADMIN_CHANGE}
# Some routers take a path that ends in a newline, or that has `//` or `..` in it, for another one.
_ODD = re.compile(r"[\x00-\x20\x7f\\;%]|//|/\.\.?(?:/|$)")


class Routes:
    """The allow-list, and what `--allow-route` adds to it: a path, or all that begins so with `*` at the end.

    A path is the decoded one of the ASGI scope, without the server's root path.

    Raises:
        BadSetting: a route of `allow` that could match no path.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        for route in allow:
            if not route.startswith("/") or "*" in route[:-1]:
                rule = "is no path that begins with '/', with or without '*' at its end"
                raise BadSetting(f"--allow-route {ascii_shown(route)}", rule, "For example: /v1/audio/*")
        self._allowed = {route for route in allow if not route.endswith("*")}
        self._allowed_prefixes = tuple(route[:-1] for route in allow if route.endswith("*"))
        listed: dict[str, dict[str, RouteKind]] = {}
        for kind, method, paths in _TABLE:
            for path in paths.split():
                listed.setdefault(path, {})[method] = kind
        self._listed = {path: methods for path, methods in listed.items() if "{" not in path}
        self._named = [  # the longest that matches decides
            (_pattern(path), listed[path]) for path in sorted(listed, key=len, reverse=True) if "{" in path
        ]

    def kind(self, method: str, path: str) -> RouteKind | None:
        """What a request for `path` needs; None if nobody may ask for it."""
        methods = self._methods(path)
        if methods is None:
            return RouteKind.OPEN if self._is_allowed(path) else None
        if method == "OPTIONS":  # a browser's question ahead of a request, which never carries a key
            return None if _ADMIN.intersection(methods.values()) else RouteKind.FREE
        return methods.get("GET" if method == "HEAD" else method)

    def closed(self, method: str, path: str) -> ApiError:
        """The answer to a request whose `kind` is None."""
        shown = ascii_shown(path)
        if methods := self._methods(path):
            answered = ", ".join(sorted({*methods, *({"HEAD"} if "GET" in methods else ())}))
            message = f"{shown}: does not answer {ascii_shown(method)}. Use {answered}."
            return ApiError(405, message, "method_not_allowed", headers={"Allow": answered})
        message = f"{shown}: is not open on this server. Start it with --allow-route PATH to open a route."
        return ApiError(404, message, "route_closed")

    def _methods(self, path: str) -> _Methods | None:
        if path in self._listed:
            return self._listed[path]
        return next((methods for pattern, methods in self._named if pattern.fullmatch(path)), None)

    def _is_allowed(self, path: str) -> bool:
        """Whether a flag opens it. No spelling that could reach a listed route past its key ever is."""
        if _ODD.search(path) or self._methods(path.rstrip("/")):
            return False
        return path in self._allowed or path.startswith(self._allowed_prefixes)


def _pattern(path: str) -> re.Pattern[str]:
    expression = re.sub(r"\\\{\w+:path\\\}", ".+", re.escape(path))
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", expression), re.DOTALL)
