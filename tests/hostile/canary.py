"""An honest producer and an honest consumer beside the attacks: nothing may be lost, reordered or held up for long."""
from __future__ import annotations

import asyncio

import grpc
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    AckRequest,
    Credit,
    LeaseRequest,
    ProduceRecord,
    ProduceRequest,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

ANSWER_SECONDS = 30.0  # a node under attack is slow, but it answers
PAUSE_SECONDS = 0.02


class Canary:
    """See the module. Its destination is `canary`."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = QueueServiceStub(self._channel)
        self.sent = 0
        self.got: list[int] = []
        self._stopping = False
        self._consumer: asyncio.Task[None] | None = None
        self._producer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to produce and to consume."""
        self._consumer = asyncio.ensure_future(self._consume())
        self._producer = asyncio.ensure_future(self._produce())

    async def _produce(self) -> None:
        call = self._stub.Produce()
        while not self._stopping:
            record = ProduceRecord(destination="canary", tenant="t", key="k", message=Message(payload=b"%d" % self.sent))
            await call.write(ProduceRequest(records=[record]))
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await call.read()
            assert not response.errors, response
            self.sent += 1
            await asyncio.sleep(PAUSE_SECONDS)
        call.cancel()

    async def _consume(self) -> None:
        call, acks = self._stub.Lease(), self._stub.Ack()
        await call.write(LeaseRequest(subscribe=Subscribe(destinations=["canary"], credit=Credit(messages=100, bytes=1 << 20))))
        while True:
            response = await call.read()
            for run in response.runs:
                self.got += [int(m.message.payload) for m in run.messages]
                await acks.write(AckRequest(settlements=[Settlement(
                    shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[-1].sequence, outcome=OUTCOME_ACK)]))
                assert (await acks.read()).results == [1]
                await call.write(LeaseRequest(credit=Credit(messages=len(run.messages), bytes=1 << 20)))

    async def stop(self) -> None:
        """Ends, once everything has arrived. Raises AssertionError if something is missing, changed its place or came twice."""
        assert self._producer is not None and self._consumer is not None
        self._stopping = True
        await self._producer
        async with asyncio.timeout(ANSWER_SECONDS):
            while len(self.got) < self.sent and not self._consumer.done():
                await asyncio.sleep(0.05)
        if self._consumer.done():
            self._consumer.result()
        self._consumer.cancel()
        await asyncio.gather(self._consumer, return_exceptions=True)
        await self._channel.close()
        assert self.got == list(range(self.sent)), f"sent {self.sent}, got {len(self.got)}, in order: {self.got == sorted(self.got)}"
