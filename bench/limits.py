"""Raw limits of this machine: the transport alone and the storage engine alone, without anything of the queue."""
from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import grpc
from rocksdict import Options, Rdict, WriteBatch
from spillway.v1 import queue_service_pb2 as pb
from spillway.v1.message_pb2 import Message

from bench.children import Children, Worker, poll
from bench.counters import FINISH, PRODUCED, READY_CONSUMER, SETTLED, STOP, Counters
from bench.stats import summary
from bench.usage import cpu_seconds
from demo.ports import free_ports

METHOD = "/bench.Limits/Echo"
BATCH = 256
IN_FLIGHT = 16
FRAME_OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]


def frame(count: int, payload_bytes: int) -> bytes:
    """A produce request of so many records, as it goes over the wire."""
    body = Message(payload=os.urandom(payload_bytes))
    return pb.ProduceRequest(producer_id="x" * 32, records=[
        pb.ProduceRecord(destination=f"d{i % 10}", tenant=f"t{i % 10}", key=f"k{i}", producer_sequence=i + 1, message=body)
        for i in range(count)]).SerializeToString()


async def echo(counters: Counters, address: str) -> dict[str, Any]:
    """Server: returns every frame as it came."""
    async def answer(frames: Any, context: Any) -> Any:
        while True:
            one = await context.read()
            if one is grpc.aio.EOF:
                return
            await context.write(one)

    server = grpc.aio.server(options=FRAME_OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench.Limits", {
        "Echo": grpc.stream_stream_rpc_method_handler(answer)})])
    server.add_insecure_port(address)
    await server.start()
    counters[READY_CONSUMER] = 1
    while not counters[FINISH]:
        await asyncio.sleep(0.02)
    await server.stop(None)
    return {}


async def stream(counters: Counters, address: str, rounds: int, payload_bytes: int) -> dict[str, Any]:
    """Client: full frames until `STOP`, a few in flight, all returned; then single messages, one at a time."""
    big, small = frame(BATCH, payload_bytes), frame(1, payload_bytes)
    window = asyncio.Semaphore(IN_FLIGHT)
    returned = 0
    async with grpc.aio.insecure_channel(address, options=FRAME_OPTIONS) as channel:
        call = channel.stream_stream(METHOD)()

        async def read() -> None:
            nonlocal returned
            while await call.read() is not grpc.aio.EOF:
                window.release()
                returned += BATCH
                counters[PRODUCED] = returned

        reader = asyncio.ensure_future(read())
        while not counters[STOP]:
            await window.acquire()
            await call.write(big)
        await call.done_writing()
        await reader
        call = channel.stream_stream(METHOD)()
        times = []
        for _ in range(rounds + 50):
            start = time.perf_counter()
            await call.write(small)
            await call.read()
            times.append(time.perf_counter() - start)
        await call.done_writing()
    counters[SETTLED] = returned
    return {"round_trip": summary(times[50:])}


def grpc_limit(directory: Path, seconds: float, payload_bytes: int) -> dict[str, Any]:
    """Messages per second there and back over one stream between two processes, and one message's round trip."""
    directory.mkdir(parents=True, exist_ok=True)
    counters = Counters()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with Children() as children:
        server = Worker("echo", directory, counters, address=address)
        client = Worker("stream", directory, counters, address=address, rounds=500, payload_bytes=payload_bytes)
        children.start(server)
        poll(lambda: counters[READY_CONSUMER], 30, "the echo server", children)
        children.start(client)
        poll(lambda: counters[PRODUCED], 30, "the first frame", children)
        time.sleep(0.5)
        start, first = time.monotonic(), counters[PRODUCED]
        cpu = [cpu_seconds(child.pid) for child in (client, server)]
        time.sleep(seconds)
        elapsed, count = time.monotonic() - start, counters[PRODUCED] - first
        cores = [(cpu_seconds(child.pid) - before) / elapsed for child, before in zip((client, server), cpu, strict=True)]
        counters[STOP] = 1
        found = client.result(30)
        counters[FINISH] = 1
    return {"messages_per_second": round(count / elapsed), "batch": BATCH, "cores": [round(c, 2) for c in cores], **found}


def rocksdb_limit(directory: Path, seconds: float, payload_bytes: int) -> dict[str, Any]:
    """Messages per second written and synced in batches, and the time of a batch of one."""
    path = directory / "rocksdb"
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    body = os.urandom(payload_bytes + 60)  # as a record with its names
    out: dict[str, Any] = {"batch": BATCH}
    db = Rdict(str(path), options=options)
    try:
        number = 0
        for size, key in ((BATCH, "messages_per_second"), (1, "messages_per_second_alone")):
            times = []
            end = time.perf_counter() + seconds / 2
            while (start := time.perf_counter()) < end:
                batch = WriteBatch(raw_mode=True)
                for _ in range(size):
                    number += 1
                    batch.put(number.to_bytes(8, "big"), body)
                db.write(batch)
                db.flush_wal(True)
                times.append(time.perf_counter() - start)
            out[key] = round(size * len(times) / sum(times))
            out["batch_sync" if size > 1 else "single_sync"] = summary(times)
    finally:
        db.close()
        shutil.rmtree(path)
    return out
