"""Stops a server that serves without our endpoint: vLLM logs a plugin that fails, and goes on without it."""

from __future__ import annotations

import os
import signal
import ssl
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace

_POLL_S = 1.0
_REQUEST_TIMEOUT_S = 10.0


class ReadyWatch:
    """Asks `/ready` once the server answers `/health`; 404 ends the server."""

    def __init__(self, args: Namespace) -> None:
        scheme = "https" if args.ssl_certfile else "http"
        host = "127.0.0.1" if args.host in (None, "", "0.0.0.0", "::") else args.host
        self._url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"
        self._by_file = bool(args.uds)
        self.never_ready = False

    def start(self) -> None:
        """Watch in the background; ends by itself."""
        if not self._by_file:
            threading.Thread(target=self._watch, name="ready-watch", daemon=True).start()

    def _watch(self) -> None:
        while self._status("/health") != 200:
            time.sleep(_POLL_S)
        if self._status("/ready") == 404:
            self.never_ready = True
            os.kill(os.getpid(), signal.SIGINT)

    def _status(self, path: str) -> int | None:
        """Status of a GET from this machine; None while nobody answers."""
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE  # our own server
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked)
        )
        try:
            with opener.open(self._url + path, timeout=_REQUEST_TIMEOUT_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None
