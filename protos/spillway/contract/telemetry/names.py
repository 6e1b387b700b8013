"""Names of attributes and spans, as OpenTelemetry's semantic conventions for messaging and HTTP have them. All that this
software says in traces is named here, so that what changes there changes in one place."""
from __future__ import annotations

SCHEMA_URL = "https://opentelemetry.io/schemas/1.38.0"
SCOPE = "spillway"

SYSTEM = "messaging.system"
SYSTEM_NAME = "spillway"
OPERATION_NAME = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
PARTITION = "messaging.destination.partition.id"
BATCH_COUNT = "messaging.batch.message_count"
MESSAGE_ID = "messaging.message.id"
BODY_SIZE = "messaging.message.body.size"
CLIENT_ID = "messaging.client.id"
CONSUMER_GROUP = "messaging.consumer.group.name"
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
METHOD = "http.request.method"
STATUS = "http.response.status_code"
# Ours: conventions have no word for them.
TENANT = "spillway.tenant"
KEY = "spillway.key"
SEQUENCE = "spillway.sequence"
ATTEMPT = "spillway.attempt"
OUTCOME = "spillway.outcome"
WAIT_REASON = "spillway.wait_reason"

OUTCOMES = ("", "ack", "retry", "throttled", "down", "reject", "release", "extend")
"""By the number of spillway.v1.Outcome."""
