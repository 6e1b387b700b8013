"""What Kubernetes does with the chart's pods, as far as the chart relies on it: names, addresses, volumes, environment, probes, hooks,
stops.

Everything comes from the rendered objects; nothing of the chart is known here. Each pod has a network namespace and an address of its
own, a new one with each start, on a bridge of ours. Names are in a hosts file that all pods share: those of pods behind the headless
service, and that of the clients' service, which stands for the pods that are ready.
"""
from __future__ import annotations

import base64
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helm.chart import Object, find
from tests.pods.container import ROOT, Container, Image, Mount

NETWORK = "10.113"
WAIT_SECONDS = 60.0


def until(what: str, condition: Any, seconds: float = WAIT_SECONDS) -> Any:
    """Polls other processes until a condition holds; returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return found


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _for_service(address: str) -> str:
    """A pod's second address, which the clients' service stands for: resolvers take names of one address in a hosts file for one host."""
    return address.replace(f"{NETWORK}.0.", f"{NETWORK}.1.")


class Pod:
    """One pod that runs."""

    def __init__(self, name: str, spec: Object, labels: dict[str, str], address: str, container: Container) -> None:
        self.name = name
        self.spec = spec
        self.labels = labels
        self.address = address
        self.container = container
        self.ready = False

    @property
    def main(self) -> Object:
        """Its container, as rendered."""
        return self.spec["containers"][0]  # type: ignore[no-any-return]


class Kubelet:
    """Runs pods. One for a test, closed at its end."""

    def __init__(self, directory: Path, image: Image) -> None:
        self.directory = directory
        self.image = image
        self.pods: dict[str, Pod] = {}
        self.objects: list[Object] = []
        self._name = f"spillway-helm-{os.getpid()}"
        self._namespaces: list[str] = []
        self._addresses = (f"{NETWORK}.0.{n}" for n in range(2, 255))
        self._starts = itertools.count(1)
        self._hosts = directory / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        self._resolv = directory / "resolv.conf"
        self._resolv.write_text("options ndots:1 attempts:1 timeout:1\n")
        self._bridge = self._namespace("bridge")
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        own = self._namespace("kubelet")
        self._connect(own, f"{NETWORK}.0.1")
        self._prober = subprocess.Popen(["ip", "netns", "exec", own, sys.executable, "-m", "tests.pods.prober"], cwd=ROOT,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """Ends everything."""
        for pod in self.pods.values():
            pod.container.end()
        self._prober.kill()
        self._prober.communicate()
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    # -- network ---------------------------------------------------------------------------------------------------

    def _namespace(self, name: str) -> str:
        namespace = f"{self._name}-{name}"
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        return namespace

    def _connect(self, namespace: str, address: str) -> None:
        number = address.rpartition(".")[2]
        _ip("-n", self._bridge, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._bridge, "link", "set", f"p{number}", "master", "bridge", "up")
        for one in (address, _for_service(address)):
            _ip("-n", namespace, "addr", "add", f"{one}/16", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _name_pods(self) -> None:
        """Writes the names that there are now, into the same file: pods have it mounted."""
        lines = ["127.0.0.1 localhost"]
        for service in (o for o in self.objects if o["kind"] == "Service"):
            name, spec = service["metadata"]["name"], service["spec"]
            for pod in self.pods.values():
                if not spec["selector"].items() <= pod.labels.items():
                    continue
                if spec.get("clusterIP") == "None" and (pod.ready or spec.get("publishNotReadyAddresses")):
                    lines.append(f"{pod.address} {pod.name}.{name}.{self.domain}")
                elif spec.get("clusterIP") != "None" and pod.ready:
                    lines.append(f"{_for_service(pod.address)} {name}.{self.domain}")
        self._hosts.write_text("\n".join(lines) + "\n")

    # -- objects ---------------------------------------------------------------------------------------------------

    def apply(self, objects: list[Object], namespace: str, domain: str = "cluster.local") -> None:
        """Takes the objects in. Pods are started and stopped by the caller, as `replicas` says."""
        self.objects = objects
        self.domain = f"{namespace}.svc.{domain}"

    def replicas(self) -> list[str]:
        """Names of the pods that the StatefulSet wants."""
        stateful = find(self.objects, "StatefulSet")
        return [f"{stateful['metadata']['name']}-{n}" for n in range(stateful["spec"]["replicas"])]

    def start(self, name: str) -> Pod:
        """Starts one pod of the StatefulSet; does not wait."""
        template = find(self.objects, "StatefulSet")["spec"]["template"]
        return self._start(name, template["spec"], template["metadata"]["labels"])

    def _start(self, name: str, spec: Object, labels: dict[str, str]) -> Pod:
        start = next(self._starts)
        address = next(self._addresses)
        namespace = self._namespace(f"{name}-{start}")
        self._connect(namespace, address)
        container = spec["containers"][0]
        user = spec["securityContext"]["runAsUser"]
        assert container["securityContext"]["readOnlyRootFilesystem"] and spec["securityContext"]["fsGroup"] == user
        environment = self._environment(name, spec, labels, container)
        command, arguments = (container["command"], []) if "command" in container else (self.image.entrypoint, self.image.command)
        argv = [self._expand(text, environment) for text in [*command, *container.get("args", arguments)]]
        mounts = [Mount("/etc/hosts", self._hosts, True), Mount("/etc/resolv.conf", self._resolv, True)]
        for one in container["volumeMounts"]:
            mounts.append(Mount(one["mountPath"], self._volume(name, spec, one["name"], user), one.get("readOnly", False)))
        pod = self.pods[name] = Pod(name, spec, labels, address, Container(
            self.directory / f"{name}.{start}", self.image, namespace, name, argv, environment, mounts, user,
            self.directory / f"{name}.log"))
        self._name_pods()
        until(f"{name} has a process", lambda: pod.container.pid or not pod.container.running)
        return pod

    def _environment(self, name: str, spec: Object, labels: dict[str, str], container: Object) -> dict[str, str]:
        assert spec["enableServiceLinks"] is False
        environment: dict[str, str] = {}
        for one in container.get("env", []):
            if "value" in one:
                environment[one["name"]] = self._expand(one["value"], environment)
                continue
            path = one["valueFrom"]["fieldRef"]["fieldPath"]
            if (label := re.fullmatch(r"metadata\.labels\['(.+)'\]", path)) is not None:
                zone = {"topology.kubernetes.io/zone": f"zone-{name[-1]}"}  # as the scheduler's admission does
                environment[one["name"]] = {**zone, **labels}.get(label[1], "")
            else:
                environment[one["name"]] = {"metadata.name": name, "spec.nodeName": f"machine-{name[-1]}"}[path]
        return environment

    @staticmethod
    def _expand(text: str, environment: dict[str, str]) -> str:
        return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: environment.get(found[1], found[0]), text)

    def _volume(self, pod: str, spec: Object, name: str, group: int) -> Path | None:
        """A volume's directory on this machine; None for an empty one."""
        for claim in find(self.objects, "StatefulSet")["spec"]["volumeClaimTemplates"]:
            if claim["metadata"]["name"] == name:
                path = self.claim(name, pod)
                if not path.exists():
                    (path / "lost+found").mkdir(parents=True)  # as a new file system has
                    (path / "lost+found").chmod(0o700)
                    os.chown(path, 0, group)
                    path.chmod(0o2770)  # fsGroup
                return path
        volume = next(v for v in spec["volumes"] if v["name"] == name)
        if "emptyDir" in volume:
            return None
        path = self.directory / "volumes" / f"{pod}.{name}"
        path.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            content = {k: v.encode() for k, v in find(self.objects, "ConfigMap", volume["configMap"]["name"])["data"].items()}
        else:
            secret = find(self.objects, "Secret", volume["secret"]["secretName"])
            content = {**{k: base64.b64decode(v) for k, v in secret.get("data", {}).items()},
                       **{k: v.encode() for k, v in secret.get("stringData", {}).items()}}
            if items := volume["secret"].get("items"):
                content = {item["path"]: content[item["key"]] for item in items}
        for file, data in content.items():
            (path / file).write_bytes(data)
            os.chown(path / file, 0, group)
            (path / file).chmod(volume.get("secret", {}).get("defaultMode", 0o644))
        return path

    def claim(self, name: str, pod: str) -> Path:
        """Where a claimed volume is."""
        return self.directory / "claims" / f"{name}-{pod}"

    # -- the life of a pod -----------------------------------------------------------------------------------------

    def probe(self, pod: Pod, which: str) -> str:
        """One probe, as the pod's spec has it."""
        probe = pod.main[which]
        assert self._prober.stdin is not None and self._prober.stdout is not None
        print(f"{pod.address}:{probe['grpc']['port']} {probe['grpc']['service']} {probe['timeoutSeconds']}", file=self._prober.stdin,
              flush=True)
        return self._prober.stdout.readline().strip()

    def await_ready(self, *pods: Pod) -> None:
        """Waits until pods have started and are ready, by their probes; then the service stands for them, too."""
        for pod in pods:
            for which in ("startupProbe", "readinessProbe"):
                def passes(pod: Pod = pod, which: str = which) -> bool:
                    assert pod.container.running, f"{pod.name} ended:\n{pod.container.text()}"
                    return self.probe(pod, which) == "SERVING"
                until(f"{which} of {pod.name} passes", passes)
            pod.ready = True
            self._name_pods()

    def stop(self, name: str) -> tuple[subprocess.CompletedProcess[str], int]:
        """Stops a pod as a deletion does: out of the service, preStop, SIGTERM. Returns what the hook did, and the exit code; raises
        subprocess.TimeoutExpired if both together took longer than they may."""
        pod = self.pods[name]
        pod.ready = False  # its own name stays as long as it runs
        self._name_pods()
        patience = pod.spec["terminationGracePeriodSeconds"]
        begun = time.monotonic()
        hook = pod.container.execute(pod.main["lifecycle"]["preStop"]["exec"]["command"], patience)
        pod.container.signal(signal.SIGTERM)
        try:
            return hook, pod.container.wait(patience - (time.monotonic() - begun))
        finally:
            pod.container.end()
            del self.pods[name]
            self._name_pods()

    def run(self, pod: Object) -> tuple[int, str]:
        """Runs a pod that ends by itself, a hook of Helm's; returns its exit code and what it printed."""
        name = pod["metadata"]["name"]
        started = self._start(name, pod["spec"], pod["metadata"]["labels"])
        try:
            return started.container.wait(WAIT_SECONDS), started.container.text()
        finally:
            started.container.end()
            del self.pods[name]
            started.container.log.unlink()


@contextmanager
def kubelet(directory: Path, image: Image) -> Iterator[Kubelet]:
    """A Kubelet that is closed in every case."""
    made = Kubelet(directory, image)
    try:
        yield made
    finally:
        made.close()
