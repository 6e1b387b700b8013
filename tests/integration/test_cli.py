"""Every command of `spillway` against real nodes: what it prints, in both forms, and how it exits."""
from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_process import ClusterProcesses
from spillway.client import Client, sync
from terminal import Terminal

from demo.ports import free_ports

Run = Callable[..., tuple[int, str, str]]
PROGRAM = [sys.executable, "-m", "spillway.client.cli"]
SECONDS_MAX = 60.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one node, for all tests of this file: each uses destinations of its own."""
    processes = ClusterProcesses(tmp_path_factory.mktemp("node"), 1, ["--shards", "2"])
    try:
        processes.start()
        yield processes.addresses[0]
    finally:
        processes.end()


@pytest.fixture
def run(node: str, command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of one command; `stdin` is what it reads."""
    monkeypatch.setenv("SPILLWAY_ADDRESS", node)
    return command_line


def done(result: tuple[int, str, str]) -> Any:
    """What a command printed as JSON. It must have succeeded."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def lines(text: str) -> list[Any]:
    """What was printed as JSON, line by line."""
    return [json.loads(line) for line in text.splitlines()]


def fill(node: str, destination: str, counts: dict[str, int]) -> None:
    """So many messages of each tenant."""
    with sync.Client(node) as client, client.producer() as producer:
        for tenant, count in counts.items():
            for number in range(count):
                producer.send(destination, b"%d" % number, tenant=tenant, key="k")


# -- messages ------------------------------------------------------------------------------------------------------


def test_messages_come_from_an_argument_a_file_and_standard_input(run: Run, tmp_path: Path) -> None:
    """In order, and as they were."""
    file = tmp_path / "events.jsonl"
    file.write_text('{"payload": "two", "headers": {"n": "2"}}\n{"payload_base64": "/w=="}\n')
    assert run("produce", "p", "one", "--tenant", "t", "--key", "k", "--header", "n=1")[2] == "1 message stored\n"
    assert run("produce", "p", "--tenant", "t", "--key", "k", "-f", str(file), "--json")[2] == "2 messages stored\n"
    stored = lines(run("produce", "p", "--tenant", "t", "--key", "k", "-o", "jsonl", stdin="three\nfour\n")[1])
    assert [set(one) for one in stored] == [{"shard", "sequence"}] * 2 and stored[0]["sequence"] < stored[1]["sequence"]
    assert run("produce", "p", "--tenant", "t", "--key", "k", "--whole", stdin="five\nsix\n")[0] == 0
    came = lines(run("consume", "p", "-n", "6", "--idle", "20s", "-o", "jsonl")[1])
    assert [one.get("payload", one.get("payload_base64")) for one in came] == ["one", "two", "/w==", "three", "four", "five\nsix\n"]
    assert came[0]["headers"] == {"n": "1"} and came[1]["headers"] == {"n": "2"} and came[0]["tenant"] == "t"
    for arguments in (("x", "-f", str(file)), ("x", "--json"), ("x", "--whole")):
        assert run("produce", "p", *arguments)[0] == 2
    assert run("produce", "p", "-f", str(tmp_path / "none"))[0] == 2


def test_a_message_that_is_given_back_comes_again(run: Run) -> None:
    """And is one attempt further."""
    assert run("produce", "again", "x", "--key", "k")[0] == 0
    assert run("consume", "again", "-n", "1", "--no-ack", "--idle", "20")[1] == "x\n"
    assert run("consume", "again", "-n", "1", "--idle", "20")[1] == "x\n"
    assert run("consume", "again", "--idle", "200ms")[:2] == (0, "")


# -- tenants -------------------------------------------------------------------------------------------------------


def test_tenants_are_listed_with_backlog_gate_and_limits(run: Run, node: str) -> None:
    """Those with the most messages first, and those that only have a gate or a policy."""
    fill(node, "d1", {"acme": 3, "beta": 1, "": 2})
    assert run("tenant", "park", "d1", "beta", "--for", "1h", "--reason", "loud")[:2] == (0, "parked 'd1', tenant 'beta' for 3600 s\n")
    assert run("tenant", "pause", "d1", "idle")[0] == 0
    assert done(run("tenant", "limits", "d1", "acme", "--rate", "5.5", "--leases-max", "2", "-o", "json"))["policy"]["limit"] == {
        "messages_per_second": 5.5, "burst": None, "leases_max": 2}
    assert run("tenant", "limits", "d1", "rich", "--unlimited", "--dry-run")[0] == 0
    found = done(run("tenant", "list", "d1", "-o", "json"))
    assert found["shards_missing"] == []
    assert [(one["tenant"], one["messages"]) for one in found["tenants"]] == [("acme", 3), ("", 2), ("beta", 1), ("idle", 0)]
    sizes = [one["message_bytes"] for one in found["tenants"]]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == 0
    acme, _, beta, idle = found["tenants"]
    assert acme["gate"] is None and acme["policy"]["limit"]["leases_max"] == 2
    assert (beta["gate"]["cause"], beta["gate"]["reason"]) == ("parked", "loud") and idle["gate"]["cause"] == "paused"
    code, out, _ = run("tenant", "ls", "d1")
    assert code == 0 and re.search(r"acme +3 .*5\.5 +2\b", out) and "parked until" in out and "paused" in out
    assert [one["tenant"] for one in done(run("tenant", "list", "d1", "-n", "1", "-o", "json"))["tenants"]] == ["acme", "beta", "idle"]
    assert run("tenant", "list", "nowhere")[0] == 3


def test_a_tenant_is_shown_with_the_reason_why_it_waits(run: Run, node: str) -> None:
    """And opened again."""
    fill(node, "d2", {"acme": 2})
    assert run("tenant", "pause", "d2", "acme", "--reason", "audit")[0] == 0
    found = done(run("tenant", "show", "d2", "acme", "-o", "json"))
    assert (found["messages"], found["cause"], found["gate"]["reason"], found["policy"]) == (2, "paused", "audit", None)
    assert "audit" in found["explanation"] and "audit" in run("tenant", "show", "d2", "acme")[1]
    assert run("tenant", "resume", "d2", "acme")[:2] == (0, "resumed 'd2', tenant 'acme'\n")
    assert run("tenant", "park", "d2", "acme")[0] == 0
    assert done(run("tenant", "unpark", "d2", "acme", "-o", "json")) == {"destination": "d2", "tenant": "acme", "state": "unparked"}
    assert done(run("tenant", "show", "d2", "acme", "-o", "json"))["gate"] is None
    assert run("consume", "d2", "-n", "2", "--idle", "20")[1] == "0\n1\n"


def test_limits_of_a_tenant_change_one_by_one(run: Run, node: str) -> None:
    """What is not given stays; of the destination, too."""
    assert run("destination", "apply", "d3", "--lease-seconds", "7")[0] == 0
    assert run("tenant", "limits", "d3", "acme")[:2] == (0, "'d3', tenant 'acme': as every other tenant\n")
    assert run("tenant", "limits", "d3", "acme", "--weight", "2")[0] == 0
    assert run("tenant", "limits", "d3", "acme", "--bytes-max", "10MiB", "--age-max", "1h")[0] == 0
    changed = done(run("tenant", "limits", "d3", "acme", "--burst", "9", "--rate", "3", "-o", "json"))["policy"]
    assert changed == {"weight": 2.0, "limit": {"messages_per_second": 3.0, "burst": 9, "leases_max": None},
                       "retention": {"bytes_max": 10 << 20, "age_max": 3600.0}}
    assert done(run("tenant", "limits", "d3", "beta", "--unlimited", "-o", "json"))["policy"]["limit"]["messages_per_second"] is None
    out = run("tenant", "limits", "d3", "acme")[1]
    assert re.search(r"limit.leases_max +unlimited", out) and re.search(r"retention.bytes_max +10485760", out)
    shown = done(run("destination", "show", "d3", "-o", "json"))["policy"]
    assert shown["lease_seconds"] == 7.0 and set(shown["tenants"]) == {"acme", "beta"}
    assert done(run("tenant", "limits", "d3", "acme", "--clear", "-o", "json"))["policy"] is None
    assert set(done(run("destination", "show", "d3", "-o", "json"))["policy"]["tenants"]) == {"beta"}
    assert run("tenant", "limits", "d3", "acme", "--clear", "--weight", "1")[0] == 2
    code, _, err = run("tenant", "limits", "d3", "acme", "--weight", "1000")
    assert code == 2 and "weight" in err
    assert run("tenant", "limits", "d3", "acme", "--bytes-max", "much")[0] == 2
    assert run("tenant", "limits", "nowhere", "acme", "--weight", "1")[0] == 3


# -- looking -------------------------------------------------------------------------------------------------------


def test_top_shows_destinations_worst_first(run: Run, node: str) -> None:
    """By age, backlog or name, filtered and limited; where there is no terminal, once."""
    fill(node, "top.old", {"acme": 1})
    fill(node, "top.big", {"acme": 5, "beta": 2})
    assert run("destination", "apply", "top.empty")[0] == 0
    assert run("park", "top.old", "--for", "1h")[0] == 0

    def names(*options: str) -> list[str]:
        found = done(run("top", "--filter", "top.*", "--interval", "200ms", "-o", "json", *options))
        assert found["total"] == 3 and found["shards_missing"] == []
        return [one["destination"] for one in found["destinations"]]

    assert names() == ["top.old", "top.big", "top.empty"]
    assert names("--sort", "backlog") == ["top.big", "top.old", "top.empty"]
    assert names("-s", "name", "-n", "2") == ["top.big", "top.empty"]
    big = done(run("top", "--filter", "top.big", "--once", "--interval", "200ms", "-o", "json"))["destinations"][0]
    assert big.pop("oldest_age") > 0 and big.pop("message_bytes") >= 7
    assert big == {"destination": "top.big", "state": "no consumer", "messages": 7, "in_per_second": 0.0, "out_per_second": 0.0,
                   "leased": 0, "dead_letters": 0, "consumers": 0}
    code, out, err = run("top", "--filter", "top.*", "--interval", "200ms", "-n", "2")
    assert code == 0 and re.search(r"top\.old +parked (1h|59m)", out) and "3 destinations, 2 with messages: 8 messages" in out
    assert "top.empty" not in out and "1 more" in err
    code, out, _ = run("top", "top.big")
    assert code == 0 and re.search(r"acme +5 +\d+ B +71%", out)
    assert run("top", "nowhere")[0] == 3


def test_top_tells_rates(run: Run, node: str) -> None:
    """What came in between two looks, as a line of JSON each."""
    with subprocess.Popen([*PROGRAM, "top", "--filter", "rates", "--interval", "200ms", "-o", "jsonl", "-a", node], stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["destinations"] == []
        fill(node, "rates", {"acme": 1})
        looks = []
        for line in process.stdout:
            looks += json.loads(line)["destinations"]
            if any(one["in_per_second"] for one in looks):
                break
            if looks:
                fill(node, "rates", {"acme": 5})
        process.send_signal(signal.SIGINT)
    assert looks[0]["in_per_second"] is None and looks[-1]["in_per_second"] > 0
    assert process.returncode == 130


def test_top_on_a_terminal_is_steered_by_keys(node: str) -> None:
    """It is drawn again and again; a destination is looked into and left; q ends it."""
    fill(node, "live.a", {"acme": 4, "beta": 1})
    fill(node, "live.b", {"gamma": 1})
    with Terminal([*PROGRAM, "top", "--filter", "live.*", "--interval", "300ms", "-a", node], {}) as terminal:
        terminal.wait_for(r"2 destinations, 2 with messages: 6 messages")
        terminal.wait_for(r"live\.a +no consumer")
        terminal.wait_for("sorted by age")
        terminal.press("s")
        terminal.wait_for("sorted by backlog")
        terminal.press("\r")
        terminal.wait_for("tenants of 'live.a'")
        terminal.wait_for(r"acme +4 .*80%")
        fill(node, "live.a", {"acme": 95})
        terminal.wait_for(r"acme +99 .*99%")
        terminal.press("\x1b[D")
        terminal.wait_for("live.b")
        terminal.press("\x1b[B")
        terminal.press("\r")
        terminal.wait_for("tenants of 'live.b'")
        terminal.wait_for("gamma")
        terminal.press("q")
        assert terminal.end() == 0
    assert "\x1b[?1049h" in terminal.raw and "\x1b[?1049l" in terminal.raw  # the screen that was there comes back


def test_colours_are_left_out_if_asked(node: str) -> None:
    """NO_COLOR is heeded."""
    for env, coloured in (({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)):
        with Terminal([*PROGRAM, "bench", "produce", "-n", "300", "-d", "colours", "--yes", "-a", node], env) as terminal:
            assert terminal.end() == 0
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.raw)) == coloured, terminal.raw


def test_progress_is_drawn_on_a_terminal_only(node: str, tmp_path: Path) -> None:
    """On standard error, so that what is printed can go on in a pipe."""
    file = tmp_path / "large"
    file.write_text(("x" * 99 + "\n") * 20_000)
    argv = [*PROGRAM, "produce", "large", "-f", str(file), "-o", "jsonl", "-a", node]
    with (tmp_path / "out").open("wb") as out, Terminal(argv, {}, out.fileno()) as terminal:
        terminal.wait_for("sending")
        assert terminal.end() == 0
    assert len(lines((tmp_path / "out").read_text())) == 20_000
    quiet = subprocess.run([*PROGRAM, "bench", "consume", "-d", "large", "--idle", "2s", "--yes", "-a", node], capture_output=True,
                           text=True, check=True, timeout=SECONDS_MAX)
    assert quiet.stderr == "" and quiet.stdout.startswith("consume: 20,000 messages")


def test_the_cluster_is_watched(run: Run, node: str) -> None:
    """On a terminal, as lines of JSON, or until nothing is wrong."""
    assert done(run("cluster", "status", "--until-healthy", "-o", "json"))["problems"] == []
    assert run("cluster", "status", "--watch", "--until-healthy")[0] == 2
    with subprocess.Popen([*PROGRAM, "cluster", "status", "--watch", "--interval", "100ms", "-o", "jsonl", "-a", node],
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130 and {one["cluster"] for one in looks} == {"spillway"}
    assert looks[0]["time"] < looks[1]["time"] < looks[2]["time"]
    with Terminal([*PROGRAM, "cluster", "status", "--watch", "--interval", "100ms", "-a", node], {}) as terminal:
        terminal.wait_for("cluster 'spillway': 1 node, 2 shards")
        terminal.wait_for("cluster 'spillway': 1 node, 2 shards")
        terminal.press("q")
        assert terminal.end() == 0


def test_waiting_for_a_healthy_cluster_ends(run: Run) -> None:
    """With the exit code of one that is not, when the time is up."""
    port, = free_ports(1)
    code, _, err = run("cluster", "status", "--until-healthy", "--timeout", "100ms", "-a", f"127.0.0.1:{port}")
    assert code == 4 and "spillway: " in err


def test_a_monitor_is_told_how_bad_it_is(run: Run, node: str) -> None:
    """By exit code, in its own language."""
    fill(node, "check.a", {"acme": 3})
    assert run("destination", "apply", "check.b")[0] == 0
    mine = ("check", "--filter", "check.*")
    code, out, _ = run(*mine)
    assert code == 0 and out == "ok: 2 destinations looked at, 0 findings\n"
    found = done(run(*mine, "-o", "json"))
    assert (found["status"], found["findings"], found["destinations"]["check.a"]["messages"]) == ("ok", [], 3)
    assert found["destinations"]["check.b"] == {"oldest_age": 0.0, "messages": 0, "dead_letters": 0}
    code, out, _ = run(*mine, "--backlog-warning", "3", "--backlog-critical", "4", "--format", "nagios")
    assert code == 1 and re.fullmatch(
        r"SPILLWAY WARNING - check\.a: 3 messages wait \| age_max=\d+s;;;0 backlog_max=3;3;4;0 dead_max=0;;;0\n", out), out
    code, out, _ = run(*mine, "--age-critical", "1ms", "--backlog-warning", "1")
    assert code == 2 and out.startswith("critical: ") and "its oldest message is" in out and "3 messages wait" in out
    code, out, _ = run(*mine, "--dead-warning", "1", "--format", "prometheus")
    assert code == 0 and "spillway_check_status 0\n" in out and 'spillway_check_messages{destination="check.a"} 3\n' in out
    assert 'spillway_check_dead_letters{destination="check.b"} 0\n' in out
    code, out, _ = run("check", "-a", f"127.0.0.1:{free_ports(1)[0]}", "--format", "nagios")
    assert code == 3 and out.startswith("SPILLWAY UNKNOWN - ")


# -- benchmarks ----------------------------------------------------------------------------------------------------


def test_benchmarks_say_what_they_measured(run: Run) -> None:
    """Everything that was sent is counted, and comes back."""
    made = done(run("bench", "produce", "--count", "1000", "--size", "100", "--tenants", "3", "--keys", "2", "-o", "json"))
    assert (made["result"]["messages"], made["result"]["bytes"], made["result"]["failed"]) == (1000, 100_000, 0)
    assert made["result"]["messages_per_second"] > 0 and made["result"]["stored_ms"]["count"] == 1000
    assert made["settings"]["tenants"] == 3 and made["cluster"]["shards"] == 2 and made["client"]["cores"] >= 1
    assert done(run("tenant", "list", "bench", "-o", "json"))["tenants"][0]["messages"] == 334
    part = done(run("bench", "consume", "--count", "200", "-o", "json"))
    assert 200 <= part["result"]["messages"] < 1000
    rest = done(run("bench", "consume", "--idle", "2s", "-o", "json"))
    assert part["result"]["messages"] + rest["result"]["messages"] == 1000
    code, out, err = run("bench", "produce", "-n", "300")
    assert code == 0 and out.startswith("produce: 300 messages, 300 KiB in ") and "they stay in 'bench'" in err
    found = done(run("bench", "latency", "--rate", "100", "--count", "50", "-o", "json"))["result"]
    assert (found["messages"], found["lost"]) == (50, 0)
    for name in ("stored_ms", "delivered_ms", "settled_ms"):
        assert found[name]["count"] == 50 and 0 < found[name]["p50"] <= found[name]["p99"] <= found[name]["max"]
    assert found["delivered_ms"]["p50"] <= found["settled_ms"]["p50"]
    found = done(run("bench", "fairness", "--tenants", "4", "--rate", "10", "--dump", "500", "--for", "1s", "-o", "json"))["result"]
    assert (found["messages"], found["lost"], found["dump_messages"]) == (80, 0, 500)
    assert found["alone_ms"]["count"] + found["beside_dump_ms"]["count"] == 80 and found["p99_ratio"] > 0
    assert done(run("destination", "stats", "bench", "-o", "json"))["messages"] == 0


def test_a_benchmark_ends_by_time_and_asks_about_what_is_not_its_own(run: Run, node: str) -> None:
    """Messages of others are not taken without a yes."""
    fill(node, "mine", {"acme": 3})
    code, _, err = run("bench", "consume", "-d", "mine", "--idle", "200ms", stdin="n\n")
    assert code == 1 and "destination 'mine' exists" in err
    assert run("bench", "latency", "-d", "mine", stdin="")[0] == 1
    assert done(run("destination", "stats", "mine", "-o", "json"))["messages"] == 3
    assert run("bench", "consume", "-d", "mine", "--idle", "1s", "--yes")[1].startswith("consume: 3 messages")
    begun = time.monotonic()
    made = done(run("bench", "produce", "-n", "100000000", "--for", "1s", "-d", "new", "-o", "json"))["result"]
    assert 0 < made["messages"] < 100_000_000 and made["seconds"] >= 1
    assert time.monotonic() - begun < SECONDS_MAX
    assert run("bench", "produce", "--for", "2h")[0] == 2
    assert run("purge", "new", "--yes")[0] == 0


# -- contexts and completion ---------------------------------------------------------------------------------------


def test_a_context_reaches_the_cluster(run: Run, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By option, variable or selection; a flag wins."""
    monkeypatch.delenv("SPILLWAY_ADDRESS")
    dead = f"127.0.0.1:{free_ports(1)[0]}"
    assert run("context", "add", "alive", "-a", node)[0] == 0
    assert run("context", "add", "dead", "-a", dead, "--select")[0] == 0
    assert run("status", "--context", "alive")[0] == 0
    assert run("status", "-a", node)[0] == 0
    assert run("status")[0] == 4
    monkeypatch.setenv("SPILLWAY_CONTEXT", "alive")
    assert run("status")[0] == 0
    monkeypatch.delenv("SPILLWAY_CONTEXT")
    assert run("context", "select", "alive")[0] == 0 and run("status")[0] == 0
    assert run("context", "select", "-")[0] == 0 and run("status")[0] == 4
    assert run("status", "--context", "-")[0] == 0
    assert [one["context"] for one in done(run("context", "ls", "-o", "json"))] == ["alive", "dead"]
    assert done(run("context", "show", "-o", "json"))["address"] == [dead]
    assert run("context", "rm", "dead", "--yes")[0] == 0 and run("context", "show")[0] == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shell: str) -> None:
    """In the user's home; and the script asks this program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    code, script, _ = run("completion", "show", shell)
    assert code == 0 and "_SPILLWAY_COMPLETE" in script
    installed = done(run("completion", "install", shell, "-o", "json"))
    assert installed["shell"] == shell and script.strip() in Path(installed["file"]).read_text()
    assert Path(installed["file"]).is_relative_to(tmp_path)
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert run("completion", "show")[1] == script
    monkeypatch.setenv("SHELL", "/bin/other")
    code, _, err = run("completion", "show")
    assert code == 2 and "bash, zsh or fish" in err


def test_commands_and_options_are_completed(run: Run) -> None:
    """As bash asks for them; and names of contexts."""
    assert run("context", "add", "prod", "-a", "x:1")[0] == 0
    def completed(words: str) -> list[str]:
        env = {**os.environ, "_SPILLWAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return subprocess.run(PROGRAM, env=env, capture_output=True, text=True, check=True, timeout=SECONDS_MAX).stdout.split()

    assert completed("spillway des") == ["destination"]
    assert completed("spillway ser") == ["serve"]
    assert completed("spillway dead-letter re") == ["redrive"]
    assert completed("spillway top --sor") == ["--sort"]
    assert set(completed("spillway top --sort ")) >= {"age", "backlog", "rate", "name"}
    assert completed("spillway top --context p") == completed("spillway context show ") == ["prod"]


# -- programs that go on -------------------------------------------------------------------------------------------


def started(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A command as a process of its own."""
    return subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})})


