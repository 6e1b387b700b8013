"""Operators' commands: what they call, what they print, and how they exit."""
from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import message_pb2 as m

from tests.unit.client.fake_admin import AdminState
from tests.unit.client.fake_broker import FakeCluster

Run = Callable[..., tuple[int, str, str]]
STAMP = Timestamp(seconds=1_700_000_000)
SECRET = "whsec_" + "A" * 40


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A cluster in a thread of its own, whose address the commands know."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> FakeCluster:
        return await FakeCluster().start()

    cluster = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    monkeypatch.setenv("SPILLWAY_ADDRESS", cluster.addresses[0])
    try:
        yield cluster
    finally:
        asyncio.run_coroutine_threadsafe(cluster.stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def state(cluster: FakeCluster) -> AdminState:
    """What its AdminService knows."""
    return cluster.admin


@pytest.fixture
def run(command_line: Run) -> Run:
    """(exit code, stdout, stderr) of one command; `stdin` is what it reads."""
    return command_line


def asked(state: AdminState, kind: type) -> list[Any]:
    """The requests of one kind, in order."""
    return [one for one in state.calls if isinstance(one, kind)]


def test_gates_are_closed_opened_and_listed(run: Run, state: AdminState) -> None:
    """For a destination or a tenant, with a reason, for a time."""
    assert run("gates", "d")[:2] == (0, "nothing of 'd' is paused or parked\n")
    assert run("pause", "d", "--reason", "maintenance")[:2] == (0, "paused 'd'\n")
    assert run("park", "d", "acme", "--for", "1h30m", "--reason", "loud")[:2] == (0, "parked 'd', tenant 'acme' for 5400 s\n")
    assert run("park", "d", "")[0] == 0
    assert [(c.HasField("tenant"), c.tenant, c.duration.seconds) for c in asked(state, pb.ParkDeliveryRequest)] == [
        (True, "acme", 5400), (True, "", 600)]
    code, out, _ = run("gates", "d")
    assert code == 0 and "(all)" in out and "maintenance" in out and "acme" in out and "parked" in out
    listed = json.loads(run("gates", "d", "-o", "json")[1])
    assert {(g["tenant"], g["cause"]) for g in listed} == {(None, "paused"), ("acme", "parked"), ("", "parked")}
    assert json.loads(run("resume", "d", "-o", "json")[1]) == {"destination": "d", "tenant": None, "state": "resumed"}
    assert run("unpark", "d", "acme")[0] == 0 and run("unpark", "d", "")[0] == 0
    assert not state.gates
    code, _, err = run("park", "d", "--for", "soon")
    assert code == 2 and "--for" in err and "'soon' is not a duration" in err


def test_explain_prints_the_sentence(run: Run, state: AdminState) -> None:
    """Or everything, as JSON."""
    state.explanation = pb.ExplainResponse(sentence="It is parked.", cause=pb.STALL_CAUSE_PARKED, until_time=STAMP, messages=3)
    assert run("explain", "d", "t", "k") == (0, "It is parked.\n", "")
    assert asked(state, pb.ExplainRequest)[-1] == pb.ExplainRequest(destination="d", tenant="t", key="k")
    found = json.loads(run("explain", "d", "-o", "json")[1])
    assert found == {"sentence": "It is parked.", "cause": "parked", "until_time": "2023-11-14T22:13:20+00:00", "messages": 3,
                     "drain_time": None}


def test_peek_shows_what_waits(run: Run, state: AdminState) -> None:
    """A preview for people, all of it for programs."""
    state.peeked = pb.PeekMessagesResponse(count=70, messages=[
        pb.PeekedMessage(sequence=5, enqueue_time=STAMP, attempts=2, leased=True, message=m.Message(
            id="i", headers={"a": "[b]"}, payload=b"text\n[red]" + b"x" * 100)),
        pb.PeekedMessage(sequence=6, enqueue_time=STAMP, deliver_time=STAMP, message=m.Message(payload=b"\xff"))])
    code, out, err = run("peek", "d", "t", "k", "-n", "2")
    assert code == 0 and "text·[red]xxx" in out and "xxx…" in out and "2 of 70 messages" in err
    assert len(out.splitlines()) == 6
    found = json.loads(run("peek", "d", "", "k", "-o", "json")[1])
    assert found["total"] == 70 and found["messages"][0]["payload"].startswith("text\n[red]")
    assert found["messages"][1]["payload_base64"] == "/w==" and "payload" not in found["messages"][1]
    assert run("peek", "d", "t", "k", "-n", "0")[0] == 2
    assert run("peek", "d", "t")[0] == 2


def test_purge_counts_and_asks_first(run: Run, state: AdminState) -> None:
    """Nothing is removed without a yes."""
    def purges() -> list[bool]:
        return [not c.validate_only for c in asked(state, pb.PurgeMessagesRequest)]

    code, out, err = run("purge", "d", "t", stdin="n\n")
    assert code == 1 and not out and "remove 3 messages of 2 queues of 'd', tenant 't' for good?" in err and not any(purges())
    assert run("purge", "d")[0] == 1 and not any(purges())  # nobody to ask
    assert run("purge", "d", "--dry-run")[:2] == (0, "would be removed: 3 messages of 2 queues of 'd'\n") and not any(purges())
    code, out, _ = run("purge", "d", "t", "k", stdin="y\n")
    assert code == 0 and out == "removed: 3 messages of 2 queues of 'd', tenant 't', key 'k'\n" and sum(purges()) == 1
    assert json.loads(run("purge", "d", "--yes", "-o", "json")[1]) == {"messages": 3, "queues": 2, "dry_run": False}
    state.purged = pb.PurgeMessagesResponse()
    assert run("purge", "d")[:2] == (0, "removed: 0 messages of 0 queues of 'd'\n") and sum(purges()) == 2


def test_dead_letters_are_listed_and_purged(run: Run, state: AdminState) -> None:
    """A bounded number, with a word about the rest."""
    state.dead_letters = [pb.DeadLetter(shard=1, sequence=n, tenant="t", key="k", reason="broken", dead_time=STAMP,
                                        message=m.Message(payload=b"%d" % n)) for n in range(5)]
    code, out, err = run("dead-letter", "list", "d", "-n", "3")
    assert code == 0 and "broken" in out and "more than 3" in err
    assert [one["payload"] for one in json.loads(run("dead-letter", "list", "d", "-n", "0", "-o", "json")[1])] == list("01234")
    assert json.loads(run("dead-letter", "list", "d", "other", "-o", "json")[1]) == []
    assert run("dead-letter", "purge", "d", stdin="n\n")[0] == 1 and len(state.dead_letters) == 5
    assert run("dead-letter", "purge", "d", "--dry-run")[1] == "would be removed: 5 dead letters of 'd'\n"
    assert run("dead-letter", "purge", "d", "t", "-y")[:2] == (0, "removed: 5 dead letters of 'd', tenant 't'\n")
    assert run("dead-letter", "purge", "d")[1] == "removed: 0 dead letters of 'd'\n"


def test_redrive_says_how_many_are_back(run: Run, state: AdminState) -> None:
    """It counts first; what was put back before a failure is told."""
    def answer(count: int, done: bool = True) -> pb.RedriveDeadLettersResponse:
        return pb.RedriveDeadLettersResponse(redriven=count, done=done)

    state.redrives = [([answer(3)], None), ([answer(1, False), answer(3)], None)]
    assert run("dead-letter", "redrive", "d", "t", "k", "--rate", "7")[:2] == (
        0, "put back: 3 dead letters of 'd', tenant 't', key 'k'\n")
    first, second = asked(state, pb.RedriveDeadLettersRequest)
    assert first.validate_only and (second.tenant, second.key, second.messages_per_second) == ("t", "k", 7)
    state.redrives = [([answer(3)], None)]
    assert json.loads(run("dead-letter", "redrive", "d", "--dry-run", "-o", "json")[1]) == {"redriven": 3, "dry_run": True}
    state.redrives = [([answer(3)], None), ([answer(2, False)], grpc.StatusCode.PERMISSION_DENIED)]
    code, out, err = run("dead-letter", "redrive", "d")
    assert (code, out) == (5, "") and "2 of 3 dead letters put back" in err
    state.redrives = [([], grpc.StatusCode.NOT_FOUND)]
    assert run("dead-letter", "redrive", "d")[0] == 3
    code, _, err = run("dead-letter", "redrive", "d", "--rate", "0")
    assert code == 2 and "messages_per_second" in err


def test_routes_on_the_command_line(run: Run, state: AdminState, tmp_path: Path) -> None:
    """Created by hand or from a file, shown, deleted."""
    order = 'headers["kind"] == "order"'
    code, out, _ = run("route", "create", "events", "a", "b", "--filter", order, "-o", "json")
    assert code == 0 and json.loads(out)["targets"][1] == {"destination": "b", "filter": order, "skip_over_budget": False}
    assert run("route", "create", "events", "a")[0] == 1
    file = tmp_path / "routes.toml"
    file.write_text("""
        [[route]]
        source = "events"
        targets = [{destination = "a"}, {destination = "c", filter = 'key == "x"', skip_over_budget = true}]
        [[route]]
        source = "other"
        targets = [{destination = "a"}]
    """)
    assert "events: would be changed" in run("route", "apply", "-f", str(file), "--dry-run")[1] and "other" not in state.routes
    done = json.loads(run("route", "apply", "-f", str(file), "-o", "json")[1])
    assert [(one["source"], one["result"]) for one in done] == [("events", "changed"), ("other", "created")]
    assert run("route", "apply", "-f", str(file))[1] == "events: unchanged\nother: unchanged\n"
    out = run("route", "list")[1]
    assert "events" in out and 'key == "x"' in out and "skip" in out and "other" in out
    assert len(json.loads(run("route", "list", "-o", "json")[1])) == 2
    assert "skip" in run("route", "show", "events")[1]
    assert run("route", "delete", "events")[:2] == (0, "deleted the route of 'events'\n")
    assert run("route", "show", "events")[0] == run("route", "delete", "events")[0] == 3
    file.write_text('source = "s"\ntargets = [{destination = "a", filter = "wrong"}]')
    code, _, err = run("route", "apply", "-f", str(file))
    assert code == 2 and err == f"spillway: {file}: targets[0].filter: does not parse\n"


def test_top_tenants(run: Run, state: AdminState) -> None:
    """Those with the most messages; incomplete counts have their exit code."""
    state.top = pb.ListTopTenantsResponse(tenants=[pb.TenantStats(tenant="acme", messages=70, message_bytes=512)])
    code, out, _ = run("top", "d", "-n", "5")
    assert code == 0 and "acme" in out and "512" in out and asked(state, pb.ListTopTenantsRequest)[0].limit == 5
    state.top.shards_missing.append(3)
    code, out, err = run("top", "d", "-o", "json")
    assert code == 4 and json.loads(out)["shards_missing"] == [3] and "shards 3 did not answer" in err


FILE = """
[[destination]]
name = "billing"
lease_seconds = "1m"
limit.messages_per_second = 50
http = {url = "https://u:p@x/", headers = {Authorization = "Bearer s3cret"}, signing_secrets = ["SECRET"]}

[[destination]]
name = "crm"
""".replace("SECRET", SECRET)


def test_a_policy_file_is_applied_and_what_changed_is_told(run: Run, state: AdminState, tmp_path: Path) -> None:
    """Once; what is in it already stays untouched, and no secret is shown."""
    file = tmp_path / "policy.toml"
    file.write_text(FILE)
    code, out, _ = run("destination", "apply", "-f", str(file), "--dry-run")
    assert code == 0 and not state.destinations and "billing: would be created" in out and "lease_seconds: 30 -> 60" in out
    code, out, _ = run("destination", "apply", "-f", str(file))
    assert code == 0 and "crm: created" in out and "limit.messages_per_second: none -> 50" in out
    assert state.destinations["billing"].http.signing_secrets == [SECRET]
    assert "s3cret" not in out and SECRET not in out and "u:p" not in out
    assert run("destination", "apply", "-f", str(file))[1] == "billing: unchanged\ncrm: unchanged\n"
    assert len(asked(state, pb.UpdateDestinationRequest)) == 2
    state.destinations["billing"].etag = "7"
    file.write_text(FILE.replace('"1m"', '"90s"').replace("s3cret", "s4cret"))
    done = json.loads(run("destination", "apply", "-f", str(file), "-o", "json")[1])
    assert done[0] == {"destination": "billing", "result": "changed", "dry_run": False, "changes": [
        {"field": "lease_seconds", "old": "60", "new": "90"}, {"field": "http.headers.Authorization", "old": "…", "new": "…"}]}
    assert state.calls[-2].destination.etag == "7"  # someone else's change meanwhile is not overwritten


def test_what_is_wrong_in_a_policy_file_is_named(run: Run, state: AdminState, tmp_path: Path) -> None:
    """By file and key, in one line, whether the broker or the command finds it."""
    file = tmp_path / "policy.toml"
    file.write_text(FILE + "what = 1\n")
    code, _, err = run("destination", "apply", "-f", str(file))
    assert code == 2 and err.startswith(f"spillway: {file}: destination[1].what: not known; known are adaptive_limit,")
    assert err.count("\n") == 1 and not state.calls
    file.write_text(FILE)
    state.check = lambda d: "destination.policy.lease_duration: is too long" if d.policy.HasField("lease_duration") else ""
    code, _, err = run("destination", "apply", "-f", str(file))
    assert (code, err) == (2, f"spillway: {file}: destination[0].lease_seconds: is too long\n")
    assert run("destination", "apply", "-f", "/nowhere")[0] == 2
    for arguments in (["d", "-f", str(file)], ["-f", str(file), "--ttl", "1h"], ["-f", str(file), "--url", "http://x"], []):
        assert run("destination", "apply", *arguments)[0] == 2


def test_a_destination_is_changed_by_options(run: Run, state: AdminState) -> None:
    """What is not given stays, secrets included."""
    assert run("destination", "apply", "d", "--url", "http://127.0.0.1:1/", "--allow-private", "--unordered", "--ttl", "2h")[0] == 0
    state.destinations["d"].http.signing_secrets.append(SECRET)
    code, out, _ = run("destination", "apply", "d", "--lease-seconds", "1m", "--timeout", "500ms", "-o", "json")
    stored = state.destinations["d"]
    assert code == 0 and stored.http.allow_private_addresses and stored.http.timeout.nanos == 500_000_000
    assert stored.policy.ordering == pb.ORDERING_UNORDERED and stored.policy.ttl.seconds == 7200
    assert stored.http.signing_secrets == [SECRET] and SECRET not in out and json.loads(out)["policy"]["lease_seconds"] == 60.0
    assert SECRET in run("destination", "show", "d", "--secrets")[1] and SECRET not in run("destination", "show", "d")[1]
    assert run("destination", "apply", "d", "--ttl", "9h", "--dry-run")[0] == 0 and state.destinations["d"].policy.ttl.seconds == 7200
    assert run("destination", "apply", "d", "--no-allow-private")[0] == 0
    assert not state.destinations["d"].http.allow_private_addresses
    assert run("destination", "apply", "d", "--url", "")[0] == 0 and not state.destinations["d"].HasField("http")
    code, _, err = run("destination", "apply", "d", "--allow-private")
    assert code == 2 and "--allow-private" in err


def test_produce_takes_times_and_ids(run: Run, cluster: FakeCluster) -> None:
    """As options for all lines, or in each."""
    sent: list[Any] = []
    cluster.refuse = lambda record: sent.append(record)  # type: ignore[assignment,return-value]
    assert run("produce", "d", "--ttl", "1h", "--dedup-id", "x", "--delay", "5m", stdin="one\n")[0] == 0
    assert (sent[0].ttl.seconds, sent[0].dedup_id, sent[0].delay.seconds) == (3600, "x", 300)
    lines = ({"payload": "a", "ttl": "30s", "dedup_id": "y", "deliver_at": "2030-01-31T08:00:00Z"}, {"payload": "b"})
    assert run("produce", "d", "--json", "--delay", "9", stdin="\n".join(map(json.dumps, lines)))[0] == 0
    given, plain = sorted(sent[1:], key=lambda r: r.message.payload)
    assert (given.ttl.seconds, given.dedup_id, given.deliver_at.seconds) == (30, "y", 1_896_076_800)
    assert not given.HasField("delay") and plain.delay.seconds == 9 and not plain.dedup_id
    for line, where in (('{"deliver_at": "2030-01-31T08:00:00"}', "line 1: deliver_at"), ('{"ttl": "long"}', "line 1: ttl"),
                        ('{"deliver_at": 7}', "line 1: deliver_at")):
        code, _, err = run("produce", "d", "--json", stdin=line)
        assert code == 2 and where in err, err
    code, _, err = run("produce", "d", "--deliver-at", "tomorrow")
    assert code == 2 and "--deliver-at" in err


def test_every_command_prints_json_and_takes_a_connection() -> None:
    """The same options everywhere, and a description; what is about this machine only takes no address, and commands of the extras parse
    their own options."""
    from spillway.client.cli import PLUGGED
    from spillway.client.commands import app

    def leaves(group: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from leaves(command, f"{path} {name}")
            else:
                yield f"{path} {name}", command

    found = {name: leaf for name, leaf in leaves(typer.main.get_command(app), "spillway") if name.removeprefix("spillway ") not in PLUGGED}
    assert len(found) > 30
    for name, command in found.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--output", "-o"} <= options and command.help, name
        if not name.startswith(("spillway context ", "spillway completion ")):
            assert {"--address", "-a", "--context", "--tls-ca", "--token-file"} <= options, name


def test_a_backup_is_written_and_verified(run: Run, cluster: FakeCluster, tmp_path: Path) -> None:
    """What it says, in both forms; what is refused, and what is damaged."""
    directory = str(tmp_path / "b")
    code, out, _ = run("backup", directory)
    assert code == 0 and f"written: {directory}, cluster 'fake' as of 2" in out and "4 shards, " in out
    code, out, _ = run("backup", "--verify", directory, "-o", "json")
    found = json.loads(out)
    assert code == 0 and (found["cluster"], found["shards"], found["rows"], len(found["groups"])) == ("fake", 4, 10, 5)
    assert found["directory"] == directory and found["bytes"] == sum(g["bytes"] for g in found["groups"])
    code, _, err = run("backup", directory)
    assert code == 2 and "directory: " in err and "is not empty, and a backup never overwrites anything; name a new one" in err
    (tmp_path / "b" / "shard-0003.group").write_bytes(b"")
    code, _, err = run("backup", "--verify", directory)
    assert code == 1 and "shard-0003.group has 0 bytes, not" in err
    (tmp_path / "file").write_text("x")
    code, _, err = run("backup", str(tmp_path / "file"))
    assert code == 1 and "cannot be written: File exists" in err


def test_status_counts_as_people_do(run: Run, cluster: FakeCluster) -> None:
    """One node is not several."""
    assert "1 node, 4 shards" in run("status")[1]
