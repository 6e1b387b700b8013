"""What a dispatcher tells: sums over lanes that come and go, and a number of series that is bounded."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from spillway.client.dispatcher.lane import Counts
from spillway.client.dispatcher.metrics import DESTINATIONS_MAX, Past, collect
from spillway.contract.telemetry.metrics import Histogram


def lane(delivered: int = 0) -> Any:
    """One that has delivered so much, each in 3 ms."""
    latency = Histogram()
    for _ in range(delivered):
        latency.add(3)
    return SimpleNamespace(counts=Counts(delivered=delivered), latency=latency, in_flight=1, circuit="closed", failures_in_a_row=0,
                           target=SimpleNamespace(concurrency_max=4))


class Dispatcher:
    """As the real one, for `collect`."""

    def __init__(self) -> None:
        self.past = Past()
        self.running: dict[str, Any] = {}
        self.unusable, self.reachable = 0, True

    def lanes(self) -> list[tuple[str, Any]]:
        """Those that there are."""
        return list(self.running.items())

    async def told(self) -> dict[tuple[str, ...], Any]:
        """(metric, labels...) -> value."""
        return {(f.metric.name, *labels): value for f in await collect(self) for labels, value in f.samples}  # type: ignore[arg-type]


async def test_totals_only_grow() -> None:
    """A lane that ends leaves what it did, and one that begins again adds to it."""
    dispatcher = Dispatcher()
    dispatcher.running["d"] = lane(3)
    before = await dispatcher.told()
    dispatcher.past.ended("d", dispatcher.running.pop("d"))
    between = await dispatcher.told()
    dispatcher.running["d"] = lane(2)
    after = await dispatcher.told()
    key = ("spillway_dispatcher_outcomes_total", "d", "delivered")
    assert (before[key], between[key], after[key]) == (3, 3, 5)
    assert after["spillway_dispatcher_http_seconds", "d"].count == 5
    assert ("spillway_dispatcher_in_flight", "d") not in between and after["spillway_dispatcher_in_flight", "d"] == 1


async def test_series_are_bounded() -> None:
    """Destinations beyond those that have their own are summed up, and further ones add none."""
    dispatcher = Dispatcher()
    dispatcher.running = {f"d{i}": lane(1) for i in range(DESTINATIONS_MAX + 30)}
    told = await dispatcher.told()
    assert told["spillway_dispatcher_outcomes_total", "other", "delivered"] == 30 == told["spillway_dispatcher_in_flight", "other"]
    dispatcher.running.update({f"more{i}": lane(1) for i in range(500)})
    again = await dispatcher.told()
    assert again.keys() == told.keys()
    for name in list(dispatcher.running):
        dispatcher.past.ended(name, dispatcher.running.pop(name))
    ended = await dispatcher.told()
    assert sum(v for k, v in ended.items() if k[0] == "spillway_dispatcher_outcomes_total") == DESTINATIONS_MAX + 530
