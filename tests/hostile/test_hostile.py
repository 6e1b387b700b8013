"""Hostile clients: typed errors or clean closes, bounded memory, and an honest client beside them notices nothing."""
from __future__ import annotations

from pathlib import Path

from tests.hostile.methods import CLIENTS, PEERS, methods
from tests.hostile.suite import attack


def test_all_services_are_attacked() -> None:
    """None of those that a node serves is forgotten."""
    served = {method.path.split("/")[1] for method in methods(PEERS)}
    assert served == {"spillway.v1.QueueService", "spillway.v1.AdminService", "spillway.v1.ClusterService", "spillway.peer.v1.PeerService",
                      "spillway.peer.v1.ShareService"}
    assert len(methods(CLIENTS)) > 25


async def test_a_node_survives_hostile_clients(tmp_path: Path) -> None:
    """Every kind of attack: no undeclared status, no traceback, nothing lost or reordered, memory and descriptors as before."""
    report = await attack(tmp_path, seed=1, rounds=1)
    assert all(report["attacks"].values()) and report["canary"] > 20
