"""How a consumer's credit is split over the nodes that it leases from. Pure: the time is an argument.

What a consumer allows is one number of messages and one of bytes; what the broker's Lease stream takes is credit per
stream. `CreditSplitter` moves the one over to the others so that

- what is delivered and not settled, plus the credit unused at all nodes, never exceeds the total;
- a node whose credit is used up gets what is settled first, whoever it was delivered by;
- credit that lies idle at one node while another's is used up is withdrawn and moves there; if there are fewer
  messages of credit than nodes, it goes round, so that no node waits for longer than about CYCLE_SECONDS.

Bytes are counted as the size of the serialized `spillway.v1.Message`, on both ends. A node may overdraw its bytes by
one message (a large one must not get stuck); what is overdrawn counts, so the next credit pays it first.

The balance of a stream is a plain sum on both ends: given - withdrawn - delivered. A withdrawal and a delivery may
cross (a node decides on a lease some milliseconds before it sends it); then the balance is below zero for a moment, the
same on both ends, and the next credit fills it up first. So that such a delivery still finds its credit unspent,
withdrawn credit rests for REST_SECONDS before it goes elsewhere. A delivery later than that makes `surplus` positive:
the consumer gives that many messages back at once. What is withdrawn from that node rests longer from then on, or a slow
node would always be too late; half as long each time that nothing came, once nothing has come for a while.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

CYCLE_SECONDS = 0.045  # how long the last credit may take to visit every node
REST_SECONDS = 0.010  # a lease that was being replicated when its credit was withdrawn arrives within this
REST_SECONDS_MAX = 0.5  # or at a slow node within this
REST_FACTOR = 1.5  # times what it last took
REST_KEPT = 4  # so many times as long as it is, a longer rest is kept though nothing comes
DWELL_SECONDS_MAX = 0.010  # credit unused for this long at a node is idle
DWELL_SECONDS_MIN = 0.002
_ALL = 1 << 63  # more than there can be
SPARE_FACTOR = 4  # with this many messages of credit per node, every node keeps one when it is idle

Node = TypeVar("Node")


class Change(NamedTuple, Generic[Node]):
    """Credit to give to (or, negative, withdraw from) a node."""

    node: Node
    messages: int
    bytes: int


class _Account:
    """One node's balance."""

    __slots__ = ("bytes", "bytes_turn", "crossed", "eligible", "hungry_since", "messages", "rest", "resting_bytes", "resting_messages",
                 "resting_until", "stirred", "turn", "withdrawn")

    def __init__(self, now: float, turn: int) -> None:
        self.messages = 0  # unused at the node
        self.bytes = 0
        self.eligible = True
        self.hungry_since: float | None = now
        self.stirred = now  # last delivery, or last credit given
        self.turn = turn  # when it got messages of credit last: the order of going round
        self.bytes_turn = turn  # the same of bytes
        self.rest = REST_SECONDS
        self.withdrawn = now  # when some was taken back last
        self.crossed = now  # when a delivery crossed that last
        self.resting_messages = 0  # withdrawn, and may cross a delivery
        self.resting_bytes = 0
        self.resting_until = 0.0


