"""How credit is split over nodes."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spillway.contract.credits import CYCLE_SECONDS, DWELL_SECONDS_MAX, REST_SECONDS, CreditSplitter


class Nodes:
    """Nodes that keep their balance as the broker does: a plain sum."""

    def __init__(self, messages: int, bytes: int, names: str) -> None:
        self.splitter: CreditSplitter[str] = CreditSplitter(messages, bytes)
        self.messages = dict.fromkeys(names, 0)
        self.bytes = dict.fromkeys(names, 0)
        self.now = 0.0
        for name in names:
            self.splitter.add(name, 0.0)

    def plan(self) -> None:
        """Carries out the plan."""
        for node, messages, bytes_ in self.splitter.plan(self.now):
            self.messages[node] += messages
            self.bytes[node] += bytes_

    def run(self, seconds: float) -> None:
        """Lets time pass, planning when asked to."""
        end = self.now + seconds
        while (due := self.splitter.wake_time(self.now)) is not None and due <= end:
            self.now = max(due, self.now + 1e-6)
            self.plan()
        self.now = end
        self.plan()

    def deliver(self, node: str, messages: int = 1, bytes: int = 1) -> None:
        """The node delivers, within its balance."""
        assert self.messages[node] >= messages and self.bytes[node] > 0
        self.messages[node] -= messages
        self.bytes[node] -= bytes
        self.splitter.delivered(node, messages, bytes, self.now)


def test_the_first_split_is_even() -> None:
    """Each node gets its share of messages and bytes."""
    nodes = Nodes(256, 1000, "abc")
    nodes.plan()
    assert sorted(nodes.messages.values()) == [85, 85, 86]
    assert sum(nodes.bytes.values()) == 1000


def test_a_single_node_gets_everything() -> None:
    """No splitting, no rotation, no timers."""
    nodes = Nodes(7, 70, "a")
    nodes.plan()
    assert nodes.messages == {"a": 7} and nodes.splitter.wake_time(0.0) is None


def test_what_is_settled_goes_to_the_node_that_has_none() -> None:
    """A busy node gets back what it used up."""
    nodes = Nodes(30, 3000, "abc")
    nodes.plan()
    nodes.deliver("a", 10, 10)
    nodes.splitter.settled(10, 10)
    nodes.plan()
    assert nodes.messages["a"] == 10


def test_idle_credit_moves_to_a_busy_node() -> None:
    """While b and c are idle, a comes to hold nearly everything; each keeps one."""
    nodes = Nodes(120, 12_000, "abc")
    nodes.plan()
    nodes.deliver("a", 40)
    for _ in range(12):
        nodes.run(DWELL_SECONDS_MAX + REST_SECONDS)
        if nodes.messages["a"]:
            nodes.deliver("a", nodes.messages["a"])
    assert nodes.messages["b"] == nodes.messages["c"] == 1
    assert nodes.splitter.messages_out == 118


@pytest.mark.parametrize("count", [2, 3])
def test_one_message_of_credit_goes_round(count: int) -> None:
    """With one credit and several nodes, each has it within CYCLE_SECONDS and a bit, for ever."""
    names = "abc"[:count]
    nodes = Nodes(1, 1000, names)
    seen = dict.fromkeys(names, 0.0)
    worst = 0.0
    while nodes.now < 2.0:
        nodes.run(0.001)
        for name, messages in nodes.messages.items():
            if messages:
                worst = max(worst, nodes.now - seen[name])
                seen[name] = nodes.now
        assert sum(nodes.messages.values()) <= 1
    assert worst <= CYCLE_SECONDS + 0.010, worst


def test_credit_does_not_move_while_every_node_has_some() -> None:
    """An idle consumer costs nothing: no timer runs."""
    nodes = Nodes(256, 1 << 20, "abc")
    nodes.plan()
    nodes.run(1.0)
    assert nodes.splitter.wake_time(nodes.now) is None


def test_nodes_that_lead_nothing_get_nothing() -> None:
    """`prefer` moves the credit of the others away."""
    nodes = Nodes(10, 1000, "abc")
    nodes.splitter.prefer("ab")
    nodes.plan()
    assert nodes.messages == {"a": 5, "b": 5, "c": 0}
    nodes.splitter.prefer("c")
    nodes.run(1.0)
    assert nodes.messages == {"a": 0, "b": 0, "c": 10}


def test_a_lost_stream_frees_its_credit() -> None:
    """What a node had left goes to the others, what it delivered stays out."""
    nodes = Nodes(10, 1000, "ab")
    nodes.plan()
    nodes.deliver("b", 3)
    nodes.splitter.remove("b")
    nodes.plan()
    assert nodes.messages["a"] == 7
    nodes.splitter.settled(3, 3)
    nodes.plan()
    assert nodes.messages["a"] == 10


def test_a_large_message_overdraws_and_is_paid_back() -> None:
    """One message larger than all bytes of credit passes, and then nothing until it is settled."""
    nodes = Nodes(10, 100, "ab")
    nodes.plan()
    nodes.deliver("a", 1, 5000)
    nodes.run(1.0)
    assert nodes.bytes["a"] <= 0 and nodes.splitter.bytes_out == 5000
    nodes.splitter.settled(1, 5000)
    nodes.run(1.0)
    assert sum(nodes.bytes.values()) <= 100 and max(nodes.bytes.values()) > 0


def test_a_delivery_that_crosses_a_withdrawal_uses_the_resting_credit() -> None:
    """The withdrawn credit rests; if the node had spent it, it goes nowhere else."""
    nodes = Nodes(1, 100, "ab")
    nodes.plan()
    holder = next(n for n, m in nodes.messages.items() if m)
    nodes.now += DWELL_SECONDS_MAX
    before = dict(nodes.messages)
    withdrawn = nodes.splitter.plan(nodes.now)
    assert [(c.node, c.messages) for c in withdrawn] == [(holder, -1)]
    assert before[holder] == 1  # the node had decided before it heard of it
    nodes.splitter.delivered(holder, 1, 1, nodes.now + REST_SECONDS / 2)
    nodes.messages[holder] = -1
    nodes.run(1.0)
    assert nodes.messages[holder] == 0 and sum(nodes.messages.values()) == 0
    assert nodes.splitter.surplus == 0
    nodes.splitter.settled(1, 1)
    nodes.run(0.1)
    assert sum(nodes.messages.values()) <= 1


def test_a_very_late_delivery_is_a_surplus() -> None:
    """A delivery after its credit went elsewhere is told, so that the consumer gives a message back."""
    nodes = Nodes(1, 100, "ab")
    nodes.plan()
    holder = next(n for n, m in nodes.messages.items() if m)
    other = "b" if holder == "a" else "a"
    while not nodes.messages[other]:
        nodes.run(0.001)
    nodes.deliver(other)
    nodes.splitter.delivered(holder, 1, 1, nodes.now)
    assert nodes.splitter.surplus == 1
    nodes.splitter.settled(1, 1)
    nodes.plan()
    assert nodes.splitter.surplus == 0


def test_credit_must_be_positive() -> None:
    """A splitter of nothing is a mistake."""
    with pytest.raises(ValueError, match="positive"):
        CreditSplitter(0, 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_credit_is_conserved_and_never_exceeded(data: st.DataObject) -> None:
    """Whatever happens: what is out and what nodes may still deliver is at most the total, both ends agree on every
    balance, and when everything is settled a node that has the preference gets credit."""
    total = data.draw(st.sampled_from([1, 2, 3, 5, 16, 100]))
    size = data.draw(st.sampled_from([1, 50, 10_000]))
    names = "abcd"[:data.draw(st.integers(1, 4))]
    nodes = Nodes(total, size, names)
    out: list[tuple[int, int]] = []
    up = set(names)
    for _ in range(data.draw(st.integers(0, 40))):
        step = data.draw(st.sampled_from(["time", "deliver", "settle", "down", "up", "prefer", "resize"]))
        name = data.draw(st.sampled_from(names))
        if step == "time":
            nodes.run(data.draw(st.sampled_from([0.0, 0.003, 0.02, 0.2])))
        elif step == "deliver" and name in up and nodes.messages[name] > 0 and nodes.bytes[name] > 0:
            count = data.draw(st.integers(1, nodes.messages[name]))
            weight = data.draw(st.integers(0, 200))
            nodes.deliver(name, count, weight)
            out.append((count, weight))
        elif step == "settle" and out:
            nodes.splitter.settled(*out.pop(data.draw(st.integers(0, len(out) - 1))))
            nodes.plan()
        elif step == "down" and name in up and len(up) > 1:
            nodes.splitter.remove(name)
            nodes.messages[name] = nodes.bytes[name] = 0
            up.discard(name)
            nodes.plan()
        elif step == "up" and name not in up:
            nodes.splitter.add(name, nodes.now)
            up.add(name)
            nodes.plan()
        elif step == "prefer":
            nodes.splitter.prefer(data.draw(st.sets(st.sampled_from(names), min_size=1)) | {min(up)})
            nodes.plan()
        elif step == "resize":
            total = nodes.splitter.messages_max = data.draw(st.sampled_from([1, 3, 16, 100]))
            nodes.plan()
        spent = sum(count for count, _ in out)
        assert spent == nodes.splitter.messages_out
        unused = sum(max(nodes.messages[n], 0) for n in up)
        assert spent + unused <= total or (not unused and nodes.splitter.surplus > 0)
        for n in up:
            assert nodes.splitter.unused(n) == (nodes.messages[n], nodes.bytes[n])
        assert nodes.splitter.surplus == spent - total
    for one in out:
        nodes.splitter.settled(*one)
    nodes.splitter.prefer(names)
    waiting = set(up)
    end = nodes.now + 5.0
    while waiting and nodes.now < end:
        nodes.run(0.005)
        waiting -= {n for n in waiting if nodes.messages[n] > 0 and nodes.bytes[n] > 0}
    assert not waiting, f"{waiting} starve: {nodes.splitter!r}"
    assert sum(max(nodes.messages[n], 0) for n in up) <= total


def test_without_credit_no_node_keeps_any() -> None:
    """While there is none all is taken back, and nothing is given; then it is split anew."""
    nodes = Nodes(9, 90, "abc")
    nodes.plan()
    nodes.splitter.messages_max = 0
    nodes.plan()
    assert set(nodes.messages.values()) == {0} and sum(nodes.bytes.values()) == 90
    nodes.splitter.messages_max = 6
    nodes.plan()
    assert set(nodes.messages.values()) == {2} and sum(nodes.bytes.values()) == 90


@pytest.mark.parametrize("late", [0.004, 0.03, 0.2])
def test_the_last_credit_serves_slow_nodes_as_often_as_quick_ones(late: float) -> None:
    """Both have messages without end. Each sends what it was given `late` seconds after that, or after two milliseconds; what is too
    much the consumer gives back."""
    splitter: CreditSplitter[str] = CreditSplitter(1, 100)
    takes = {"slow": late, "quick": 0.002}
    for node in takes:
        splitter.add(node, 0.0)
    balance, coming = dict.fromkeys(takes, 0), []  # of the nodes; (when, node)
    served, back = dict.fromkeys(takes, 0), 0
    now, settle_at = 0.0, -1.0
    while now < 60:
        for node, messages, _ in splitter.plan(now):
            balance[node] += messages
            if balance[node] > 0:
                balance[node] -= 1
                coming.append((now + takes[node], node))
        times = [when for when, _ in coming] + [t for t in (splitter.wake_time(now), settle_at) if t is not None and t > now]
        now = max(now + 1e-6, min(times))
        if 0 < settle_at <= now:
            splitter.settled(1, 1)
            settle_at = -1.0
        for when, node in [one for one in coming if one[0] <= now]:
            coming.remove((when, node))
            splitter.delivered(node, 1, 1, now)
            if splitter.surplus > 0:
                splitter.settled(1, 1)
                back += 1
            else:
                served[node] += 1
                settle_at = now + 0.1
    assert served["slow"] >= 0.4 * served["quick"] and back <= 0.1 * sum(served.values()), (served, back)
