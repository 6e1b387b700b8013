"""Every decoder of the product: what takes bytes or text that another process, a disk or a person made."""
from __future__ import annotations

from functools import cache

from tests.fuzz import client_decoders, cluster_decoders, core_decoders, node_decoders, security_decoders
from tests.fuzz.decoder import Decoder


@cache
def all_decoders() -> dict[str, Decoder]:
    """By name."""
    found = {}
    for decoder in (*core_decoders.decoders(), *cluster_decoders.decoders(), *node_decoders.decoders(), *client_decoders.decoders(),
                    *security_decoders.decoders()):
        assert decoder.name not in found, decoder.name
        found[decoder.name] = decoder
    return found