class CreditSplitter(Generic[Node]):
    """Splits `messages` and `bytes` of credit over nodes. Nodes are any hashable value. The totals, `messages_max` and
    `bytes_max`, may be set at any time; the next `plan` follows them. While one is 0, all of it is taken back."""

    def __init__(self, messages: int, bytes: int) -> None:
        if messages < 1 or bytes < 1:
            raise ValueError(f"credit must be positive, not {messages} messages and {bytes} bytes")
        self.messages_max = messages
        self.bytes_max = bytes
        self.messages_out = 0  # delivered and not settled
        self.bytes_out = 0
        self._accounts: dict[Node, _Account] = {}
        self._turn = 0

    def __repr__(self) -> str:
        nodes = ", ".join(f"{node}: {a.messages}" for node, a in self._accounts.items())
        return f"<CreditSplitter {self.messages_out}/{self.messages_max} out, {self.free_messages} free, unused {{{nodes}}}>"

    # -- events --------------------------------------------------------------------------------------------------

    def add(self, node: Node, now: float) -> None:
        """A stream to the node is being opened, with no credit yet."""
        assert node not in self._accounts, f"{node!r} has a stream already"
        self._accounts[node] = _Account(now, self._turn)

    def remove(self, node: Node) -> None:
        """The stream ended: its unused credit is free. Nothing happens if there is none."""
        self._accounts.pop(node, None)

    def prefer(self, nodes: Iterable[Node]) -> None:
        """Only these nodes have something to lease; the others get no more credit, and what they have moves."""
        wanted = set(nodes)
        for node, account in self._accounts.items():
            account.eligible = node in wanted

    def delivered(self, node: Node, messages: int, bytes: int, now: float) -> None:
        """The node delivered."""
        self.messages_out += messages
        self.bytes_out += bytes
        account = self._accounts.get(node)
        if account is None:
            return  # read from a stream after its end: outstanding like any other
        account.messages -= messages
        account.bytes -= bytes
        account.stirred = now
        if account.messages < 0:
            # It crossed a withdrawal, which therefore brought less; perhaps not the last one, so what is seen may be too short.
            longer = 2 * account.rest if account.resting_until <= now else account.rest
            account.rest = min(REST_SECONDS_MAX, max(longer, REST_FACTOR * (now - account.withdrawn)))
            account.crossed = now
            account.resting_messages = max(0, account.resting_messages + account.messages)
        if account.bytes < 0:
            account.resting_bytes = max(0, account.resting_bytes + account.bytes)
        if account.messages <= 0 or account.bytes <= 0:
            account.hungry_since = account.hungry_since if account.hungry_since is not None else now

    def settled(self, messages: int, bytes: int) -> None:
        """Delivered messages were settled, or will never be."""
        self.messages_out -= messages
        self.bytes_out -= bytes
        assert self.messages_out >= 0, "more settled than delivered"

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def free_messages(self) -> int:
        """Neither delivered, nor at a node, nor resting."""
        return self.messages_max - self.messages_out - sum(
            a.messages + a.resting_messages for a in self._accounts.values())

    @property
    def free_bytes(self) -> int:
        """As `free_messages`; negative while large messages overdraw."""
        return self.bytes_max - self.bytes_out - sum(a.bytes + a.resting_bytes for a in self._accounts.values())

    @property
    def surplus(self) -> int:
        """How many messages more than allowed are out: to be given back at once. At most 0 unless a delivery crossed a
        withdrawal by more than REST_SECONDS."""
        return self.messages_out - self.messages_max

    def unused(self, node: Node) -> tuple[int, int]:
        """(messages, bytes) of credit that the node has left; zeros without a stream."""
        account = self._accounts.get(node)
        return (account.messages, account.bytes) if account else (0, 0)

    # -- decisions -----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> list[Change[Node]]:
        """What to send to the nodes now. It is taken as sent."""
        for account in self._accounts.values():
            if account.resting_until <= now:
                if account.resting_messages and now - account.crossed > REST_KEPT * account.rest:
                    account.rest = max(REST_SECONDS, account.rest / 2)
                account.resting_messages = account.resting_bytes = 0
        before = {node: (a.messages, a.bytes) for node, a in self._accounts.items()}
        self._repay()
        self._reclaim(now)
        eligible = [a for a in self._accounts.values() if a.eligible]
        if not eligible or self.messages_max <= 0 or self.bytes_max <= 0:
            return self._changes(before)
        self._give_messages(eligible, now)
        self._give_bytes(eligible, now)
        for account in eligible:
            if account.messages > 0 and account.bytes > 0:
                account.hungry_since = None
            elif account.hungry_since is None:
                account.hungry_since = now
        self._withdraw(eligible, now)
        return self._changes(before)

    def _changes(self, before: dict[Node, tuple[int, int]]) -> list[Change[Node]]:
        changes = []
        for node, account in self._accounts.items():
            messages, bytes_ = before[node]
            if account.messages != messages or account.bytes != bytes_:
                changes.append(Change(node, account.messages - messages, account.bytes - bytes_))
        return changes

    def wake_time(self, now: float) -> float | None:
        """When to call `plan` although nothing happened; None: no need."""
        times = [a.resting_until for a in self._accounts.values() if a.resting_messages or a.resting_bytes]
        if not times:
            eligible = [a for a in self._accounts.values() if a.eligible]
            floor = self._floor(len(eligible))
            dwell = self._dwell(len(eligible))
            hungry = [a.hungry_since + dwell for a in eligible if a.hungry_since is not None]
            floor_bytes = self._floor_bytes(eligible)
            donors = [a.stirred + dwell for a in self._accounts.values() if _spare(a, floor, floor_bytes)]
            if hungry and donors:
                times = [max(min(hungry), min(donors))]
        return max(now, min(times)) if times else None

    def _dwell(self, nodes: int) -> float:
        return max(DWELL_SECONDS_MIN, min(DWELL_SECONDS_MAX, CYCLE_SECONDS / max(nodes, 1) - REST_SECONDS))

    def _floor(self, nodes: int) -> int:
        return 1 if self.messages_max >= SPARE_FACTOR * nodes else 0

    def _repay(self) -> None:
        """Balances below zero come first: that credit is counted as free, but it is spent."""
        free_messages, free_bytes = self.free_messages, self.free_bytes
        for account in self._accounts.values():
            if account.messages < 0 < free_messages:
                amount = min(-account.messages, free_messages)
                account.messages += amount
                free_messages -= amount
            if account.bytes < 0 < free_bytes:
                amount = min(-account.bytes, free_bytes)
                account.bytes += amount
                free_bytes -= amount

    def _reclaim(self, now: float) -> None:
        """If more is given than there is (the total shrank, or an overdrawn stream ended), takes it back, first from
        those that have most; all, if there is none."""
        lacking = -self.free_messages if self.messages_max > 0 else _ALL
        for account in sorted(self._accounts.values(), key=lambda a: -a.messages):
            if lacking <= 0 or account.messages <= 0:
                break
            amount = min(lacking, account.messages)
            account.messages -= amount
            account.withdrawn = now
            lacking -= amount
        lacking = -self.free_bytes if self.bytes_max > 0 else _ALL
        for account in sorted(self._accounts.values(), key=lambda a: -a.bytes):
            if lacking <= 0 or account.bytes <= 0:
                break
            amount = min(lacking, account.bytes)
            account.bytes -= amount
            account.withdrawn = now
            lacking -= amount

    def _floor_bytes(self, eligible: list[_Account]) -> int:
        """Bytes that an idle node keeps: all, unless some node lacks nothing but bytes."""
        if any(a.messages > 0 >= a.bytes for a in eligible):
            return self.bytes_max // (SPARE_FACTOR * len(eligible))
        return self.bytes_max

    def _give_messages(self, eligible: list[_Account], now: float) -> None:
        free = self.free_messages
        if free <= 0:
            return
        share = max(1, self.messages_max // len(eligible))
        order = sorted(eligible, key=lambda a: (a.messages, a.turn))
        for account, amount in zip(order, _poured([a.messages for a in order], free), strict=True):
            # A node that has plenty can wait until a request to it is worth its cost.
            if amount and (account.messages * 2 <= share or amount * 4 >= share):
                account.messages += amount
                account.stirred = now
                self._turn += 1
                account.turn = self._turn

    def _give_bytes(self, eligible: list[_Account], now: float) -> None:
        free = self.free_bytes
        takers = sorted((a for a in eligible if a.messages > 0), key=lambda a: (a.bytes, a.bytes_turn))
        if free <= 0 or not takers:
            return
        share = max(1, self.bytes_max // len(eligible))
        for account, amount in zip(takers, _poured([a.bytes for a in takers], free), strict=True):
            if amount and (account.bytes * 2 <= share or amount * 4 >= share):
                if account.bytes <= 0:
                    account.stirred = now  # only now can it use its messages of credit
                account.bytes += amount
                self._turn += 1
                account.bytes_turn = self._turn

    def _withdraw(self, eligible: list[_Account], now: float) -> None:
        """Takes idle credit back if a node has been without for a while. One withdrawal rests at a time, so that
        what it brings is seen before more is taken."""
        if any(a.resting_messages or a.resting_bytes for a in self._accounts.values()):
            return
        dwell = self._dwell(len(eligible))
        if not any(a.hungry_since is not None and a.hungry_since + dwell <= now for a in eligible):
            return
        floor = self._floor(len(eligible))
        floor_bytes = self._floor_bytes(eligible)
        donors = [a for a in self._accounts.values() if a.stirred + dwell <= now and _spare(a, floor, floor_bytes)]
        if not donors:
            return
        if self.messages_max < len(eligible):
            donors = [min(donors, key=lambda a: a.stirred)]  # one after the other, or all would be resting at once
        for account in donors:
            if account.eligible and account.messages > 0:
                messages = max(account.messages - floor + 1, 0) // 2
                bytes_ = account.bytes if messages == account.messages else (account.bytes + 1) // 2
            else:
                messages, bytes_ = max(account.messages, 0), account.bytes
            bytes_ = max(bytes_, 0)
            account.messages -= messages
            account.bytes -= bytes_
            account.resting_messages = messages
            account.resting_bytes = bytes_
            account.resting_until = now + account.rest
            account.withdrawn = now
            account.stirred = now
            if account.messages <= 0 and account.hungry_since is None:
                account.hungry_since = now


def _spare(account: _Account, floor: int, floor_bytes: int) -> bool:
    """Whether a node has credit that another may need more: messages or bytes above the floors, or bytes without
    messages."""
    if not account.eligible:
        return account.messages > 0 or account.bytes > 0
    return account.bytes > 0 and (account.messages > floor or account.messages <= 0 or account.bytes > floor_bytes)


def _poured(levels: list[int], amount: int) -> list[int]:
    """How much each of the ascending `levels` rises when `amount` is poured over them like water."""
    level = levels[0]
    count = len(levels)
    for i in range(1, len(levels)):
        cost = (levels[i] - level) * i
        if cost > amount:
            count = i
            break
        amount -= cost
        level = levels[i]
    each, rest = divmod(amount, count)
    return [level + each + (1 if i < rest else 0) - levels[i] for i in range(count)] + [0] * (len(levels) - count)


__all__ = ["CYCLE_SECONDS", "REST_SECONDS", "Change", "CreditSplitter"]
