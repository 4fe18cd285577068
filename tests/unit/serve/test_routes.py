"""What is not on the list is closed (R6 and S4), whatever the path looks like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.routes import RouteKind, Routes
from vllm_lora_ext.errors import BadSetting

FREE, OPEN, MODEL, ADMIN_READ, ADMIN_CHANGE = RouteKind

LISTED = {  # by hand, so that nothing gets open by an edit of the table alone
    FREE: ["GET /health", "GET /ready"],
    OPEN: [
        *(
            "GET /v1/models",
            "GET /v1/models/小李",
            "GET /v1/models/org/name",
            "GET /v1/models/a@0123456789ab",
        ),
        *("GET /v1/responses/resp_1", "POST /v1/responses/resp_1/cancel", "GET /ping", "POST /ping"),
        *("GET /version", "GET /load", "GET /metrics", "GET /metrics/"),
        *("GET /docs", "GET /redoc", "GET /openapi.json"),
    ],
    MODEL: [
        f"POST {path}"
        for path in (
            *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses"),
            *("/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/pooling", "/classify"),
            *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/tokenize", "/detokenize"),
        )
    ],
    ADMIN_READ: ["GET /v1/adapters", "GET /v1/adapters/org/name"],
    ADMIN_CHANGE: [
        *("PUT /v1/adapters/org/name", "DELETE /v1/adapters/小李", "PUT /v1/adapters/org/name/traffic"),
        *("POST /v1/adapters/org/name/rollback", "POST /v1/load_lora_adapter"),
        "POST /v1/unload_lora_adapter",
    ],
}
PATHS = sorted({line.split(" ", 1)[1] for lines in LISTED.values() for line in lines})
NAMED = ("/v1/models/", "/v1/adapters/", "/v1/responses/")  # an id follows, which may be anything
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind in LISTED for line in LISTED[kind]])
def test_a_listed_route_has_its_kind(kind: RouteKind, line: str) -> None:
    method, path = line.split(" ", 1)
    assert Routes().kind(method, path) is kind
    if method == "GET":
        assert Routes().kind("HEAD", path) is kind


@pytest.mark.parametrize(
    "path",
    [
        *(
            "//v1",
            "//v1/models",
            "/v1/..;/models",
            "/v1/../health",
            "/v1%2fmodels",
            "/v1/models/",
            "/V1/models",
        ),
        *("/v1/adapters/", "/health/", "/health\n", "/v1/chat/completions\n", "/metricsx", "", "health", "*"),
        *("/invocations", "/adapters", "/adapters/x", "/pause", "/resume", "/collective_rpc", "/sleep"),
        *("/server_info", "/reset_prefix_cache", "/v1/audio/transcriptions", "/inference/v1/generate"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_everything_else_is_not_there_and_says_how_to_open_it(method: str, path: str) -> None:
    routes = Routes()
    assert routes.kind(method, path) is None
    error = routes.closed(method, path)
    assert (error.status, error.code) == (404, "route_closed")
    assert "--allow-route" in error.message


@given(
    st.sampled_from(METHODS),
    st.one_of(
        st.text(),
        st.lists(st.sampled_from([*"/.;%\n\\", *(part for path in PATHS for part in path.split("/"))])).map(
            "/".join
        ),
        st.tuples(st.sampled_from(PATHS), st.text(max_size=3), st.text(max_size=3)).map(
            lambda parts: parts[1] + parts[0] + parts[2]
        ),
    ),
)
def test_no_path_beside_the_list_has_a_kind(method: str, path: str) -> None:
    listed = path in PATHS or any(path.startswith(named) and path != named for named in NAMED)
    if not listed:
        assert Routes().kind(method, path) is None


@given(st.sampled_from(METHODS), st.text(min_size=1), st.sampled_from(["/v1/*", "/*", "/v1/adapters*"]))
def test_no_flag_opens_a_way_around_the_admin_key(method: str, name: str, flag: str) -> None:
    for path in (f"/v1/adapters/{name}", f"/v1/adapters/{name}/rollback", f"/v1/adapters/{name}/traffic"):
        assert Routes([flag]).kind(method, path) in (None, ADMIN_READ, ADMIN_CHANGE)


@pytest.mark.parametrize("line", LISTED[ADMIN_READ] + LISTED[ADMIN_CHANGE])
@pytest.mark.parametrize("spelling", ["{}\n", "/{}", "{}/", "/v1/..{}", "/.{}"])
def test_no_flag_opens_an_odd_spelling_of_an_admin_route(line: str, spelling: str) -> None:
    method, path = line.split(" ", 1)
    assert Routes(["/*"]).kind(method, spelling.format(path)) is not OPEN


def test_a_listed_path_answers_its_own_methods_only() -> None:
    routes = Routes(["/v1/models"])
    assert routes.kind("DELETE", "/v1/models") is None
    error = routes.closed("DELETE", "/v1/models")
    assert (error.status, error.code, error.headers) == (405, "method_not_allowed", {"Allow": "GET, HEAD"})
    assert Routes().closed("GET", "/v1/adapters/a/rollback").headers == {"Allow": "POST"}
    assert Routes().closed("POST", "/v1/adapters/a").headers == {"Allow": "DELETE, GET, HEAD, PUT"}


def test_a_flag_opens_a_path_or_all_that_begins_so() -> None:
    routes = Routes(["/pause", "/v1/audio/*"])
    assert {routes.kind(method, "/pause") for method in ("GET", "POST")} == {OPEN}
    assert routes.kind("POST", "/v1/audio/transcriptions") is OPEN
    for path in ("/pause/", "/pausex", "/v1/audio", "/v1/audio/../adapters", "/v1/audio//x"):
        assert routes.kind("POST", path) is None
    assert Routes(["/*"]).kind("POST", "/v1/chat/completions") is MODEL


@pytest.mark.parametrize("route", ["pause", "", "*", "/v1/*/x"])
def test_a_flag_that_can_open_nothing_is_refused(route: str) -> None:
    with pytest.raises(BadSetting, match="--allow-route"):
        Routes([route])


def test_a_browser_may_ask_ahead_where_it_may_go_and_never_about_admin_routes() -> None:
    assert Routes().kind("OPTIONS", "/v1/chat/completions") is FREE
    assert Routes().kind("OPTIONS", "/v1/adapters/x") is None
    assert Routes().kind("OPTIONS", "/invocations") is None


def test_a_message_holds_no_raw_path() -> None:
    message = Routes().closed("GET", "/\x1b[31m" + "x" * 10_000).message
    assert message.isprintable()
    assert len(message) < 300
