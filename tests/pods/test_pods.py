"""The chart's pods, started as rendered, from what the Dockerfile makes: they form a cluster, pass their probes, are restarted, scaled up
and down, and keep what they were given."""
from __future__ import annotations

import base64
import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

from tests.helm.chart import Values, find, render
from tests.pods.container import ROOT, Image, build, missing
from tests.pods.kubelet import Kubelet, Pod, kubelet, until

NAMESPACE = "queues"
VALUES: Values = {"shards": 8, "preStop": {"waitSeconds": 15, "settleSeconds": 1}, "config": {"replace_after_seconds": 3600}}
SPILLWAY = "/opt/spillway/bin/spillway"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """What the Dockerfile makes."""
    directory = tmp_path_factory.mktemp("image")
    if why := missing(directory / "try"):
        pytest.skip(f"there can be no containers here: {why}")
    return build(ROOT / "Dockerfile", directory)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Iterator[Kubelet]:
    """Three pods that are ready."""
    with kubelet(tmp_path_factory.mktemp("cluster"), image) as running:
        running.apply(render(VALUES, namespace=NAMESPACE), NAMESPACE)
        running.await_ready(*[running.start(name) for name in running.replicas()])
        yield running


def spillway(pod: Pod, *arguments: str, stdin: str = "", seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """`kubectl exec POD -- spillway ...`."""
    return pod.container.execute([SPILLWAY, *arguments], seconds, stdin)


def done(pod: Pod, *arguments: str, stdin: str = "", seconds: float = 60.0) -> str:
    """As `spillway`, which must succeed; returns what it printed."""
    ran = spillway(pod, *arguments, stdin=stdin, seconds=seconds)
    assert ran.returncode == 0, f"{arguments} in {pod.name}: {ran.returncode}\n{ran.stdout}{ran.stderr}\n{pod.container.text()}"
    return ran.stdout


def status(pod: Pod) -> Any:
    """The cluster's, as one node sees it."""
    return json.loads(spillway(pod, "cluster", "status", "-o", "json").stdout or "{}")


def all_alive(cluster: Kubelet) -> bool:
    """No liveness probe fails, whatever is going on."""
    return all(cluster.probe(pod, "livenessProbe") == "SERVING" for pod in cluster.pods.values())


@pytest.mark.timeout(900)
def test_a_release_boots_and_its_test_passes(cluster: Kubelet) -> None:
    """Three nodes that call each other by the pods' names, and `helm test` as rendered. Nothing can be written but the volumes."""
    code, said = cluster.run(find(cluster.objects, "Pod"))
    assert code == 0 and "produced, leased and acknowledged" in said, said
    assert all_alive(cluster)
    first = cluster.pods["queue-spillway-0"]
    found = status(first)
    assert {n["id"]: (n["zone"], n["host"]) for n in found["nodes"]} == {
        f"queue-spillway-{i}": (f"zone-{i}", f"machine-{i}") for i in range(3)}
    assert {n["address"] for n in found["nodes"]} == {
        f"queue-spillway-{i}.queue-spillway-nodes.queues.svc.cluster.local:7070" for i in range(3)}
    tried = first.container.execute(["sh", "-c", "id -u; touch /opt/x /etc/x; touch /tmp/x /var/lib/spillway/x && echo written"], 10)
    assert tried.stdout.split() == ["10001", "written"] and tried.stderr.count("Read-only file system") == 2, tried


@pytest.mark.timeout(900)
def test_a_pod_is_replaced_by_one_at_another_address(cluster: Kubelet) -> None:
    """As a rolling upgrade does with each: the hook waits for the others, leaderships go first, and the new pod finds the others, and they
    it, by its name. What was stored before is there."""
    pods = cluster.pods
    done(pods["queue-spillway-0"], "produce", "orders", "--tenant", "acme", "--key", "k", stdin="".join(f"{n}\n" for n in range(50)))
    for name in cluster.replicas():
        before = pods[name].address
        hook, code = cluster.stop(name)
        assert hook.returncode == 0 and f"node {name} can be stopped" in hook.stdout, hook
        assert code == 0
        pod = cluster.start(name)
        cluster.await_ready(pod)
        assert pod.address != before
        until("the others see it", lambda: status(pods["queue-spillway-0"]).get("problems") == [])
    assert all_alive(cluster)
    got = done(pods["queue-spillway-1"], "consume", "orders", "--count", "50", "--idle", "30")
    assert got.split() == [str(n) for n in range(50)]


@pytest.mark.timeout(900)
def test_scaling_up_and_down(cluster: Kubelet) -> None:
    """One pod more joins and gets shards; it is drained and removed, ends, and would not come back with its old volume; then fewer replicas
    are rendered if the value says that it was removed. With an empty volume it joins again."""
    pods = cluster.pods
    done(pods["queue-spillway-0"], "produce", "orders", "--tenant", "acme", stdin="before\n")
    cluster.apply(render({**VALUES, "replicas": 4}, namespace=NAMESPACE), NAMESPACE)
    fourth = cluster.start(cluster.replicas()[3])
    cluster.await_ready(fourth)
    assert fourth.name == "queue-spillway-3"
    until("it has its share", lambda: [n["replicas"] for n in status(fourth).get("nodes", []) if n["id"] == fourth.name] > [0]
          and not any(g["moving"] for g in status(fourth)["groups"]))
    done(pods["queue-spillway-0"], "cluster", "drain", fourth.name, "--wait", "2m", seconds=150)
    assert fourth.container.running and cluster.probe(fourth, "readinessProbe") == "SERVING"
    done(pods["queue-spillway-0"], "cluster", "remove", fourth.name, "--yes", "--wait", "2m", seconds=150)
    assert fourth.container.wait(60) == 0, fourth.container.text()
    again = cluster.start(fourth.name)  # as kubelet does with a container that ended
    assert again.container.wait(60) != 0
    assert "removed" in again.container.text().splitlines()[-1], again.container.text()
    cluster.pods.pop(again.name)
    cluster.apply(render({**VALUES, "replicas": 3, "removedNodes": [fourth.name]}, namespace=NAMESPACE), NAMESPACE)
    assert fourth.name not in cluster.replicas()
    until("all know", lambda: all([n["id"] for n in status(pods[name])["nodes"]] == cluster.replicas() for name in cluster.replicas()))
    assert done(pods["queue-spillway-1"], "consume", "orders", "--count", "1", "--idle", "30") == "before\n"
    cluster.claim("data", fourth.name).rename(cluster.directory / "deleted")  # kubectl delete pvc
    cluster.apply(render({**VALUES, "replicas": 4}, namespace=NAMESPACE), NAMESPACE)
    cluster.await_ready(cluster.start(fourth.name))
    assert all_alive(cluster)


@pytest.mark.timeout(900)
def test_probes_and_the_stop_hook_while_others_are_away(cluster: Kubelet) -> None:
    """With one node away the hook waits, says for what, and gives up in time. Without a majority nodes are alive and not ready; what is
    frozen answers nobody."""
    pods = cluster.pods
    first, second, third = (pods[name] for name in cluster.replicas())
    third.container.end()
    hook = first.container.execute(first.main["lifecycle"]["preStop"]["exec"]["command"], 60)
    assert hook.returncode == 4 and "should not be stopped now: no majority without it: the meta group" in hook.stdout, hook
    second.container.end()
    until("without a majority it is not ready", lambda: cluster.probe(first, "readinessProbe") == "NOT_SERVING")
    assert cluster.probe(first, "livenessProbe") == cluster.probe(first, "startupProbe") == "SERVING"
    again = cluster.start(second.name)
    cluster.await_ready(again)
    cluster.await_ready(first)
    again.container.signal(signal.SIGSTOP)
    assert cluster.probe(again, "livenessProbe") in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    again.container.signal(signal.SIGCONT)
    cluster.await_ready(again)


@pytest.mark.timeout(900)
def test_a_node_alone_grows(tmp_path_factory: pytest.TempPathFactory, image: Image) -> None:
    """To try it out: one pod; later more of them join."""
    values: Values = {**VALUES, "replicas": 1, "founders": 1}
    with kubelet(tmp_path_factory.mktemp("alone"), image) as running:
        running.apply(render(values, namespace=NAMESPACE), NAMESPACE)
        first = running.start("queue-spillway-0")
        running.await_ready(first)
        assert running.run(find(running.objects, "Pod"))[0] == 0
        running.apply(render({**values, "replicas": 3}, namespace=NAMESPACE), NAMESPACE)
        running.await_ready(*[running.start(name) for name in running.replicas()[1:]])
        until("every shard has three replicas", lambda: {len(g["voters"]) for g in status(first).get("groups", [])} == {3})
        hook, code = running.stop("queue-spillway-0")
        assert (hook.returncode, code) == (0, 0)


def secret(name: str, **files: bytes) -> dict[str, Any]:
    """As `kubectl create secret generic` makes it."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
            "data": {file.replace("_", "."): base64.b64encode(content).decode() for file, content in files.items()}}


def certificate(name: str, authority: trustme.CA, *names: str) -> dict[str, Any]:
    """A secret as cert-manager makes it."""
    issued = authority.issue_cert(*names)
    return secret(name, tls_crt=b"".join(one.bytes() for one in issued.cert_chain_pems), tls_key=issued.private_key_pem.bytes(),
                  ca_crt=authority.cert_pem.bytes())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("demanded", [False, True], ids=["tokens", "tokens and certificates"])
def test_a_release_with_tls_and_tokens(tmp_path_factory: pytest.TempPathFactory, image: Image, demanded: bool) -> None:
    """As it should run: nodes know each other by their certificates, clients have tokens, and certificates where they are demanded. Its own
    commands, `helm test` and the stop hook work; nobody without a token does, nor without TLS. One more node joins."""
    clients, peers = trustme.CA(), trustme.CA()
    domain = f"{NAMESPACE}.svc.cluster.local"
    values: Values = {
        **VALUES, "allowInsecure": False, "auth": {"mode": "tokens"},
        "tls": {"clients": {"enabled": True, "secretName": "for-clients", "requireClientCertificate": demanded,
                            "clientSecretName": "client"},
                "peers": {"enabled": True, "secretName": "for-peers"}}}
    secrets = [certificate("for-clients", clients, f"queue-spillway.{domain}", f"*.queue-spillway-nodes.{domain}"),
               certificate("for-peers", peers, *(f"queue-spillway-{n}" for n in range(5))), certificate("client", clients, "a-client")]
    with kubelet(tmp_path_factory.mktemp("tls"), image) as running:
        token = find(render(values, namespace=NAMESPACE), "Secret", "queue-spillway-admin-token")

        def apply(values: Values) -> None:  # as an upgrade does, it finds the token that there is
            rendered = [o for o in render(values, namespace=NAMESPACE) if o["kind"] != "Secret"]
            running.apply([*rendered, token, *secrets], NAMESPACE)
        apply(values)
        running.await_ready(*[running.start(name) for name in running.replicas()])
        code, said = running.run(find(running.objects, "Pod"))
        assert code == 0 and "produced, leased and acknowledged" in said, said
        first = running.pods["queue-spillway-0"]
        assert len(status(first)["nodes"]) == 3
        command = [SPILLWAY, "status"]
        for change, code in (("SPILLWAY_TOKEN_FILE=", 5), ("SPILLWAY_TOKEN_FILE= SPILLWAY_TOKEN=wrong", 5),
                             ("SPILLWAY_TLS_CA= SPILLWAY_TLS_CERT= SPILLWAY_TLS_KEY=", 4)):
            refused = first.container.execute(["env", *change.split(), *command], 60)
            assert refused.returncode == code, refused
        apply({**values, "replicas": 4})
        running.await_ready(running.start("queue-spillway-3"))
        until("it has its share", lambda: [n["replicas"] for n in status(first).get("nodes", []) if n["id"] == "queue-spillway-3"] > [0])
        hook, code = running.stop("queue-spillway-1")
        assert (hook.returncode, code) == (0, 0), hook
