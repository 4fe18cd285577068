"""A server of `/v1/adapters` over a real catalog, with nothing behind it: real sockets, and no engine."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from serve.adapter_view import LiveFacts, adapter_detail, adapter_view, finding_data, removed_view
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import AdapterExists, AdapterRefused, AdapterUnknown, StoreFailed, VllmLoraError
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.sources import AdapterSource

STATUS = {AdapterExists: 409, AdapterRefused: 422, AdapterUnknown: 404, StoreFailed: 507}
CODE = {404: "adapter_unknown", 409: "adapter_exists", 422: "adapter_refused", 507: "store_failed"}
FACTS = LiveFacts("slot", requests=7, running=1, last_used="2026-01-02T03:04:05+00:00", load_seconds=0.012)


class AdapterServer(ThreadingHTTPServer):
    """`answer` in place of what the catalog says: status and body. `seen` are methods and raw paths."""

    daemon_threads = True

    def __init__(self, catalog: Catalog, rules: Rules, admin_key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.catalog, self.rules, self.admin_key = catalog, rules, admin_key
        self.answer: tuple[int, bytes] | None = None
        self.fail: Callable[[], None] = lambda: None
        self.seen: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *args: Any) -> None:
        """A client that goes away in the middle is no news."""

    @contextmanager
    def running(self) -> Any:
        thread = Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: AdapterServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """The tests have nothing to read here."""

    def _handle(self) -> None:
        self.server.seen.append((self.command, self.path))
        body = self._body()
        if self.server.answer is not None:
            self._send(*self.server.answer)
            return
        key = self.server.admin_key
        if key is not None and self.headers["Authorization"] != f"Bearer {key}":
            self._fail(401, "invalid_api_key", "The key is missing or wrong.")
            return
        try:
            self.server.fail()
            self._send(200, json.dumps(self._answer(body)).encode())
        except VllmLoraError as error:
            status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)
            findings = error.findings if isinstance(error, AdapterRefused) else ()
            told = [finding_data(finding) for finding in findings]
            self._fail(status, CODE.get(status, "invalid_value"), str(error), findings=told)

    do_GET = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815  http.server's names

    def _answer(self, body: bytes) -> dict[str, Any]:
        catalog, url = self.server.catalog, urlsplit(self.path)
        path = unquote(url.path)
        if path == "/v1/adapters":
            return {"object": "list", "data": [adapter_view(entry, (), FACTS) for entry in catalog.entries()]}
        name = path.removeprefix("/v1/adapters/")
        if name.endswith("/rollback"):
            name = name.removesuffix("/rollback")
            catalog.rollback(name, json.loads(body)["to"])
        elif name.endswith("/traffic"):
            name = name.removesuffix("/traffic")
            catalog.set_traffic(name, json.loads(body)["traffic"])
        elif self.command == "PUT":
            return self._publish(name, body, "replace=true" in url.query)
        elif self.command == "DELETE":
            catalog.remove([name])
            return removed_view(name)
        elif self.command == "GET":
            return adapter_detail(catalog.entry(name), (), catalog, FACTS)
        return adapter_view(catalog.entry(name), (), FACTS)

    def _publish(self, name: str, body: bytes, replace: bool) -> dict[str, Any]:
        assert self.headers["Content-Type"] == "application/x-tar"
        stated = self.headers["X-Chat-Settings"]
        chat = ChatOverride.from_json(json.loads(stated)) if stated else ChatOverride()
        with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(body)) as archive:
            archive.extractall(folder, filter="data")
            source = AdapterSource(name, folder)
            entry, inspection = publish(source, self.server.catalog, self.server.rules, replace, chat)
        return adapter_view(entry, inspection.findings, FACTS)

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _fail(self, status: int, code: str, message: str, **more: Any) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code, **more}
        self._send(status, json.dumps({"error": error}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
