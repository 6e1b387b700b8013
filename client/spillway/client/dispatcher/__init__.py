"""The HTTP dispatcher: leases messages and POSTs each to its destination's URL, in order per queue.

What a request says, besides the payload and the message's own headers:

=======================  =========================================================================================
Spillway-Message-Id      the producer's id of the message; shard-sequence if it gave none
Spillway-Destination     the queue's destination,
Spillway-Tenant          tenant
Spillway-Key             and key; these four are percent-encoded where they are not printable ASCII
Spillway-Shard           the shard of the queue
Spillway-Sequence        the message's place in the shard: grows along a queue
Spillway-Attempt         1 for the first delivery
Spillway-Fencing-Token   the lease under which it is sent: grows with every lease of a queue
Spillway-Gap             count=, first=, last= (sequences) of messages right before this one that went to the
                         dead letters and will not come
webhook-id, -timestamp,  of targets with signing secrets: see `signing`
-signature
=======================  =========================================================================================

What an answer means is in `outcome`, where requests may go in `addresses`. `docs/webhooks.md` is for receivers.

For receivers. Delivery is at least once: a receiver may see a message again, if its answer was lost, came too
late, or the dispatcher or a broker node died before the acknowledgement was stored. In a queue, what comes again
is always a prefix of what was not acknowledged, in order. To apply every message exactly once, keep per
(Destination, Tenant, Key) the highest fencing token and the last sequence applied, and in the transaction that
applies a message:

1. token lower than the one kept: drop it. It was sent under a lease that has ended (by a dispatcher that hung, or
   it lay in a network), and may be older than what was applied since. Answer anything: a settlement under that
   token is refused and changes nothing.
2. else keep the token. Sequence not above the one kept: drop it, it was applied before. Answer 2xx.
3. else apply it, keep the sequence, answer 2xx.

Without transactions: remember message ids for as long as a retry may take, and accept that a late request of an
ended lease can apply an old message after newer ones.
"""
from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`spillway dispatch`; returns the exit code."""
    from spillway.client.dispatcher.program import main

    return main(argv)
