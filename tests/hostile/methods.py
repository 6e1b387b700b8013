"""Every method of every service of a node, from the descriptors: a new one is attacked without being listed here."""
from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from spillway.peer.v1 import peer_service_pb2, share_service_pb2
from spillway.v1 import admin_service_pb2, cluster_service_pb2, queue_service_pb2

CLIENTS: list[FileDescriptor] = [queue_service_pb2.DESCRIPTOR, admin_service_pb2.DESCRIPTOR, cluster_service_pb2.DESCRIPTOR]
PEERS: list[FileDescriptor] = [*CLIENTS, peer_service_pb2.DESCRIPTOR, share_service_pb2.DESCRIPTOR]

STRINGS = ["", "a", "d", "*", "a*b",
           "\0", "a\nb", "\u2603" * 80, "x" * 255, "x" * 256, "x" * 5000, "..", "1=1 or true", "size(headers) > 0"]
INTEGERS = [0, 1, 2, 63, 1 << 16, (1 << 31) - 1, (1 << 63) - 1, (1 << 64) - 1, -1, -(1 << 31), -(1 << 63)]
DOUBLES = [0.0, -0.0, 1.5, -1.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 5e-324]
DEPTH_MAX = 5


@dataclass(frozen=True)
class Method:
    """One RPC."""

    path: str
    request: Any
    """The request's descriptor."""
    requests_stream: bool
    answers_stream: bool


def methods(files: list[FileDescriptor]) -> list[Method]:
    """All RPCs of the services in these files."""
    return [Method(f"/{service.full_name}/{method.name}", method.input_type, method.client_streaming, method.server_streaming)
            for file in files for service in file.services_by_name.values() for method in service.methods]


def hostile(descriptor: Any, draw: random.Random, depth: int = 0) -> Any:
    """A message of that type which parses, with values that nobody sends in good faith."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw.random() < (0.3 if depth else 0.15) or depth >= DEPTH_MAX:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(message, field, draw, depth)
        elif field.is_repeated:
            count = draw.choice((0, 1, 2, 2, 40, 3000 if depth < 2 and field.message_type is None else 3))
            if field.message_type is not None:
                getattr(message, field.name).extend(hostile(field.message_type, draw, depth + 1) for _ in range(min(count, 40)))
            else:
                getattr(message, field.name).extend(_value(field, draw) for _ in range(count))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(hostile(field.message_type, draw, depth + 1))
        else:
            setattr(message, field.name, _value(field, draw))
    return message


def _fill_map(message: Any, field: FieldDescriptor, draw: random.Random, depth: int) -> None:
    key, value = field.message_type.fields
    for _ in range(draw.choice((0, 1, 3, 50))):
        name = _value(key, draw)
        if value.message_type is not None:
            getattr(message, field.name)[name].CopyFrom(hostile(value.message_type, draw, depth + 1))
        else:
            getattr(message, field.name)[name] = _value(value, draw)


def _value(field: FieldDescriptor, draw: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = draw.choice(STRINGS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return draw.choice(DOUBLES)
    low, high = {FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1), FieldDescriptor.CPPTYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
                 FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1), FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
                 FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1)}[kind]
    return draw.choice([i for i in INTEGERS if low <= i <= high])
