"""The command line of a fleet, and what of it goes to its servers."""

from __future__ import annotations

import pytest

from serve.scaleout.settings import read_fleet_settings, wants_fleet, without
from vllm_lora_ext.errors import BadSetting


def test_the_fleets_flags_are_taken_out_and_all_else_is_every_servers() -> None:
    line = "base --adapters a --replicas 2 --max-loras 4 --max-replicas=5 --adapter-replicas 3 --api-key k"
    settings = read_fleet_settings(line.split())
    assert settings.serve == ("base", "--adapters", "a", "--max-loras", "4", "--api-key", "k")
    assert (settings.replicas, settings.max_replicas, settings.most, settings.scales) == (2, 5, 3, True)
    assert not read_fleet_settings(["--replicas", "2"]).scales


@pytest.mark.parametrize("line", ["--replicas 3 --max-replicas 2", "--replicas 2 --uds /run/x"])
def test_what_cannot_be_is_refused(line: str) -> None:
    with pytest.raises(BadSetting):
        read_fleet_settings(line.split())


def test_a_fleet_is_wanted_by_one_flag() -> None:
    assert wants_fleet(["base", "--replicas", "2"])
    assert wants_fleet(["--replicas=2"])
    assert not wants_fleet(["base", "--adapters", "replicas", "--max-replicas", "2"])


def test_flags_leave_with_their_values() -> None:
    line = "--adapters a base --adapters=b --host h --lora-modules x=1 y=2 --max-loras 4 --state_dir s"
    flags = line.split()
    names = ("--adapters", "--host", "--lora-modules", "--state-dir")
    assert without(flags, names) == ("base", "--max-loras", "4")
