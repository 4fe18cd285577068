"""Who takes part in a fleet, and when a change holds everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.scaleout.membership import FENCE_S, LEASE_S, REPORT_EVERY_S, Fence, Membership


def test_a_change_holds_once_every_member_goes_by_it() -> None:
    membership = Membership(0.0)
    membership.report("a", 4, 20.0)
    membership.report("b", 3, 20.0)
    assert membership.behind(4, 20.0) == ["b"]
    membership.report("b", 5, 20.5)
    assert membership.behind(4, 20.5) == []


def test_one_that_has_left_or_is_silent_holds_nobody_up() -> None:
    membership = Membership(0.0)
    for replica in "abc":
        membership.report(replica, 1, 20.0)
    membership.leave("a")
    membership.leave("nobody")
    assert membership.behind(2, 20.0) == ["b", "c"]
    membership.report("b", 2, 20.0 + LEASE_S)
    assert membership.behind(2, 20.1 + LEASE_S) == []
    assert membership.members(20.1 + LEASE_S) == ["b"]


def test_a_controller_that_starts_anew_waits_for_those_of_before() -> None:
    membership = Membership(100.0)
    assert not membership.is_settled(100.0 + LEASE_S - 0.1)
    assert membership.is_settled(100.0 + LEASE_S)


def test_a_replica_stops_before_it_counts_no_more() -> None:
    """Its clock starts before the report is sent, the controller's when it is heard."""
    assert REPORT_EVERY_S < FENCE_S < LEASE_S


def test_a_replica_that_does_not_reach_a_controller_that_is_there_stops() -> None:
    fence = Fence(0.0)
    assert fence.silent_s(8.0) == 0.0
    assert fence.silent_s(8.5) == 8.5
    fence.reported(7.0)
    assert fence.silent_s(8.5) == 0.0
    fence.reported(3.0)  # an answer that overtook another
    assert fence.silent_s(8.5) == 0.0


def test_without_a_controller_replicas_go_on_and_with_a_new_one_they_have_to_reach_it() -> None:
    fence, asked = Fence(0.0), 0
    for second in range(100):
        if fence.should_ask(float(second)):
            asked += 1
            fence.nobody_is_there(float(second))
        assert fence.silent_s(float(second)) == 0.0
    assert 20 < asked < 40, "Ray is asked now and then"
    assert fence.silent_s(103.0) == 0.0
    assert fence.silent_s(109.0) > 0


def test_while_reports_are_heard_nobody_asks_ray() -> None:
    fence = Fence(0.0)
    for second in range(100):
        fence.reported(float(second))
        assert not fence.should_ask(second + 1.5)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5), st.floats(0, 3)), max_size=40))
def test_nobody_is_both_a_member_and_long_silent(reports: list[tuple[str, int, float]]) -> None:
    membership, now, heard = Membership(0.0), 0.0, dict[str, float]()
    for replica, revision, step in reports:
        now += step
        membership.report(replica, revision, now)
        heard[replica] = now
    for later in (0.0, LEASE_S / 2, LEASE_S + 1):
        expected = sorted(replica for replica, at in heard.items() if now + later - at <= LEASE_S)
        assert membership.members(now + later) == expected
