"""Who leads the groups whose replica here does not know, or that have none: leaders announce themselves to every peer.

Claims are hints for routing, never for safety. They vanish with the connection that brought them.
"""
from __future__ import annotations


class Claims:
    """What peers claim to lead."""

    def __init__(self) -> None:
        self._by_group: dict[int, dict[str, int]] = {}

    def take(self, peer: str, claims: list[tuple[int, int]], complete: bool) -> set[int]:
        """Claims of a peer as (group, term); `complete` replaces all earlier ones of it. Returns the groups concerned."""
        changed = set()
        if complete:
            named = {group for group, _ in claims}
            for group, known in self._by_group.items():
                if peer in known and group not in named:
                    del known[peer]
                    changed.add(group)
        for group, term in claims:
            known = self._by_group.setdefault(group, {})
            if known.get(peer) != term:
                known[peer] = term
                changed.add(group)
        return changed

    def drop(self, peer: str) -> set[int]:
        """The connection to a peer broke. Returns the groups concerned."""
        return self.take(peer, [], True)

    def leader(self, group: int) -> tuple[str | None, int]:
        """(node id, term) of the claim of the latest term, (None, 0) without any."""
        known = self._by_group.get(group)
        if not known:
            return None, 0
        node = max(known, key=lambda n: known[n])
        return node, known[node]
