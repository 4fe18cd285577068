"""One adapter is kept busy while another is asked once: which is answered first?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from tests.stock.pair import QUESTION, SEQUENCES, Server

_LENGTH = 60  # tokens of an answer
_APART_S = 0.3  # so the server reads them in the order in which they were asked


def order_of_answers(server: Server, busy: str, late: str, after_s: float) -> list[str]:
    """Ask `busy` much, later `late` once, then `busy` twice more; the names in the order of their answers.

    They are "first", "before", "late", "second", "third". What `busy` is asked at a time is one request with
    many prompts, so that what waits in the server does not hang on clients that ask again in time: where the
    server takes every processor they come seconds late.
    """
    answered: list[str] = []
    with ThreadPoolExecutor() as threads:

        @contextmanager
        def asked(name: str, model: str, prompts: int, length: int = _LENGTH) -> Iterator[None]:
            asking = threads.submit(_ask, server, model, prompts, length)
            asking.add_done_callback(lambda _: answered.append(name))
            time.sleep(_APART_S)
            yield
            asking.result()

        with asked("first", busy, 5 * SEQUENCES):
            # These are next. From then on what runs side by side ends a part of its length apart: if all
            # ended in one step, it would leave a gap.
            for part in range(1, SEQUENCES):
                threads.submit(_ask, server, busy, 1, _LENGTH * part // SEQUENCES)
            time.sleep(_APART_S)
            with asked("before", busy, 100):
                time.sleep(after_s)
                with asked("late", late, 1, 1), asked("second", busy, 24), asked("third", busy, 24):
                    pass
    return answered


def _ask(server: Server, model: str, prompts: int, length: int) -> None:
    body = {"model": model, "prompt": [QUESTION] * prompts, "max_tokens": length, "ignore_eos": True}
    answer = server.send("POST", "/v1/completions", body)
    assert answer.status == httpx.codes.OK, answer.body
    assert len(answer.body["choices"]) == prompts
