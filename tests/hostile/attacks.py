"""What hostile clients do. Each attack ends by itself and returns how many things it did; each status must be a declared one."""
from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from spillway.broker.services.operations import SHARDS_METADATA
from spillway.v1.admin_service_pb2 import PurgeMessagesRequest
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import (
    AckRequest,
    Credit,
    LeaseRequest,
    ProduceRecord,
    ProduceRequest,
    Settlement,
    Subscribe,
)

from tests.hostile.methods import CLIENTS, PEERS, Method, hostile, methods

CALL_SECONDS = 1.0  # an attack that is simply served is given up after it
SILENT_SECONDS = 0.05  # a call without a request has no answer
UNDECLARED = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
OWN_LIBRARY = "Internal error from Core"  # what the client's library says when it writes to a call that has just ended
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAMS = "/spillway.v1.QueueService/"


class Undeclared(AssertionError):
    """A call ended with a status that no caller can do anything about."""


class Target:
    """A node, as its attackers know it."""

    def __init__(self, clients: str, peers: str, seed: int) -> None:
        self.addresses = {"clients": clients, "peers": peers}
        self.draw = random.Random(seed)
        self.statuses: Counter[str] = Counter()

    def channel(self, port: str = "clients", **options: Any) -> grpc.aio.Channel:
        """A connection of its own."""
        return grpc.aio.insecure_channel(self.addresses[port], options=[
            ("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1), *options.items()])

    async def call(self, channel: grpc.aio.Channel, method: Method | str, *requests: bytes, metadata: Any = None) -> None:
        """A streaming call of raw bytes, whatever the method: all requests, half-closed, answers to the end."""
        path = method if isinstance(method, str) else method.path
        call = channel.stream_stream(path)(timeout=CALL_SECONDS if requests else SILENT_SECONDS, metadata=metadata)
        try:
            for request in requests:
                await call.write(request)
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it was over before all was written; how, its status says
        finally:
            code, details = await call.code(), await call.details()
        self.statuses[code.name] += 1
        if code in UNDECLARED and details != OWN_LIBRARY:
            raise Undeclared(f"{path}: {code.name}: {details}")


async def garbage(target: Target, rounds: int) -> int:
    """Bytes that are no message, no bytes at all, and messages of another type, to every method of both ports."""
    draw, done = target.draw, 0
    for port, files in (("clients", CLIENTS), ("peers", PEERS)):
        async with target.channel(port) as channel:
            for method in methods(files):
                for _ in range(rounds):
                    await target.call(channel, method, draw.randbytes(draw.choice((1, 7, 300))))
                    await target.call(channel, method, b"")
                    await target.call(channel, method, b"\x0a" * 40, b"\xff" * 9)
                    done += 3
                await target.call(channel, method)
                done += 1
    return done


async def hostile_values(target: Target, rounds: int) -> int:
    """Messages that parse, with hostile values in all fields, to every method of both ports."""
    done = 0
    for port, files in (("clients", CLIENTS), ("peers", PEERS)):
        async with target.channel(port) as channel:
            for method in methods(files):
                messages = [hostile(method.request, target.draw).SerializeToString() for _ in range(rounds)]
                if method.requests_stream:
                    await target.call(channel, method, *messages[:4])
                await asyncio.gather(*(target.call(channel, method, message) for message in messages))
                done += len(messages)
    return done


async def not_a_peer(target: Target, rounds: int) -> int:
    """Calls between nodes without the metadata that says what they are for, or with garbage in its place."""
    request = PurgeMessagesRequest(destination="hostile").SerializeToString()
    values = (None, "", "1,", "-1", "99", "9" * 5000)
    async with target.channel("peers") as channel:
        for _ in range(rounds):
            for value in values:
                for method in ("PurgeMessages", "PurgeDeadLetters", "RedriveDeadLetters"):
                    await target.call(channel, f"/spillway.v1.AdminService/{method}", request,
                                      metadata=None if value is None else ((SHARDS_METADATA, value),))
    return 3 * len(values) * rounds


async def oversized(target: Target, rounds: int) -> int:
    """Messages and metadata beyond every limit, methods and compressions that do not exist."""
    done = 0
    async with target.channel() as channel:
        for _ in range(rounds):
            for method in target.draw.sample(methods(CLIENTS), 5):
                await target.call(channel, method, bytes(9 << 20))
            await target.call(channel, "/spillway.v1.QueueService/Nothing", b"")
            await target.call(channel, "/nothing", b"")
            await target.call(channel, f"{STREAMS}Produce", b"", metadata=(("x", "y" * 100_000),))
            await target.call(channel, f"{STREAMS}Produce", b"", metadata=(("grpc-encoding", "zstd"),))
            done += 9
    return done


def _subscribe(messages: int = 1, destination: str = "hostile", **fields: Any) -> bytes:
    return LeaseRequest(subscribe=Subscribe(destinations=[destination], credit=Credit(messages=messages, bytes=1 << 40),
                                            **fields)).SerializeToString()


def _produce(count: int, size: int, destination: str = "hostile", **fields: Any) -> bytes:
    return ProduceRequest(records=[ProduceRecord(destination=destination, tenant=f"t{i % 3}", message=Message(payload=bytes(size)),
                                                 producer_sequence=i + 1 if fields else 0)
                                   for i in range(count)], **fields).SerializeToString()


async def interleavings(target: Target, rounds: int) -> int:
    """Requests in the wrong order, twice, with absurd credit, tokens of nobody, producers' numbers backwards, cancelled."""
    draw, done = target.draw, 0
    async with target.channel() as channel:
        for _ in range(rounds):
            credit = LeaseRequest(credit=Credit(messages=draw.choice((-(1 << 62), 1 << 62, -1)), bytes=-(1 << 62))).SerializeToString()
            settlements = AckRequest(settlements=[Settlement(
                shard=draw.choice((0, 1, 17, (1 << 32) - 1)), fencing_token=draw.getrandbits(64), sequence=draw.getrandbits(64),
                outcome=draw.choice((0, 1, 5, 7, 99))) for _ in range(500)]).SerializeToString()  # type: ignore[arg-type]
            session = draw.choice(("", "s", "\n1", "x" * 65))
            await target.call(channel, f"{STREAMS}Lease", _subscribe(session=session), credit, credit, _subscribe())
            await target.call(channel, f"{STREAMS}Lease", credit)
            await target.call(channel, f"{STREAMS}Lease", _subscribe(messages=-5))
            await target.call(channel, f"{STREAMS}Ack", settlements, settlements)
            await target.call(channel, f"{STREAMS}Produce", _produce(5, 10, producer_id="p"), _produce(3, 10, producer_id="p"))
            calls = [channel.stream_stream(STREAMS + draw.choice(("Produce", "Lease", "Ack")))() for _ in range(50)]
            await asyncio.gather(*(one.write(_subscribe()) for one in calls), return_exceptions=True)
            for one in calls:
                one.cancel()
            done += 55
    return done


async def many_streams(target: Target, rounds: int) -> int:
    """Thousands of streams that stay open: half of them never say anything."""
    done = 0
    for _ in range(rounds):
        channels = [target.channel() for _ in range(4)]
        calls = []
        for i in range(2000):
            call = channels[i % 4].stream_stream(STREAMS + ("Lease", "Produce", "Ack")[i % 3])()
            calls.append(call)
            if i % 2:
                try:
                    await call.write(_subscribe() if i % 3 == 0 else _produce(1, 1) if i % 3 == 1 else b"")
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    pass
        await asyncio.sleep(0.5)
        for call in calls:
            call.cancel()
        for channel in channels:
            await channel.close()
        done += len(calls)
    return done


async def slow_readers(target: Target, rounds: int) -> int:
    """Consumers with endless credit that read nothing, and producers that read no answer, while there is much to send."""
    done = 0
    for _ in range(rounds):
        async with target.channel() as feeder:
            for _ in range(8):
                await target.call(feeder, f"{STREAMS}Produce", _produce(16, 60_000, "unread"))
        readers = [target.channel(**{"grpc.http2.lookahead_bytes": 1024}) for _ in range(8)]
        calls = [channel.stream_stream(f"{STREAMS}Lease")() for channel in readers]
        for call in calls:
            await call.write(_subscribe(1 << 20, "unread"))
        writer = readers[0].stream_stream(f"{STREAMS}Produce")()
        try:
            async with asyncio.timeout(1.0):
                for _ in range(3000):
                    await writer.write(_produce(1, 100, "unread"))
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        await asyncio.sleep(0.5)
        for call in (*calls, writer):
            call.cancel()
        for channel in readers:
            await channel.close()
        done += len(calls) + 1
    return done


async def connections(target: Target, rounds: int) -> int:
    """Connections that say nothing, or garbage, or another protocol; that die in the middle; resets in a row."""
    draw, done = target.draw, 0
    greetings = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE[:10], PREFACE, PREFACE + os.urandom(200), b"\x16\x03\x01" + bytes(200),
                 PREFACE + struct.pack(">I", 0)[1:] + b"\4\0" + bytes(4), PREFACE + b"\xff\xff\xff\0\0" + bytes(4)]
    for _ in range(rounds):
        for port in ("clients", "peers"):
            host, _, number = target.addresses[port].rpartition(":")
            open_ = []
            for _ in range(250):
                one = socket.create_connection((host, int(number)))
                one.setblocking(False)
                try:
                    one.send(draw.choice(greetings))
                except OSError:
                    pass
                if draw.random() < 0.5:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
                    one.close()
                else:
                    open_.append(one)
                done += 1
                if done % 50 == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0.3)
            for one in open_:
                one.close()
    return done


ATTACKS: dict[str, Callable[[Target, int], Awaitable[int]]] = {
    "garbage": garbage, "hostile values": hostile_values, "not a peer": not_a_peer, "oversized": oversized, "interleavings": interleavings,
    "many streams": many_streams, "slow readers": slow_readers, "connections": connections}
