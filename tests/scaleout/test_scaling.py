"""A fleet that follows its load: a second replica comes, and goes without cutting what it is at."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.scaleout.conftest import running_fleet, wait_for
from tests.scaleout.test_fleet import NAMES, ask, streamed


def test_a_fleet_grows_with_its_load_and_shrinks_without_cutting_a_stream(
    tiny_base: Path, tmp_path: Path
) -> None:
    flags = ("--replicas", "1", "--max-replicas", "2", "--ongoing-per-replica", "1", "--scale-in-after", "10")
    with running_fleet(tiny_base, tmp_path, *flags) as fleet, ThreadPoolExecutor(4) as pool:
        wait_for(fleet, 1)
        much, some, outcomes = threading.Event(), threading.Event(), list[str]()

        def work(number: int) -> None:
            with fleet.client() as client:
                while not (some if number < 1 else much).is_set():
                    outcomes.append(streamed(client, NAMES[(number + len(outcomes)) % len(NAMES)], 100))
                    time.sleep(0.3)  # the new replica's start needs a processor as well

        working = [pool.submit(work, number) for number in range(4)]
        try:
            began = time.monotonic()
            wait_for(fleet, 2)
            grew_after = time.monotonic() - began
            with fleet.client() as client:
                assert len({ask(client, name).headers["X-Replica"] for name in NAMES}) == 2
            much.set()
            began = time.monotonic()
            while len(fleet.children()) > 1:
                assert time.monotonic() < began + 120, "nothing leaves"
                time.sleep(0.2)
            shrank_after = time.monotonic() - began
        finally:
            much.set()
            some.set()
        for one in working:
            one.result()
    print(f"two replicas after {grew_after:.0f} s, one after {shrank_after:.0f} s:", Counter(outcomes))
    assert set(outcomes) == {"whole"}
