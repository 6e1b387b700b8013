"""Names of the queues that the workloads use."""
from __future__ import annotations

DESTINATIONS = 10

Name = tuple[str, str, str]


def names(count: int) -> list[Name]:
    """`count` queues: 1; 1,000 are 10 destinations x 10 tenants x 10 keys; from 100,000 on 10 x 100 x the rest. Queues
    next to each other in the list differ in their destination."""
    if count == 1:
        return [("d0", "t0", "k0")]
    tenants = 100 if count >= 100_000 else 10
    return [(f"d{i % DESTINATIONS}", f"t{i // DESTINATIONS % tenants}", f"k{i // (DESTINATIONS * tenants)}")
            for i in range(count)]
