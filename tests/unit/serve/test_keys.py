"""Nobody gets past the keys: R4, R5, and what a server on this machine allows without any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.keys import Keys
from serve.routes import RouteKind
from vllm_lora_ext.errors import BadSetting

FREE, OPEN, MODEL, ADMIN_READ, ADMIN_CHANGE = RouteKind
NEED_A_KEY = (OPEN, MODEL, ADMIN_READ, ADMIN_CHANGE)
BOTH = Keys(["api-1", "api-2"], ["boss"], loopback=False)


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


def answer(keys: Keys, kind: RouteKind, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    error = keys.check(kind, headers)
    return error and (error.status, error.code)


def test_a_key_opens_what_it_is_for() -> None:
    for key in ("api-1", "api-2", "boss"):
        assert answer(BOTH, MODEL, bearer(key)) is None
        assert answer(BOTH, MODEL, [(b"x-api-key", key.encode())]) is None
        assert answer(BOTH, MODEL, [(b"Authorization", b"bEARER   " + key.encode())]) is None
    for kind in (ADMIN_READ, ADMIN_CHANGE):
        assert answer(BOTH, kind, bearer("boss")) is None
        assert answer(BOTH, kind, bearer("api-1")) == (403, "admin_key_required")


@pytest.mark.parametrize(
    "headers",
    [
        *([], bearer("wrong"), bearer(""), bearer("API-1"), bearer("api-1,api-2"), bearer("密钥")),
        *([(b"authorization", b"Basic api-1")], [(b"authorization", b"api-1")], [(b"authorization", b"")]),
        *(bearer("api-1") + bearer("api-1"), [*bearer("api-1"), (b"authorization", b"Basic eA==")]),
        *([*bearer("wrong"), (b"x-api-key", b"api-1")], [(b"x-api-key", b"api-1"), (b"x-api-key", b"wrong")]),
        *([(b"cookie", b"api-1")], [(b"api-key", b"api-1")], [(b"referer", b"http://h/?api_key=boss")]),
    ],
)
@pytest.mark.parametrize("kind", NEED_A_KEY)
def test_anything_else_is_401_and_an_object(kind: RouteKind, headers: list[tuple[bytes, bytes]]) -> None:
    error = BOTH.check(kind, headers)
    assert error is not None
    assert (error.status, error.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert error.body()["error"]["code"] == "invalid_api_key"
    assert "api-1" not in str(error.body())


def test_health_needs_no_key() -> None:
    assert BOTH.check(FREE, []) is None
    assert BOTH.check(FREE, bearer("wrong")) is None


@pytest.mark.parametrize("keys", [Keys([], ["boss"], True), Keys(["api"], [], True)])
def test_any_key_turns_keys_on(keys: Keys) -> None:
    for kind in NEED_A_KEY:
        assert answer(keys, kind, []) == (401, "invalid_api_key")


def test_without_an_admin_key_adapters_change_from_this_machine_only() -> None:
    near, far, far_without_keys = Keys(["api"], [], True), Keys(["api"], [], False), Keys([], [], False)
    assert answer(near, ADMIN_CHANGE, bearer("api")) is None
    for keys in (far, far_without_keys):
        error = keys.check(ADMIN_CHANGE, bearer("api"))
        assert error is not None
        assert (error.status, error.code) == (403, "admin_key_required")
        assert "--admin-key" in error.message
        assert keys.check(ADMIN_READ, bearer("api")) is None
    assert far_without_keys.check(MODEL, []) is None


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"])
def test_this_machine_needs_no_key(host: str) -> None:
    keys = Keys([], [], True)
    headers = [(b"host", host.encode()), (b"origin", b"http://" + host.encode())]
    assert all(keys.check(kind, headers) is None for kind in RouteKind)


@pytest.mark.parametrize(
    "header",
    [
        *((b"origin", b"https://evil.example"), (b"origin", b"null"), (b"origin", b"http://[")),
        *((b"origin", b"http://localhost.evil.example"), (b"origin", b"http://127.0.0.1.evil.example")),
        *((b"host", b"evil.example:8000"), (b"host", b"192.168.0.9"), (b"host", b""), (b"host", b"\xff")),
    ],
)
def test_a_web_page_must_not_change_a_server_without_keys(header: tuple[bytes, bytes]) -> None:
    headers = [(b"host", b"localhost"), header]
    keys = Keys([], [], True)
    assert answer(keys, ADMIN_CHANGE, headers) == (403, "origin_refused")
    assert keys.check(MODEL, headers) is None
    assert Keys(["api"], [], True).check(ADMIN_CHANGE, [*headers, *bearer("api")]) is None


_KEY = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)
_VALUE = st.one_of(
    st.binary(), st.tuples(st.sampled_from([b"", b"Bearer ", b"Basic "]), st.binary()).map(b"".join)
)
_HEADERS = st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"host", b"origin"]), _VALUE))


@given(st.lists(_KEY, min_size=1), _HEADERS, _KEY, st.sampled_from(NEED_A_KEY))
def test_no_key_is_accepted_that_was_not_given(
    given_keys: list[str], headers: list[tuple[bytes, bytes]], other: str, kind: RouteKind
) -> None:
    keys = Keys(given_keys, [], True)
    for tried in (headers, bearer(other), bearer(given_keys[0] + other), bearer(given_keys[0][:-1])):
        sent = [
            value.strip().split(b" ")[-1] for name, value in tried if name in (b"authorization", b"x-api-key")
        ]
        if not set(sent) & {key.encode() for key in given_keys}:
            assert answer(keys, kind, tried) == (401, "invalid_api_key")


@pytest.mark.parametrize("key", ["", " ", "secret key", "key\n", "密钥"])
def test_a_key_that_cannot_be_sent_is_refused_unshown(key: str) -> None:
    for keys in (([key], []), ([], [key])):
        with pytest.raises(BadSetting, match="-key: is empty") as caught:
            Keys(*keys, loopback=True)
        assert not key.strip() or key not in str(caught.value)


def test_no_key_is_shown_or_kept() -> None:
    assert repr(BOTH) == "Keys(2 API keys, 1 admin keys)"
    assert "api-1" not in str(vars(BOTH))
    assert "boss" not in str(vars(BOTH))
