"""What a fleet of replicas is told: a few flags of its own, and the command line of `vllm-lora serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.flags import at_least
from vllm_lora_ext.errors import BadSetting

ENGINE, CONTROLLER, GATEWAY = "engine", "controller", "gateway"  # the deployments of a fleet
REVISION_FILE, TRIAL_SOCKET = "revision", "trial"  # in a replica's own folder
REPLICAS_FLAG = "--replicas"
_NOT_WITH_REPLICAS = {  # and what to do instead
    "--uds": "Use --host and --port.",
    "--catalog-from-source": "Leave it out: one controller follows the folders for all replicas.",
}


@dataclass(frozen=True)
class FleetSettings:
    """`serve` are the flags of every replica's server; counts are of replicas, `ongoing` of requests.

    With `max_replicas` above `replicas` Ray scales by ongoing requests, `ongoing` of them for each replica.
    With `replica_state_dir` each replica has a copy there of what the controller keeps; else they share it.
    """

    serve: tuple[str, ...]
    replicas: int
    max_replicas: int
    ray_address: str | None
    most: int
    ongoing: int
    cpus: float
    gpus: float
    scale_in_after_s: float
    policy: str = "affinity"
    start_timeout_s: float = 900.0
    replica_state_dir: Path | None = None

    @property
    def scales(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.max_replicas > self.replicas


def add_fleet_flags(parser: argparse._ActionsContainer) -> None:
    """The flags that make of one server many."""
    parser.add_argument(
        REPLICAS_FLAG,
        type=at_least(1),
        metavar="N",
        help="run N engines behind one address on Ray Serve (extra `ray`); see docs/scaleout.md",
    )
    parser.add_argument(
        "--max-replicas", type=at_least(1), metavar="N", help="scale by ongoing requests up to N replicas"
    )
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="the Ray cluster to run on; default: one on this machine"
    )
    parser.add_argument(
        "--adapter-replicas",
        type=at_least(0),
        default=0,
        metavar="K",
        help="replicas that one version lies on at most; default: half of all",
    )
    parser.add_argument(
        "--ongoing-per-replica",
        type=at_least(1),
        default=16,
        metavar="N",
        help="requests that a replica runs side by side without harm: the aim of scaling, and from half of "
        "it on a version may spread; default: 16",
    )
    parser.add_argument(
        "--scale-in-after",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds of less load before a replica leaves; default: 600",
    )
    parser.add_argument("--cpus-per-replica", type=float, default=1.0, metavar="N")
    parser.add_argument("--gpus-per-replica", type=float, default=0.0, metavar="N")
    parser.add_argument(
        "--replica-state-dir",
        type=Path,
        metavar="DIR",
        help="a folder on every node, in which each replica keeps a copy of all versions, fetched by digest; "
        "for nodes that do not share --state-dir",
    )
    parser.add_argument("--routing", choices=("affinity", "spread"), default="affinity")


def read_fleet_settings(argv: Sequence[str]) -> FleetSettings:
    """The fleet's flags out of a command line, the rest being every server's.

    Raises:
        BadSetting: a flag that cannot be, with several replicas.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_fleet_flags(parser)
    flags, rest = parser.parse_known_args(list(argv))
    replicas = flags.replicas or 1
    most = flags.max_replicas or replicas
    if most < replicas:
        raise BadSetting(f"--max-replicas {most}", f"is below --replicas {replicas}", "Raise it.")
    for word in rest:
        if (flag := word.partition("=")[0].replace("_", "-")) in _NOT_WITH_REPLICAS:
            raise BadSetting(flag, "does not go with --replicas", _NOT_WITH_REPLICAS[flag])
    return FleetSettings(
        tuple(rest),
        replicas,
        most,
        flags.ray_address,
        flags.adapter_replicas,
        flags.ongoing_per_replica,
        flags.cpus_per_replica,
        flags.gpus_per_replica,
        flags.scale_in_after,
        flags.routing,
        replica_state_dir=flags.replica_state_dir,
    )


def wants_fleet(argv: Sequence[str]) -> bool:
    """Whether a command line asks for replicas."""
    return any(word == REPLICAS_FLAG or word.startswith(f"{REPLICAS_FLAG}=") for word in argv)


def without(flags: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """A command line without some flags and their values: one word each, several for --lora-modules."""
    kept: list[str] = []
    words = list(flags)
    while words:
        word = words.pop(0)
        flag, separator, _ = word.partition("=")
        flag = flag.replace("_", "-")
        if flag not in names:
            kept.append(word)
        elif flag == "--lora-modules":
            while words and not words[0].startswith("-"):
                words.pop(0)
        elif not separator and words:
            words.pop(0)
    return tuple(kept)