def ended(process: subprocess.Popen[str], sig: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Ends it as planned; its exit code and what it printed."""
    process.send_signal(sig)
    try:
        out, err = process.communicate(timeout=SECONDS_MAX)
    finally:
        process.kill()
    return process.returncode, out, err


async def _usable(address: str) -> None:
    async with Client(address) as client:
        await client.wait_ready(SECONDS_MAX)
        await client.admin.create_destination("d")


@pytest.mark.parametrize("command", ["serve", "dev"])
def test_a_node_serves_until_it_is_ended(command: str, tmp_path: Path) -> None:
    """The node of `dev` takes everything with it that it wrote, unless it was told where."""
    ports = [f"127.0.0.1:{port}" for port in free_ports(2)]
    flags = ["--listen", ports[0], "--peer-listen", ports[1]]
    (tmp_path / "tmp").mkdir()
    kept = started("serve", *flags, "--data-dir", str(tmp_path / "data")) if command == "serve" else started(
        "dev", *flags, env={"TMPDIR": str(tmp_path / "tmp")})
    try:
        asyncio.run(asyncio.wait_for(_usable(ports[0]), SECONDS_MAX))
        temporary = list((tmp_path / "tmp").glob("spillway-dev-*"))
    finally:
        code, out, err = ended(kept)
    assert code == 0 and f"serves {ports[0]}" in out, err
    assert bool(temporary) == (command == "dev") and list((tmp_path / "tmp").iterdir()) == []
    assert (tmp_path / "data").exists() == (command == "serve")
    if command == "dev":
        kept = started("dev", *flags, "--data-dir", str(tmp_path / "mine"))
        try:
            asyncio.run(asyncio.wait_for(_usable(ports[0]), SECONDS_MAX))
        finally:
            assert ended(kept, signal.SIGINT)[0] == 0
        assert (tmp_path / "mine").exists()
        assert run_alone("dev", "--shards", "0")[0] == 2


def run_alone(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in a process of its own."""
    process = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    return process.returncode, process.stdout, process.stderr


def test_settings_are_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As serve would take them."""
    monkeypatch.setenv("SPILLWAY_SHARDS", "7")
    assert done(run("config", "--node-id", "n9"))["shards"] == 7
    assert run("config", "--shards", "0")[0] == 2


def test_the_dispatcher_reaches_the_cluster_by_a_context(run: Run, node: str, tmp_path: Path) -> None:
    """And tells its status until it is ended."""
    assert run("context", "add", "here", "-a", node)[0] == 0
    port, = free_ports(1)
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "SPILLWAY_ADDRESS": "127.0.0.1:1"}
    process = started("dispatch", "--context", "here", "--destination", "none", "--status-port", str(port), env=env)
    try:
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)  # polling another process; nothing is assumed of how long it takes
    finally:
        code, _, err = ended(process)
    assert code == 0, err


def test_a_backup_is_written_verified_and_restored(run: Run, node: str, tmp_path: Path) -> None:
    """By the commands alone."""
    fill(node, "kept", {"acme": 2})
    backup = str(tmp_path / "backup")
    found = done(run("backup", backup, "-o", "json"))
    assert found["shards"] == 2 and done(run("backup", "--verify", backup, "-o", "json"))["rows"] == found["rows"]
    code, out, err = run("restore", backup, "--data-dir", str(tmp_path / "data"), "--cluster", "other")
    assert code == 0 and "restored: node n1 of cluster 'other'" in out, err
    assert run("restore", str(tmp_path / "nothing"), "--data-dir", str(tmp_path / "data2"))[0] == 2


# -- exit codes ----------------------------------------------------------------------------------------------------


def test_exit_codes_are_as_the_page_says(run: Run, node: str, tmp_path: Path) -> None:
    """0 done, 1 failed, 2 wrong usage, 3 no such thing, 4 not reachable, 130 interrupted; results and diagnostics apart."""
    code, out, err = run("status")
    assert code == 0 and out and not err
    assert run("destination", "apply", "codes")[0] == 0
    code, out, err = run("purge", "codes", stdin="")
    assert code == 0  # there is nothing to ask about
    fill(node, "codes", {"acme": 1})
    code, out, err = run("purge", "codes", stdin="n\n")
    assert code == 1 and not out and "not confirmed" in err
    for wrong in (("nonsense",), ("status", "--what"), ("tenant",), ("park", "codes", "--for", "soon"),
                  ("peek", "codes", "t", "k", "-n", "0"), ("status", "-a", "nonsense"), ("status", "--context", "none")):
        code, out, err = run(*wrong)
        assert code == 2 and (err or out), wrong
    for missing in (("destination", "show", "none"), ("route", "show", "none"), ("explain", "none"), ("cluster", "undrain", "none")):
        code, out, err = run(*missing)
        assert code == 3 and not out and err.startswith("spillway: "), missing
    assert run("status", "-a", f"127.0.0.1:{free_ports(1)[0]}")[0] == 4
    process = started("consume", "codes", "-a", node)
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    assert ended(process, signal.SIGINT)[0] == 130


# -- nodes that go -------------------------------------------------------------------------------------------------


def test_nodes_are_drained_taken_back_and_removed(run: Run, tmp_path: Path) -> None:
    """Each waits until it is done, and says so."""
    processes = ClusterProcesses(tmp_path, 3, ["--replicas", "1", "--shards", "3"])
    try:
        processes.start()
        at = ("-a", processes.nodes["n1"].address)
        assert done(run("cluster", "drain", "n2", *at, "--wait", "60s", "-o", "json")) == {"node": "n2", "replicas_left": 0}
        code, out, err = run("cluster", "status", *at, "-o", "json")
        assert code in (0, 4), err  # 4: without n2 the cluster stands no failure, which is worth a word
        found = json.loads(out)
        assert [(one["id"], one["state"], one["replicas"]) for one in found["nodes"] if one["id"] == "n2"] == [("n2", "draining", 0)]
        assert json.loads(run("cluster", "stoppable", "n2", *at, "-o", "json")[1])["stoppable"]
        assert run("cluster", "undrain", "n2", *at)[:2] == (0, "node n2 gets replicas again\n")
        processes.nodes["n3"].kill()
        assert run("cluster", "stoppable", "n1", *at)[:2] == (
            4, "node n1 should not be stopped now: no majority without it: the meta group\n")
        processes.nodes["n3"].start()
        assert run("cluster", "stoppable", "n1", *at, "--wait", "60s")[:2] == (0, "node n1 can be stopped\n")
        assert run("cluster", "remove", "n3", *at, stdin="n\n")[0] == 1
        code, out, err = run("cluster", "remove", "n3", "--yes", *at)
        assert code == 0 and out == "node n3 is none of the cluster any more; stop it\n", err
        found = json.loads(run("cluster", "status", *at, "-o", "json")[1])
        assert [one["id"] for one in found["nodes"]] == ["n1", "n2"]
    finally:
        processes.end()
