"""Every metric of a node, once. docs/observability.md has this as a table, and tests hold rules and dashboards to it.

Bounded: `destination` has DESTINATIONS_MAX values and `other`, a tenant is named among the TENANTS_MAX largest backlogs only, `group`
has GROUPS_MAX values and `other`, and all other labels have few values that stand in the code.
"""
from __future__ import annotations

from spillway.contract.telemetry import process
from spillway.contract.telemetry.metrics import COUNTER, GAUGE, HISTOGRAM, MICROSECOND_POWERS, MILLISECOND_POWERS, Metric

DESTINATIONS_MAX = 256  # with a series of their own; each has about a hundred
TENANTS_MAX = 20
GROUPS_MAX = 129  # of Raft, with a series of their own
OTHER = "other"  # the destinations, or groups, beyond

ALL: list[Metric] = []


def _counter(name: str, unit: str, help: str, question: str, *labels: str) -> Metric:
    return _add(Metric(name, "counter", unit, help, question, labels))


def _gauge(name: str, unit: str, help: str, question: str, *labels: str) -> Metric:
    return _add(Metric(name, "gauge", unit, help, question, labels))


def _milliseconds(name: str, help: str, question: str, *labels: str) -> Metric:
    return _add(Metric(name, "histogram", "s", help, question, labels, MILLISECOND_POWERS, 1_000))


def _microseconds(name: str, help: str, question: str, *labels: str) -> Metric:
    return _add(Metric(name, "histogram", "s", help, question, labels, MICROSECOND_POWERS, 1_000_000))


def _add(metric: Metric) -> Metric:
    ALL.append(metric)
    return metric


# -- what destinations did, on the shards that this node leads ---------------------------------------------------------

ENQUEUED = _counter("spillway_messages_enqueued_total", "{message}", "Messages stored.",
                    "How much comes in?", "destination")
LEASED = _counter("spillway_messages_leased_total", "{message}", "Messages handed to consumers, each time they were.",
                  "How much goes out?", "destination")
ACKED = _counter("spillway_messages_acked_total", "{message}", "Messages acknowledged.",
                 "How much is done? Less than comes in for long: the backlog grows.", "destination")
RETRIED = _counter("spillway_messages_retried_total", "{message}", "Failed attempts, lease expirations included.",
                   "Do deliveries fail?", "destination")
DEAD_LETTERED = _counter("spillway_messages_dead_lettered_total", "{message}", "Messages that went to the dead letters.",
                         "Is something given up that somebody has to look at?", "destination")
DISCARDED = _counter("spillway_messages_discarded_total", "{message}", "Messages dropped for good, as the policy says.",
                     "Is something given up that nobody will see?", "destination")
TTL_EXPIRED = _counter("spillway_messages_ttl_expired_total", "{message}", "Messages whose time to live passed.",
                       "Are messages too late to be of use?", "destination")
DEDUPLICATED = _counter("spillway_messages_deduplicated_total", "{message}", "Messages not stored again, as their dedup id was known.",
                        "Do producers repeat themselves?", "destination")
OVERFLOWED = _counter("spillway_messages_overflowed_total", "{message}", "Copies of routes left out, as the target was over its budget.",
                      "Does a target of a route miss events?", "destination")
PURGED = _counter("spillway_messages_purged_total", "{message}", "Messages removed by operators.",
                  "Who emptied this queue? (Somebody did.)", "destination")
REDRIVEN = _counter("spillway_messages_redriven_total", "{message}", "Dead letters put back into their queues.",
                    "How far is the redrive?", "destination")
EXPIRATIONS = _counter("spillway_lease_expirations_total", "{lease}", "Leases that ended because their time was over.",
                       "Do consumers die, or hang?", "destination")
REDELIVERED = _counter("spillway_messages_redelivered_total", "{message}", "Messages handed out that had failed before.",
                       "How much work is repetition?", "destination")
LEASES_ENDED = _counter("spillway_leases_ended_total", "{lease}",
                        "Leases that ended, by outcome: ack, retry, throttled, down, reject, discard, release, expired.",
                        "What do consumers say of the destination? throttled and down park it.", "destination", "outcome")
PARKED_SECONDS = _counter("spillway_parked_seconds_total", "s", "Time for which the destination was parked or paused.",
                          "How long was it not delivered to at all?", "destination")

# -- how they stand --------------------------------------------------------------------------------------------------

MESSAGES = _gauge("spillway_messages", "{message}",
                  "Messages here, by state: waiting (ready or delayed), leased, parked (behind a closed gate), dead (dead letters).",
                  "How deep is the backlog, and is it moving or parked?", "destination", "state")
QUEUES = _gauge("spillway_queues", "{queue}", "Queues with messages, by state of the first: ready, leased, delayed, parked.",
                "Why does the backlog not move: no consumers (ready), slow ones (leased), retries and delays (delayed), a closed gate "
                "(parked)?", "destination", "state")
BYTES = _gauge("spillway_message_bytes", "By", "Bytes of the messages here.", "What does the backlog weigh?", "destination")
OLDEST = _gauge("spillway_oldest_message_seconds", "s",
                "Age of the oldest message that the last walk found and that is still there: ready to be leased, or any unsettled one.",
                "For how long has somebody been waiting? Age tells more than depth.", "destination", "state")
LEASES_LIMIT = _gauge("spillway_leases_limit", "{lease}", "Leases that may be out at a time on this node; 0: no limit.",
                      "Is concurrency what limits it?", "destination")
CONSUMERS = _gauge("spillway_consumers", "{consumer}", "Consumers that lease from it on this node.",
                   "Does anybody consume it?", "destination")
PARKED = _gauge("spillway_parked", "1", "1 while the destination is parked, paused or probed, else 0.",
                "Is it parked right now?", "destination")
