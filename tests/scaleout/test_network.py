"""Who can reach a fleet on one machine: this machine."""

from __future__ import annotations

import ipaddress

import psutil

from tests.scaleout.conftest import Fleet


def test_only_ray_serves_own_ports_are_open_to_others(fleet: Fleet) -> None:
    """Those of its actors, on which no setting bears; they ask for Ray's token."""
    server = psutil.Process(fleet.server.pid)
    names = {process.pid: process.name() for process in (server, *server.children(recursive=True))}
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    ours = [(names[one.pid], ipaddress.ip_address(one.laddr.ip)) for one in listening if one.pid in names]
    assert any(name == "raylet" for name, _ in ours) and any("gcs" in name for name, _ in ours)
    opened = {name for name, ip in ours if not (ip.is_loopback or _is_loopback_of_4(ip))}
    assert all(name.startswith("ray::ServeReplica") for name in opened), opened


def _is_loopback_of_4(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(ip, "ipv4_mapped", None)
    return mapped is not None and mapped.is_loopback
