"""What a fault cost is read off traces whose answer is known."""
from __future__ import annotations

from bench.outage import Trace, outage, timeline


def traces(stalled: range, queues: int = 2) -> list[Trace]:
    """A message every 0.1 s for 10 s, stored after 0.01 s and delivered after 0.02 s; those of queue 0 handed in at
    second-tenths of `stalled` only when that is over."""
    out = []
    for n in range(100):
        at, wake = n / 10, stalled.stop / 10
        held = n % queues == 0 and n in stalled
        out.append(Trace(n, n % queues, at, (wake if held else at) + 0.01, (wake if held else at) + 0.02))
    return out


def test_calm() -> None:
    """Without a fault the waits are the usual ones and the gaps the distances of messages."""
    found = outage(traces(range(0)), 3.0, 8.0)
    assert (found["send_to_stored_max"], found["send_to_delivered_max"]) == (0.01, 0.02)
    assert (found["delivery_gap_overall"], found["delivery_gap_of_worst_queue"]) == (0.1, 0.2)


def test_one_queue_stalls() -> None:
    """The stalled queue shows in the worst waits and gaps, and alone in its own."""
    all_of_them = traces(range(40, 60))
    found = outage(all_of_them, 4.0, 9.0)
    assert (found["send_to_stored_max"], found["send_to_delivered_max"]) == (2.01, 2.02)
    assert found["delivery_gap_overall"] == 0.2 and found["delivery_gap_of_worst_queue"] > 1.9
    calm = outage([t for t in all_of_them if t.queue == 1], 4.0, 9.0)
    assert calm["send_to_delivered_max"] == 0.02 and calm["delivery_gap_of_worst_queue"] <= 0.2


def test_handed_in_just_before() -> None:
    """A message that was on its way when the fault came counts."""
    late = [t._replace(delivered_at=7.0) if t.number == 38 else t for t in traces(range(0))]
    assert outage(late, 4.0, 9.0)["send_to_delivered_max"] == 3.2


def test_never_arrived() -> None:
    """No number stands for a wait without end."""
    lost = [t._replace(delivered_at=None) if t.number == 50 else t for t in traces(range(0))]
    found = outage(lost, 4.0, 9.0)
    assert found["send_to_delivered_max"] is None and found["send_to_stored_max"] == 0.01
    assert outage([], 4.0, 9.0) == {"messages": 0}


def test_timeline() -> None:
    """Each tenth of a second has what was handed in, stored and delivered in it, and its longest wait; nothing means no wait."""
    found = timeline([Trace(0, 0, 1.01, 1.02, 1.15), Trace(1, 0, 1.02, 1.12, 1.16), Trace(2, 0, 0.99, 1.0, 1.0),
                      Trace(3, 0, 1.25, None, None)], 1.0, 1.35, 0.1)
    assert [(one["at"], one["sent_per_second"], one["stored_per_second"], one["delivered_per_second"]) for one in found] == [
        (0.0, 20, 20, 10), (0.1, 0, 10, 20), (0.2, 10, 0, 0)]
    assert [one["send_to_delivered_max"] for one in found] == [0.14, None, None]
