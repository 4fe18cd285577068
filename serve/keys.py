"""Who may ask: API keys and admin keys, and what a server on this machine allows without any."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from serve.openai_errors import ApiError
from serve.routes import RouteKind
from vllm_lora_ext.errors import BadSetting

Headers = Sequence[tuple[bytes, bytes]]
_ADMIN = (RouteKind.ADMIN_READ, RouteKind.ADMIN_CHANGE)


class Keys:
    """Checks the key of every request; `loopback` says that only this machine can reach the server.

    Once any key is set, everything but FREE routes needs one. Only digests of the keys are kept.

    Raises:
        BadSetting: a key that no client could send.
    """

    def __init__(self, api_keys: Sequence[str], admin_keys: Sequence[str], loopback: bool) -> None:
        self._api = tuple(_digest_of("--api-key", key) for key in api_keys)
        self._admin = tuple(_digest_of("--admin-key", key) for key in admin_keys)
        self._loopback = loopback

    def __repr__(self) -> str:
        return f"Keys({len(self._api)} API keys, {len(self._admin)} admin keys)"

    def check(self, kind: RouteKind, headers: Headers) -> ApiError | None:
        """Why a request must not pass; None if it may."""
        if kind is RouteKind.FREE:
            return None
        if kind is RouteKind.ADMIN_CHANGE and not self._admin and not self._loopback:
            return _needs_admin("Adapters can be changed on this server once it is started with --admin-key.")
        if not self._api and not self._admin:
            return _origin_refused(headers) if kind is RouteKind.ADMIN_CHANGE else None
        token = _token(headers)
        if isinstance(token, ApiError):
            return token
        digest = hashlib.sha256(token).digest()
        is_api, is_admin = _among(digest, self._api), _among(digest, self._admin)
        if not is_api and not is_admin:
            return _invalid("The API key is not one of this server's.")
        if kind in _ADMIN and self._admin and not is_admin:
            return _needs_admin("Adapters are listed and changed with the admin key (--admin-key) only.")
        return None


def _digest_of(flag: str, key: str) -> bytes:
    if not key or not all("!" <= sign <= "~" for sign in key):
        rule = "is empty, or holds a blank or a character that is not ASCII"
        raise BadSetting(flag, rule, "Choose letters, digits and signs.")
    return hashlib.sha256(key.encode()).digest()


def _among(digest: bytes, known: Sequence[bytes]) -> bool:
    """Takes the same time whichever of them it is."""
    return sum(hmac.compare_digest(digest, one) for one in known) > 0


def _token(headers: Headers) -> bytes | ApiError:
    """The one key of a request: `Authorization: Bearer`, or `x-api-key` as Anthropic's clients send it."""
    bearers, tokens = _values(headers, b"authorization"), _values(headers, b"x-api-key")
    for value in bearers:
        scheme, _, token = value.partition(b" ")
        if scheme.lower() != b"bearer":
            return _invalid("The Authorization header must be 'Bearer' and the API key.")
        tokens.append(token.strip())
    if not any(tokens):
        return _invalid("An API key is needed, as 'Authorization: Bearer KEY'.")
    if len(tokens) > 1:
        return _invalid("The request carries more than one API key.")
    return tokens[0]


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value.strip() for key, value in headers if key.lower() == name]


def _origin_refused(headers: Headers) -> ApiError | None:
    """Without keys, a web page that this machine's browser shows must not change the server.

    A page of elsewhere says so in `Origin`; one whose name was made to point here, in `Host`.
    """
    origins = [_host(value) for value in _values(headers, b"origin")]
    hosts = [_host(b"//" + value) for value in _values(headers, b"host")]
    if all(map(_is_loopback, origins + hosts)):
        return None
    message = (
        "Web pages of other hosts must not change this server; with --api-key, a client may that has the key."
    )
    return ApiError(403, message, "origin_refused")


def _host(url: bytes) -> str:
    try:
        return urlsplit(url.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _invalid(message: str) -> ApiError:
    return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _needs_admin(message: str) -> ApiError:
    return ApiError(403, message, "admin_key_required")
