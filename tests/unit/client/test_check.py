"""What `spillway check` makes of a cluster."""
from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

from spillway.client.commands.check import Bounds, Finding, Level, judge, nagios, prometheus, worst
from spillway.client.model import ClusterStatus, DestinationStats, GroupReport, Problem

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NONE = Bounds(None, None)
NEVER = {"age": NONE, "backlog": NONE, "dead": NONE}
STATS = DestinationStats(messages=5, leased=0, queues=2, dead_letters=1, enqueued_total=0, acked_total=0, dead_lettered_total=0,
                         retried_total=0, expired_total=0, oldest_enqueue_time=NOW - timedelta(seconds=90), parked_until_time=None,
                         parked_tenants=0, shards_missing=())


def group(number: int, leader: str) -> GroupReport:
    """A group of one."""
    return GroupReport(number, leader, 1, (), (), (), (), False)


FINE = ClusterStatus("c", (), (group(0, "n1"), group(1, "n1")), ())


def test_a_shard_without_a_leader_is_critical_and_comes_first() -> None:
    """Other problems are warnings, with what to do."""
    broken = ClusterStatus("c", (), (group(0, ""), group(1, "n1"), group(2, "")), (Problem("node n2 does not answer", "start it again"),))
    found = judge(broken, {}, NEVER, NOW)
    assert [(one.level, one.what) for one in found] == [
        (Level.CRITICAL, "the meta group has no leader"), (Level.CRITICAL, "shard 2 has no leader"),
        (Level.WARNING, "node n2 does not answer; start it again")]
    assert worst(found) is Level.CRITICAL and worst([]) is Level.OK


def test_bounds_are_reached_by_their_own_value() -> None:
    """Without bounds nothing is wrong; what did not answer is not known, which is less than critical and more than a warning."""
    assert judge(FINE, {"d": STATS}, NEVER, NOW) == []
    bounds = {"age": Bounds(60, 91), "backlog": Bounds(1, 5), "dead": Bounds(2, None)}
    silent = dataclasses.replace(STATS, messages=0, oldest_enqueue_time=None, shards_missing=(3,))
    found = judge(FINE, {"d": STATS, "e": silent}, bounds, NOW)
    assert found == [Finding(Level.CRITICAL, "d", "5 messages wait"), Finding(Level.UNKNOWN, "e", "shards 3 did not answer"),
                     Finding(Level.WARNING, "d", "its oldest message is 1m 30s old")]


def test_lines_for_monitors_stay_whole_whatever_names_are() -> None:
    """A bar ends the text for Nagios; quotes end labels of Prometheus."""
    measured = {'a|"b\\': {"age": 1.5, "backlog": 10.0, "dead": 0.0}}
    findings = [Finding(Level.WARNING, f"d{n}|", "x") for n in range(7)]
    line = nagios(findings, measured, {**NEVER, "age": Bounds(1, 2.5)})
    assert line == ("SPILLWAY WARNING - d0/: x; d1/: x; d2/: x; d3/: x; d4/: x; 2 more | "
                    "age_max=2s;1;2.5;0 backlog_max=10;;;0 dead_max=0;;;0")
    text = prometheus(Level.OK, measured)
    assert 'spillway_check_messages{destination="a|\\"b\\\\"} 10\n' in text and text.endswith("} 0\n")
    assert 'spillway_check_oldest_age_seconds{destination="a|\\"b\\\\"} 1.5\n' in text
