"""Limits and names that clients and brokers share. Everything has a limit; each says why it is so."""
from __future__ import annotations

NAME_BYTES_MAX = 255  # destination, tenant, key, message id: fits a row key and a log line
PRODUCER_ID_BYTES_MAX = 64
SHARDS_MAX = 1024  # every node has a Raft group and a log of each
PAYLOAD_BYTES_MAX = 1 << 20  # default; an entry of the log carries at least one message of this size
HEADERS_BYTES_MAX = 64 << 10
RECORDS_PER_REQUEST_MAX = 4096  # one request must fit one turn of the broker
SETTLEMENTS_PER_REQUEST_MAX = 8192
FRAME_BYTES_SOFT_MAX = 1 << 20  # what well-behaved clients and the broker keep a frame below
FRAME_BYTES_MAX = 4 << 20  # what gRPC refuses
DELAY_MS_MAX = 7 * 24 * 3600 * 1000
TTL_MS_MAX = 366 * 24 * 3600 * 1000
LEASE_MS_MIN = 1_000
LEASE_MS_MAX = 12 * 3600 * 1000
RUN_MESSAGES_MAX = 1024
REASON_BYTES_MAX = 1024
SUBSCRIBE_DESTINATIONS_MAX = 256
CREDIT_MESSAGES_MAX = 1 << 16  # that a consumer can have; what it gives beyond that is ignored
CREDIT_BYTES_MAX = 256 << 20
