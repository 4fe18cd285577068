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
    flags = ("--replicas", "1", "--max-replicas", "2", "--ongoing-per-replica", "2", "--scale-in-after", "75")
    outcomes, much, some = list[str](), threading.Event(), threading.Event()
    with running_fleet(tiny_base, tmp_path, *flags) as fleet, ThreadPoolExecutor(5) as pool:

        def work(name: str, until: threading.Event) -> None:
            with fleet.client() as client:
                while not until.is_set():
                    outcomes.append(streamed(client, name, 100))
                    time.sleep(0.3)

        wait_for(fleet, 1)
        began = time.monotonic()
        working = [pool.submit(work, name, much) for name in NAMES[:5]]
        try:
            while len(fleet.children()) < 2:
                assert time.monotonic() < began + 120, "nothing comes"
                time.sleep(0.2)
            grew_after = time.monotonic() - began
            much.set()  # the new replica's start needs the processors
            wait_for(fleet, 2)
            with fleet.client() as client:
                place = {name: ask(client, name).headers["X-Replica"] for name in NAMES}
            assert len(set(place.values())) == 2
            names = [next(n for n in NAMES if place[n] == replica) for replica in set(place.values())]
            working += [pool.submit(work, name, some) for name in names]
            while len(fleet.children()) > 1:
                assert time.monotonic() < began + 300, "nothing leaves"
                time.sleep(0.2)
        finally:
            much.set()
            some.set()
        for one in working:
            one.result()
    print(f"a second replica was started after {grew_after:.0f} s of load; streams:", Counter(outcomes))
    assert set(outcomes) == {"whole"}