PARKED_TENANTS = _gauge("spillway_parked_tenants", "{tenant}", "Tenants of it whose gate is closed.",
                        "Are single tenants throttled?", "destination")
WAIT = _milliseconds("spillway_queue_wait_seconds", "From storing a message to each hand-over to a consumer.",
                     "How long do messages wait? The promise to producers.", "destination")
END_TO_END = _milliseconds("spillway_end_to_end_seconds", "From storing a message to its acknowledgement.",
                           "How long until an event has arrived?", "destination")
FAIRNESS = _gauge("spillway_fairness_index", "1",
                  "Jain's index of what the tenants that had work throughout the last ten seconds got of consumers' time and bytes, by "
                  "weight: 1 is equal, 1/n is one tenant taking all. Up to 64 tenants are looked at.",
                  "Is the scheduler fair between tenants?", "destination")
TENANT_BACKLOG = _gauge("spillway_tenant_backlog_messages", "{message}", "Messages of the tenants with the largest backlogs on this node.",
                        "Who fills the queue?", "destination", "tenant")
OUTBOX = _gauge("spillway_outbox_messages", "{message}", "Messages of routes whose copies are not all stored yet.",
                "Do routes keep up?")
FOLDED = _gauge("spillway_metrics_destinations_folded", "{destination}", "Destinations that count as `other`.",
                "Does a destination miss because there are too many?")

# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = _counter("spillway_produce_refused_total", "{message}", "Messages not stored, by reason as in spillway.v1.ErrorCode.",
                   "Do producers get errors, and whose fault are they?", "code")
DUPLICATES = _counter("spillway_duplicates_refused_total", "{message}",
                      "Messages that an idempotent producer sent again, and that were stored already.",
                      "How often do connections break under producers?")
STALE = _counter("spillway_stale_settlements_total", "{settlement}", "Settlements refused, as their lease was over.",
                 "Do consumers work on what is not theirs any more?")

# -- Raft, disk ------------------------------------------------------------------------------------------------------

RAFT_TERM = _gauge("spillway_raft_term", "1", "Term of a Raft group's replica here: a shard, or `meta`.",
                   "Are there elections?", "group")
RAFT_LEADING = _gauge("spillway_raft_leading", "1", "1 if this node leads the group and serves, else 0.", "Who leads what?", "group")
RAFT_LAG = _gauge("spillway_raft_applied_lag_entries", "{entry}", "Entries that are committed and not applied here.",
                  "Does a replica fall behind?", "group")
RAFT_LEADERLESS = _gauge("spillway_raft_leaderless_groups", "{group}",
                         "Shards whose leader this node does not know, or is not connected to.",
                         "Is a part of the queues out of reach?")
RAFT_CHANGES = _counter("spillway_raft_leader_changes_total", "{change}", "Changes of leader that this node saw, over all groups.",
                        "Do leaders come and go?")
RAFT_PEERS = _gauge("spillway_raft_peers_connected", "{node}", "Other nodes that this one is connected to.", "Is the network whole?")
MEMBERS = _gauge("spillway_cluster_members", "{node}", "Nodes of the cluster, this one included.", "How many should there be?")
COMMIT = _microseconds("spillway_commit_seconds", "From proposing an entry to applying it, on the leader.",
                       "What does replication cost a producer?")
FSYNC = _microseconds("spillway_fsync_seconds", "One sync of the log.", "Is the disk slow?")
SNAPSHOT_SENT = _counter("spillway_snapshot_sent_bytes_total", "By", "Bytes of snapshots sent to other nodes.",
                         "Do replicas catch up, and at what rate?")
SNAPSHOT_RECEIVED = _counter("spillway_snapshot_received_bytes_total", "By", "Bytes of snapshots that came from other nodes.",
                             "Does this node catch up?")
FEATURE_LEVEL = _gauge("spillway_feature_level", "1", "The cluster's feature level.", "Is the upgrade complete?")

# -- the process -----------------------------------------------------------------------------------------------------

INFO = _gauge("spillway_node_info", "1", "1, with who this is.", "Which version runs where?", "node", "cluster", "version")
LOOP_LAG = _microseconds("spillway_event_loop_lag_seconds", "How late the event loop was, looked at ten times a second.",
                         "Is this node out of processor?")
DISK_FREE = _gauge("spillway_disk_free_bytes", "By", "Free bytes where the data is.", "When will the disk be full?")
DISK_FULL = _gauge("spillway_disk_full", "1", "1 while Produce is refused, as free disk is below disk_free_bytes_min.",
                   "Does this node refuse messages?")
INGRESS = _gauge("spillway_ingress_bytes", "By", "Bytes accepted from producers and not yet committed.", "Does it keep up?")
INGRESS_LIMIT = _gauge("spillway_ingress_limit_bytes", "By", "The setting ingress_bytes_max: producers wait at it.",
                       "How near is the limit?")
STREAMS = _gauge("spillway_streams", "{stream}", "Open streams of clients.", "How many clients are there?")
STREAMS_LIMIT = _gauge("spillway_streams_limit", "{stream}", "The setting streams_max.", "How near is the limit?")
CERTIFICATE_END = _gauge("spillway_certificate_end_timestamp_seconds", "s",
                         "Unix time at which the certificate in use ends, of the port for `clients` or for `nodes`; 0 if it has ended.",
                         "Must a certificate be replaced?", "port")
SPANS = _counter("spillway_spans_total", "{span}",
                 "Spans that were `made`, `dropped` as more than the limit came in a second, or `lost` as the collector did not take them.",
                 "Are traces whole?", "result")
ALL += process.ALL

assert {m.kind for m in ALL} == {COUNTER, GAUGE, HISTOGRAM}
assert len({m.name for m in ALL}) == len(ALL)
