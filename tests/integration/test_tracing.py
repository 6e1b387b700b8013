"""Whole traces, as a collector gets them: from a producer through real nodes to a consumer, and to a receiver over HTTP."""
from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from otlp_receiver import SECONDS_MAX, Receiver, Span
from spillway.client import Client, DeliveryPolicy, Destination, HttpTarget, Record, Retry, sync
from spillway.contract.telemetry import otlp

Cluster = Callable[..., Any]
INTERNAL, SERVER, CLIENT, PRODUCER, CONSUMER = range(1, 6)  # kinds of span in OTLP
POLICY = DeliveryPolicy(backoff_base=0.01, backoff_cap=0.05)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A collector."""
    made = Receiver()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def provider(receiver: Receiver) -> AsyncIterator[TracerProvider]:
    """What an application would have configured."""
    made = TracerProvider(resource=otlp.resource("application", "1"), shutdown_on_exit=False)
    made.add_span_processor(otlp.span_processor(receiver.endpoint))
    yield made
    await otlp.within(10, made.shutdown)


def unsampled() -> Any:
    """A context of a trace that is not sampled."""
    return trace.set_span_in_context(trace.NonRecordingSpan(trace.SpanContext(0xDEAD, 0xBEEF, False, trace.TraceFlags(0))))


def check_broker(spans: list[Span], parent: str, destination: str, tenant: str, attempts: list[str]) -> None:
    """What the broker says of one message: stored once; for each attempt that it waited, was leased, and with what outcome that ended."""
    assert {(s.service, s.kind, s.parent) for s in spans} == {("spillway", INTERNAL, parent)}
    assert {s.attributes["messaging.system"] for s in spans} == {"spillway"}
    assert {(s.attributes["messaging.destination.name"], s.attributes["spillway.tenant"]) for s in spans} == {(destination, tenant)}
    assert len({s.attributes["messaging.destination.partition.id"] for s in spans}) == 1
    assert len({s.attributes["spillway.sequence"] for s in spans}) == 1
    by_name = {name: [s for s in spans if s.name == f"{name} {destination}"] for name in ("append", "wait", "lease", "settle")}
    assert sum(map(len, by_name.values())) == len(spans)
    assert len(by_name["append"]) == 1
    numbers = list(range(1, len(attempts) + 1))
    for name in ("wait", "lease", "settle"):
        assert [s.attributes["spillway.attempt"] for s in by_name[name]] == numbers, by_name[name]
    assert [s.attributes["spillway.outcome"] for s in by_name["lease"]] == attempts
    assert [s.attributes["spillway.outcome"] for s in by_name["settle"]] == attempts
    assert [s.failed for s in by_name["lease"]] == [outcome != "ack" for outcome in attempts]
    assert [s.attributes.get("spillway.wait_reason") for s in by_name["wait"]] == [None, *attempts[:-1]]
    for wait, lease in zip(by_name["wait"], by_name["lease"], strict=True):
        assert wait.begin <= wait.end <= lease.begin <= lease.end
    for lease, wait in zip(by_name["lease"], by_name["wait"][1:], strict=False):
        assert lease.end <= wait.begin


async def test_a_message_is_traced_from_its_producer_through_a_retry_to_its_acknowledgement(
        cluster: Cluster, receiver: Receiver, provider: TracerProvider) -> None:
    """One trace has the producer's span, the broker's of each attempt, and the consumer's: children of the one that created the message,
    and linked to it; settlements are children of what handled the message. Those beside it that are not sampled have no spans."""
    nodes = cluster(flags=["--otlp-endpoint", receiver.endpoint])
    async with Client(nodes.addresses, tracer_provider=provider) as client:
        await client.wait_ready(SECONDS_MAX)
        await client.admin.create_destination(Destination("d", policy=POLICY))
        async with client.producer() as producer, client.consumer("d", name="c1") as consumer:
            token = trace.context_api.attach(unsampled())
            await producer.send("d", b"quiet", tenant="t", key="k")
            await producer.send_many([Record("d", b"quiet", "t", "k")])
            trace.context_api.detach(token)
            with provider.get_tracer("test").start_as_current_span("request") as request:
                await producer.send("d", b"loud", tenant="t", key="k", headers={"x": "y"}, id="m-1")
                trace_id = f"{request.get_span_context().trace_id:032x}"
            attempts = []
            async with asyncio.timeout(SECONDS_MAX):
                async for message in consumer:
                    async with message:
                        if message.payload == b"quiet":
                            assert message.headers["traceparent"].endswith("-00")
                            assert not trace.get_current_span().get_span_context().is_valid
                            continue
                        attempts.append(message.attempt)
                        assert trace.get_current_span().get_span_context().trace_id == request.get_span_context().trace_id
                        if message.attempt == 1:
                            raise Retry(reason="again", delay=0.0)
                    if len(attempts) == 2:
                        break
        await receiver.until(lambda: len(receiver.of(trace_id, "settle")) == 2 and len(receiver.of(trace_id, "ack")) == 1)
        await otlp.within(10, provider.force_flush)
    await receiver.until(lambda: bool(receiver.of(trace_id, "request")) and len(receiver.of(trace_id)) >= 15)
    assert attempts == [1, 2]
    [root] = receiver.of(trace_id, "request")
    [send] = receiver.of(trace_id, "send d")
    assert (send.kind, send.parent, send.attributes["messaging.message.id"]) == (PRODUCER, root.id, "m-1")
    assert send.attributes["spillway.tenant"] == "t"
    spans = receiver.of(trace_id)
    check_broker([s for s in spans if s.service == "spillway"], send.id, "d", "t", ["retry", "ack"])
    link = [(trace_id, send.id)]
    received, processed = receiver.of(trace_id, "receive d"), receiver.of(trace_id, "process d")
    assert [(s.kind, s.parent, s.links) for s in received] == [(CLIENT, send.id, link)] * 2
    assert [(s.kind, s.parent, s.links) for s in processed] == [(CONSUMER, send.id, link)] * 2
    assert [s.attributes["spillway.attempt"] for s in processed] == [1, 2]
    assert [s.attributes.get("error.type") for s in processed] == ["Retry", None] and [s.failed for s in processed] == [True, False]
    [nack], [ack] = receiver.of(trace_id, "nack d"), receiver.of(trace_id, "ack d")
    assert [(s.kind, s.parent, s.links) for s in (nack, ack)] == [(CLIENT, processed[0].id, link), (CLIENT, processed[1].id, link)]
    assert (nack.attributes["spillway.outcome"], ack.attributes["spillway.outcome"]) == ("retry", "ack")
    assert len(spans) == 2 + 7 + 6, spans
    assert {s.trace for s in receiver.spans} == {trace_id}, "what is not sampled has no span, and nothing else began one"


async def test_many_records_are_traced_one_by_one(cluster: Cluster, receiver: Receiver, provider: TracerProvider) -> None:
    """Each record of a batch has a span that created it, all of them are linked by one that sent them; over three nodes, whoever leads."""
    nodes = cluster(3, flags=["--otlp-endpoint", receiver.endpoint])
    async with Client(nodes.addresses, tracer_provider=provider) as client:
        await client.wait_ready(SECONDS_MAX)
        async with client.producer() as producer, client.consumer("d") as consumer:
            with provider.get_tracer("test").start_as_current_span("request") as request:
                await producer.send_many([Record("d", b"x", "t", str(i)) for i in range(20)])
                trace_id = f"{request.get_span_context().trace_id:032x}"
            got = 0
            async with asyncio.timeout(SECONDS_MAX):
                async for run in consumer.runs():
                    got += run.count
                    await run.ack()
                    if got == 20:
                        break
    await receiver.until(lambda: len(receiver.of(trace_id, "settle")) == 20)
    await otlp.within(10, provider.force_flush)
    created = receiver.of(trace_id, "create d")
    [sent] = [s for s in receiver.of(trace_id, "send") if s.kind == CLIENT]
    assert len(created) == 20 == sent.attributes["messaging.batch.message_count"]
    assert {link[1] for link in sent.links} == {s.id for s in created} and {s.parent for s in created} == {sent.parent}
    for one in created:
        check_broker([s for s in receiver.of(trace_id) if s.parent == one.id and s.service == "spillway"], one.id, "d", "t", ["ack"])


async def test_a_delivery_over_http_is_traced_with_its_retry(cluster: Cluster, receiver: Receiver, provider: TracerProvider) -> None:
    """The receiver of a request is told of the span of that very request, which is a child of the attempt's; a failed one says why. What
    is not sampled is delivered with the context that it came with, and has no spans."""
    requests: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append((request.headers["traceparent"], request.headers["Spillway-Attempt"]))
        return web.Response(status=500 if len(requests) == 2 else 204)

    application = web.Application()
    application.router.add_post("/", answer)
    target = TestServer(application)
    await target.start_server()
    nodes = cluster(flags=["--otlp-endpoint", receiver.endpoint])
    dispatcher = None
    try:
        async with Client(nodes.addresses, tracer_provider=provider) as client:
            await client.wait_ready(SECONDS_MAX)
            await client.admin.create_destination(Destination("web", policy=POLICY, http=HttpTarget(
                str(target.make_url("/")), allow_private_addresses=True)))
            dispatcher = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "spillway.client.cli", "dispatch", "--address", nodes.addresses[0], "--otlp-endpoint",
                receiver.endpoint, "--name", "d1")
            async with client.producer() as producer:
                token = trace.context_api.attach(unsampled())
                await producer.send("web", b"quiet", tenant="t", key="k")
                trace.context_api.detach(token)
                with provider.get_tracer("test").start_as_current_span("request") as request:
                    await producer.send("web", b"loud", tenant="t", key="k")
                    trace_id = f"{request.get_span_context().trace_id:032x}"
                await receiver.until(lambda: len(receiver.of(trace_id, "settle")) == 2 and len(receiver.of(trace_id, "POST")) == 2
                                     and len(receiver.of(trace_id, "process")) == 2)
            await otlp.within(10, provider.force_flush)
        dispatcher.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(dispatcher.wait(), SECONDS_MAX) == 0
    finally:
        if dispatcher is not None and dispatcher.returncode is None:
            dispatcher.kill()
            await dispatcher.wait()
        await target.close()
    [send] = receiver.of(trace_id, "send web")
    check_broker([s for s in receiver.of(trace_id) if s.service == "spillway"], send.id, "web", "t", ["retry", "ack"])
    processed, posted = receiver.of(trace_id, "process web"), receiver.of(trace_id, "POST")
    assert {s.service for s in (*processed, *posted)} == {"spillway-dispatcher"}
    assert [(s.kind, s.parent, s.links) for s in processed] == [(CONSUMER, send.id, [(trace_id, send.id)])] * 2
    assert [(s.kind, s.parent) for s in posted] == [(CLIENT, s.id) for s in processed]
    assert [s.attributes["http.response.status_code"] for s in posted] == [500, 204]
    assert [s.attributes["spillway.attempt"] for s in posted] == [1, 2] == [s.attributes["spillway.attempt"] for s in processed]
    assert [s.attributes.get("error.type") for s in (*posted, *processed)] == ["500", None, "retry", None]
    assert requests == [(f"00-{0xDEAD:032x}-{0xBEEF:016x}-00", "1"),
                        *((f"00-{trace_id}-{s.id}-01", str(i + 1)) for i, s in enumerate(posted))]
    assert {s.trace for s in receiver.spans} == {trace_id}
    settled = [s for s in receiver.of(trace_id) if s.name in ("ack web", "nack web")]
    assert [(s.name, s.parent, s.kind) for s in settled] == [("nack web", send.id, CLIENT), ("ack web", send.id, CLIENT)]


async def test_the_broker_begins_traces_if_it_is_told_to(cluster: Cluster, receiver: Receiver) -> None:
    """With a ratio of 1 every message without a trace has one of its own, which begins with its append; one that came with a trace that is
    not sampled has none. Metrics come over OTLP, too, at the latest when the node stops."""
    nodes = cluster(flags=["--otlp-endpoint", receiver.endpoint, "--trace-sample-ratio", "1"])
    async with Client(nodes.addresses) as client:
        await client.wait_ready(SECONDS_MAX)
        async with client.producer() as producer, client.consumer("d") as consumer:
            await producer.send("d", b"no", headers={"traceparent": f"00-{1:032x}-{1:016x}-00"})
            await producer.send_many([Record("d", b"x", "t", str(i)) for i in range(5)])
            got = 0
            async with asyncio.timeout(SECONDS_MAX):
                async for run in consumer.runs():
                    got += run.count
                    await run.ack()
                    if got == 6:
                        break
    await receiver.until(lambda: sum(s.name == "settle d" for s in receiver.spans) == 5)
    roots = [s for s in receiver.spans if s.name == "append d"]
    assert len(roots) == 5 == len({s.trace for s in receiver.spans}) and not [s for s in roots if s.parent]
    for root in roots:
        check_broker([s for s in receiver.of(root.trace) if s.id != root.id] + [_child(root)], root.id, "d", "t", ["ack"])
    await asyncio.to_thread(nodes.nodes["n1"].stop)
    await receiver.until(lambda: "spillway_messages_acked" in receiver.metrics)
    [point] = receiver.metrics["spillway_messages_acked"].sum.data_points
    assert point.as_int == 6 and receiver.metrics["spillway_messages_acked"].sum.is_monotonic
    [point] = receiver.metrics["spillway_end_to_end_seconds"].histogram.data_points
    assert point.count == 6 == sum(point.bucket_counts) and len(point.bucket_counts) == len(point.explicit_bounds) + 1


def _child(root: Span) -> Span:
    """The append that begins a trace, as if it were a child of itself."""
    root.parent = root.id
    return root


async def test_threads_have_their_traces(cluster: Cluster, receiver: Receiver, provider: TracerProvider) -> None:
    """The client for threads makes the same spans, from what is current in the calling thread."""
    nodes = cluster(flags=["--otlp-endpoint", receiver.endpoint])

    def work() -> str:
        with sync.Client(nodes.addresses, tracer_provider=provider) as client:
            client.wait_ready(SECONDS_MAX)
            with client.producer() as producer, provider.get_tracer("test").start_as_current_span("request") as request:
                producer.send("d", b"x", tenant="t", key="k")
            with client.consumer("d") as consumer:
                message = consumer.next_message(SECONDS_MAX)
                assert message is not None
                with message:
                    assert trace.get_current_span().get_span_context().trace_id == request.get_span_context().trace_id
                assert not trace.get_current_span().get_span_context().is_valid
            return f"{request.get_span_context().trace_id:032x}"

    trace_id = await asyncio.to_thread(work)
    await otlp.within(10, provider.force_flush)
    await receiver.until(lambda: bool(receiver.of(trace_id, "settle")) and bool(receiver.of(trace_id, "ack")))
    [send], [process], [ack] = (receiver.of(trace_id, name) for name in ("send d", "process d", "ack d"))
    assert (send.parent, process.parent, ack.parent) == (receiver.of(trace_id, "request")[0].id, send.id, process.id)


async def test_a_collector_that_hangs_holds_nobody_up(cluster: Cluster) -> None:
    """Messages go on, and a node stops, while a collector takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nodes = cluster(flags=["--otlp-endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}", "--trace-sample-ratio", "1"])
        async with Client(nodes.addresses) as client:
            await client.wait_ready(SECONDS_MAX)
            async with client.producer() as producer:
                await producer.send_many([Record("d", b"x", "t", str(i)) for i in range(2000)])
        assert await asyncio.to_thread(nodes.nodes["n1"].stop) == 0
        assert " ERROR " not in nodes.nodes["n1"].text().replace("ERROR opentelemetry", "")
