"""The chart, installed and upgraded by Helm into a real API server: only that can say what it takes, and what the chart finds there.

There are no controllers, so no pods run (tests/pods runs them). It needs the programs `etcd` and `kube-apiserver` in the directory that
SPILLWAY_KUBE_BIN names; tests/README.md says how to build them.
"""
from __future__ import annotations

import base64
import copy
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from demo.ports import free_ports
from tests.helm.chart import PATH, Values, complete, find, render
from tests.helm.test_chart import CASES, CUSTOM

BIN = Path(os.environ.get("SPILLWAY_KUBE_BIN", ""))
TOKEN = "for-tests"
SECONDS_MAX = 120.0
NAMESPACE = "queues"

pytestmark = pytest.mark.skipif(not (BIN / "kube-apiserver").is_file(), reason="SPILLWAY_KUBE_BIN names no directory with kube-apiserver")


class Api:
    """An API server with a store of its own, on loopback."""

    def __init__(self, directory: Path) -> None:
        ports = free_ports(3)
        self.url = f"https://127.0.0.1:{ports[2]}"
        key = directory / "accounts.key"
        key.write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        (directory / "tokens.csv").write_text(f"{TOKEN},admin,1,system:masters\n")
        self._log = (directory / "log").open("wb")
        self._context = ssl.create_default_context()
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE  # it makes its own certificate
        client = f"http://127.0.0.1:{ports[0]}"
        self._processes = [
            self._start("etcd", f"--data-dir={directory / 'etcd'}", f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
                        f"--listen-peer-urls=http://127.0.0.1:{ports[1]}"),
            self._start("kube-apiserver", f"--etcd-servers={client}", "--bind-address=127.0.0.1", f"--secure-port={ports[2]}",
                        f"--cert-dir={directory / 'certificates'}", "--service-account-issuer=https://kubernetes.default.svc",
                        f"--service-account-signing-key-file={key}", f"--service-account-key-file={key}",
                        f"--token-auth-file={directory / 'tokens.csv'}", "--authorization-mode=RBAC",
                        "--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount")]

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([BIN / program, *arguments], stdout=self._log, stderr=self._log)

    def close(self) -> None:
        """Ends both programs."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._log.close()

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """One request; raises urllib.error.HTTPError."""
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), method=method, headers={
            "Authorization": f"Bearer {TOKEN}", "Content-Type": kind})
        with urllib.request.urlopen(request, timeout=30, context=self._context) as response:
            return json.loads(response.read())

    def await_ready(self) -> None:
        """Returns when it serves and has made its first namespaces."""
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            assert all(process.poll() is None for process in self._processes), Path(self._log.name).read_text()[-2000:]
            try:
                self.call("GET", "/api/v1/namespaces/default")
                return
            except (OSError, urllib.error.HTTPError):
                assert time.monotonic() < deadline, Path(self._log.name).read_text()[-2000:]
                time.sleep(0.2)  # polling another process

    def helm(self, namespace: str) -> helm_python.Config:
        """Helm, for one namespace."""
        return helm_python.Config(kube_apiserver=self.url, kube_token=TOKEN, kube_insecure_skip_tls_verify=True, namespace=namespace)

    def restricted(self, name: str) -> str:
        """Makes a namespace that takes only pods of the Pod Security Standard "restricted"."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.call("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        return name


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One for all tests of this file."""
    made = Api(tmp_path_factory.mktemp("kubernetes"))
    try:
        made.await_ready()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("case", [case for case in CASES if not CUSTOM & {one["kind"] for one in render(CASES[case])}])
def test_everything_is_taken(api: Api, case: str) -> None:
    """Every object, and every pod that its controllers would make, where only restricted ones may run."""
    namespace = api.restricted("case-" + "-".join(case.replace(",", "").split()))
    values = complete(CASES[case])
    if "extraContainers" in values:  # theirs is no restricted one
        values = {**values, "extraContainers": []}
    with api.helm(namespace) as helm:
        helm.install(PATH, "queue", values, timeout=60)
        objects = render(values, namespace=namespace)
        templates = [one["spec"]["template"] for one in objects if one["kind"] in ("StatefulSet", "Deployment")]
        for number, template in enumerate([*templates, find(objects, "Pod")]):
            pod = copy.deepcopy(template)
            pod["metadata"] = {**pod["metadata"], "name": f"pod-{number}"}
            pod["spec"].setdefault("volumes", [])
            pod["spec"]["volumes"] += [{"name": "data", "emptyDir": {}}] if "data" in json.dumps(pod["spec"]["containers"]) else []
            if "priorityClassName" in pod["spec"]:
                del pod["spec"]["priorityClassName"]  # there is none of that name
            api.call("POST", f"/api/v1/namespaces/{namespace}/pods", {"apiVersion": "v1", "kind": "Pod", **pod})
        helm.uninstall("queue")
        left = api.call("GET", f"/apis/apps/v1/namespaces/{namespace}/statefulsets")["items"]
        assert not left


def test_what_should_not_be_taken_is_not(api: Api) -> None:
    """The server really looks: at the standard for pods, and at fields."""
    namespace = api.restricted("strict")
    pod = find(render({}, namespace=namespace), "Pod")
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(urllib.error.HTTPError, match="403"):
        api.call("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
    with api.helm(namespace) as helm, pytest.raises(helm_python.HelmError, match=r"spec\.ports"):
        helm.install(PATH, "queue", {"allowInsecure": True, "extraObjects": [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"ports": [{"port": 0}]}}]}, timeout=60)


def test_an_upgrade_finds_what_is_there(api: Api) -> None:
    """It keeps the token; it refuses to end nodes that were not removed, and other founders."""
    namespace = api.restricted("upgrades")
    values: Values = {"allowInsecure": True, "auth": {"mode": "tokens"}, "replicas": 4}

    def token() -> str:
        found = api.call("GET", f"/api/v1/namespaces/{namespace}/secrets/queue-spillway-admin-token")["data"]["token"]
        return base64.b64decode(found).decode()

    with api.helm(namespace) as helm:
        helm.install(PATH, "queue", values, timeout=60)
        first = token()
        assert len(first) == 48
        helm.upgrade(PATH, "queue", {**values, "log": {"level": "debug"}}, timeout=60)
        assert token() == first
        with pytest.raises(helm_python.HelmError, match=r"replicas: 3 would end node queue-spillway-3.*cluster drain queue-spillway-3"):
            helm.upgrade(PATH, "queue", {**values, "replicas": 3}, timeout=60)
        with pytest.raises(helm_python.HelmError, match="founders is 1, and the cluster was founded with founders: 3"):
            helm.upgrade(PATH, "queue", {**values, "founders": 1}, timeout=60)
        helm.upgrade(PATH, "queue", {**values, "replicas": 3, "removedNodes": ["queue-spillway-3"]}, timeout=60)
        found = api.call("GET", f"/apis/apps/v1/namespaces/{namespace}/statefulsets/queue-spillway")
        assert found["spec"]["replicas"] == 3 and found["status"].get("replicas", 0) == 0
        helm.upgrade(PATH, "queue", {**values, "replicas": 3, "founders": 0, "removedNodes": ["queue-spillway-3"]}, timeout=60)
        helm.uninstall("queue")
        assert token() == first  # kept: a new installation on the old volumes has the token that its users know
