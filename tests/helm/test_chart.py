"""The chart as Helm renders it: valid for Kubernetes, for every kind of values, and refusing what would do harm."""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from spillway.broker.app import STOP_GRACE_SECONDS
from spillway.broker.config import load, members_of
from spillway.broker.core.directory import NODES_MAX
from spillway.cluster.raft.host import STOP_SECONDS
from spillway.contract.version import VERSION

from tests.helm.chart import PATH, Values, chart, complete, find, kinds, render

ROOT = PATH.parents[1]
KUBERNETES = ("1.27", "1.32", "1.37")
CUSTOM = {"Certificate", "PodMonitor", "PrometheusRule", "ServiceMonitor"}
ISSUER = {"certManager": {"issuerRef": {"name": "ca", "kind": "ClusterIssuer", "group": "cert-manager.io"}}}
ALL_TLS: Values = {"allowInsecure": False,
                   "tls": {**ISSUER, "clients": {"enabled": True, "requireClientCertificate": True, "extraDnsNames": ["queue.example.com"]},
                           "peers": {"enabled": True}}}
CASES: dict[str, Values] = {
    "defaults": {},
    "one node": {"replicas": 1, "founders": 1, "shardReplicas": 1},
    "one that grew": {"replicas": 3, "founders": 1},
    "seven": {"replicas": 7, "founders": 5, "shardReplicas": 5},
    "grown up": {"replicas": 5, "founders": 0},
    "tls by cert-manager": ALL_TLS,
    "tls by secrets": {"allowInsecure": False,
                       "tls": {"clients": {"enabled": True, "secretName": "a", "requireClientCertificate": True, "clientSecretName": "b"},
                               "peers": {"enabled": True, "secretName": "c"}}},
    "tokens": {"auth": {"mode": "tokens"}},
    "tokens and keys": {"auth": {"mode": "tokens", "adminTokenSecret": "admin",
                                 "jwt": {"jwksSecret": "keys", "issuer": "i", "audience": "a"}}},
    "tls and tokens": {"allowInsecure": False, "auth": {"mode": "tokens"},
                       "tls": {"clients": {"enabled": True, "secretName": "a"}, "peers": {"enabled": True, "secretName": "c"}}},
    "metrics": {"metrics": {"enabled": True, "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
                            "prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}}},
    "tracing": {"tracing": {"otlpEndpoint": "http://collector:4318", "sampleRatio": 0.01}, "log": {"level": "debug", "format": "json"}},
    "dispatcher": {"dispatcher": {"enabled": True, "destinations": ["billing", "crm*"], "extraArgs": ["--log-level", "debug"]}},
    "dispatcher that scales, over tls": {**ALL_TLS, "auth": {"mode": "tokens"},
                                         "metrics": {"enabled": True, "serviceMonitor": {"enabled": True}},
                                         "dispatcher": {"enabled": True, "tokenSecret": "dispatchers",
                                                        "autoscaling": {"enabled": True, "maxReplicas": 30}}},
    "network": {"networkPolicy": {"clientsFrom": [{"namespaceSelector": {"matchLabels": {"queue": "yes"}}}], "egress": True,
                                  "metricsFrom": [{"namespaceSelector": {}}], "extraEgress": [{"ports": [{"port": 4318}]}]},
                "metrics": {"enabled": True}, "service": {"type": "LoadBalancer", "annotations": {"a": "b"}, "port": 443}},
    "no policy": {"networkPolicy": {"enabled": False}, "serviceAccount": {"create": False, "name": "mine"}},
    "placement": {"topology": {"zoneSpread": "DoNotSchedule", "host": False, "zoneLabel": ""}, "nodeSelector": {"disk": "fast"},
                  "tolerations": [{"key": "queue", "operator": "Exists"}], "priorityClassName": "high",
                  "affinity": {"nodeAffinity": {}}, "podLabels": {"team": "a"}, "podAnnotations": {"b": "c"}},
    "volumes": {"persistence": {"size": "1Ti", "storageClass": "fast", "accessModes": ["ReadWriteOncePod"], "annotations": {"a": "b"},
                                "whenDeleted": "Delete", "whenScaled": "Delete"}},
    "names": {"fullnameOverride": "q", "clusterName": "orders", "clusterDomain": "k8s.example", "listenHost": "[::]",
              "ports": {"client": 17070, "peer": 17071, "probe": 17072}, "image": {"digest": "sha256:" + "0" * 64},
              "imagePullSecrets": [{"name": "registry"}]},
    "settings": {"config": {"payload_bytes_max": 1048576, "ingress_bytes_max": 134217728, "auto_create": False}},
    "escape hatches": {"extraArgs": ["--log-level=debug"], "extraEnv": [{"name": "A", "value": "b"}],
                       "extraVolumes": [{"name": "x", "emptyDir": {}}], "extraVolumeMounts": [{"name": "x", "mountPath": "/x"}],
                       "extraContainers": [{"name": "y", "image": "y"}],
                       "podSpec": {"dnsConfig": {"options": [{"name": "ndots", "value": "2"}]}, "hostNetwork": False},
                       "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}}]},
}


@pytest.mark.parametrize("case", CASES)
def test_lint(case: str) -> None:
    """Helm itself finds nothing to say against it, on the oldest and the newest Kubernetes."""
    for version in ("v1.27.0", "v1.37.0"):
        report = helm_python.lint(PATH, complete(CASES[case]), strict=True, kube_version=version)
        assert not report["errors"] and not [m for m in report["messages"] if m["severity"] > 1], report


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_every_object(case: str, version: str) -> None:
    """Strictly by its schemas: no unknown field, no wrong type. Custom resources have schemas of their own operators."""
    for one in render(CASES[case]):
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


def test_what_an_installation_makes() -> None:
    """Neither less nor more."""
    assert kinds(render()) == ["ConfigMap", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Service", "Service", "ServiceAccount",
                               "StatefulSet"]
    more = kinds(render({**ALL_TLS, "auth": {"mode": "tokens"}, "metrics": {"enabled": True, "serviceMonitor": {"enabled": True}},
                         "dispatcher": {"enabled": True, "tokenSecret": "a", "autoscaling": {"enabled": True}}}))
    assert {"Secret", "ServiceMonitor", "PodMonitor", "Deployment", "HorizontalPodAutoscaler"} <= set(more)
    assert more.count("Certificate") == 3


# -- what nodes are told -----------------------------------------------------------------------------------------------


def files(values: Values, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """(ordinal, file) of every node's settings."""
    name = find(render(values), "StatefulSet")["metadata"]["name"]
    for file, text in find(render(values), "ConfigMap", name)["data"].items():
        path = tmp_path / file
        path.write_text(text)
        yield int(re.fullmatch(rf"{name}-(\d+)\.toml", file)[1]), path  # type: ignore[index]


@pytest.mark.parametrize("case", CASES)
def test_the_broker_takes_the_settings(case: str, tmp_path: Path) -> None:
    """Of every node that there may ever be, by the broker's own checks."""
    values = CASES[case]
    founders = values.get("founders", 3)
    names = {}
    for ordinal, path in files(values, tmp_path):
        config = load(["--config", str(path)], {})
        names[ordinal] = config.node_id
        if ordinal >= founders:
            assert config.join and not config.peers and config.advertise
        elif founders == 1:
            assert not config.join and not config.peers and config.advertise
        else:
            assert len(members_of(config)) == founders and config.node_id in members_of(config)
    assert sorted(names) == list(range(NODES_MAX)) and len(set(names.values())) == NODES_MAX


def test_settings_that_the_values_name(tmp_path: Path) -> None:
    """Numbers stay whole, however large, and what is said once counts."""
    values = {**CASES["settings"], "clusterName": "orders", "shards": 64, "log": {"level": "warning"}}
    config = load(["--config", str(next(files(values, tmp_path))[1])], {})
    assert (config.payload_bytes_max, config.ingress_bytes_max, config.auto_create) == (1048576, 134217728, False)
    assert (config.cluster, config.shards, config.log_level) == ("orders", 64, "warning")
    assert config.data_dir.startswith("/var/lib/spillway/"), "a volume's lost+found must not be in the data directory"


def test_one_more_node_changes_nothing_for_the_others() -> None:
    """Nor does another version of the chart: neither restarts pods that need not be."""
    one, more = (find(render({"replicas": n}), "StatefulSet")["spec"] for n in (3, 5))
    assert {**one, "replicas": 5} == more
    text = json.dumps({k: v for k, v in one.items() if k in ("selector", "volumeClaimTemplates", "serviceName")})
    assert chart().version not in text and "helm.sh/chart" not in json.dumps(one) and "app.kubernetes.io/version" not in json.dumps(one)


def test_peers_certificate_names_every_node(tmp_path: Path) -> None:
    """By its id, and where others reach it, also those that do not run yet."""
    objects = render(ALL_TLS)
    names = find(objects, "Certificate", "queue-spillway-peers-tls")["spec"]["dnsNames"]
    for ordinal, path in files(ALL_TLS, tmp_path):
        settings = tomllib.loads(path.read_text())
        host = (settings.get("advertise") or settings["peers"][ordinal].partition("=")[2]).partition(":")[0]
        assert settings["node_id"] in names and host in names
    clients = find(objects, "Certificate", "queue-spillway-clients-tls")["spec"]["dnsNames"]
    assert {"queue-spillway.queues.svc.cluster.local", "*.queue-spillway-nodes.queues.svc.cluster.local",
            "queue.example.com"} <= set(clients)


def pods(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Specs of all pods."""
    for one in objects:
        if one["kind"] in ("StatefulSet", "Deployment"):
            yield one["spec"]["template"]["spec"]
        elif one["kind"] == "Pod":
            yield one["spec"]


@pytest.mark.parametrize("case", CASES)
def test_pods_are_restricted(case: str) -> None:
    """As Kubernetes' Pod Security Standard "restricted" wants it, with a read-only root besides."""
    for pod in pods(render(CASES[case])):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        mounted = {v["name"] for v in pod["volumes"]} | {"data"}
        for container in pod["containers"][:1]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {m["name"] for m in container["volumeMounts"]} <= mounted
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]


def test_a_stop_has_the_time_that_it_may_take() -> None:
    """The hook's patience and the broker's own, and some to spare."""
    spec = find(render(), "StatefulSet")["spec"]["template"]["spec"]
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    wait = int(command[command.index("--wait") + 1].removesuffix("s"))
    assert spec["terminationGracePeriodSeconds"] >= wait + 2 * (STOP_SECONDS + STOP_GRACE_SECONDS)
    probe = spec["containers"][0]["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 60


def test_monitoring_takes_what_the_folders_have(tmp_path: Path) -> None:
    """Rules and dashboards as they are, templates of their own untouched; nothing while there are none."""
    import shutil

    copy = tmp_path / "spillway"
    shutil.copytree(PATH, copy)
    for folder in ("rules", "dashboards"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    values = {"metrics": {"enabled": True, "prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}}}

    def made() -> list[dict[str, Any]]:
        with helm_python.Chart.load(copy) as loaded:
            rendered = loaded.render(complete(values), name="q", namespace="n")
        return [one for one in yaml.safe_load_all(rendered["spillway/templates/monitoring.yaml"]) if one]
    assert not made()
    rule = {"alert": "Stuck", "expr": "a > 1", "annotations": {"summary": "{{ $labels.destination }} is stuck"}}
    (copy / "rules").mkdir()
    (copy / "rules" / "spillway.yaml").write_text(yaml.safe_dump({"groups": [{"name": "spillway", "rules": [rule]}]}))
    (copy / "dashboards").mkdir()
    (copy / "dashboards" / "overview.json").write_text('{"title": "{{x}}"}')
    found = made()
    assert find(found, "PrometheusRule")["spec"]["groups"][0]["rules"] == [rule]
    assert find(found, "ConfigMap")["data"] == {"overview.json": '{"title": "{{x}}"}'}


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "why"), [
    ({"replicsa": 3}, "replicsa"),
    ({"image": {"tagg": "1"}}, "tagg"),
    ({"dispatcher": {"autoscaling": {"max": 3}}}, "max"),
    ({"replicas": 15}, "replicas"),
    ({"replicas": "3"}, "replicas"),
    ({"founders": 8}, "founders"),
    ({"persistence": {"size": "big"}}, "size"),
    ({"persistence": {"accessModes": ["ReadWriteMany"]}}, "accessModes"),
    ({"clusterName": "a b"}, "clusterName"),
    ({"ports": {"client": 0}}, "client"),
    ({"topology": {"zoneSpread": "Maybe"}}, "zoneSpread"),
    ({"image": {"digest": "sha256:1"}}, "digest"),
    ({"auth": {"mode": "password"}}, "mode"),
    ({"tracing": {"sampleRatio": 2}}, "sampleRatio"),
    ({"config": {"Payload": 1}}, "Payload"),
    ({"config": {"peers": [{}]}}, "peers"),
    ({"log": {"level": "trace"}}, "level"),
    ({"serviceAccount": {"annotations": {"a": 1}}}, "annotations"),
])
def test_the_schema_refuses(values: Values, why: str) -> None:
    """What is misspelt, of a wrong type or out of bounds, by name."""
    with pytest.raises(helm_python.HelmValuesError, match=why):
        render(values)


@pytest.mark.parametrize(("values", "why"), [
    ({"replicas": 2}, "replicas is 2 and founders is 3.*set both to 1.*set founders to 0"),
    ({"removedNodes": ["other-3"]}, 'removedNodes has "other-3".*queue-spillway-0'),
    ({"removedNodes": ["queue-spillway-2"]}, "replicas: 3 runs it.*data-queue-spillway-2"),
    ({"tls": {"clients": {"enabled": True}}}, "tls.clients.secretName.*issuerRef"),
    ({"tls": {"peers": {"enabled": True}}}, "tls.peers.secretName.*issuerRef"),
    ({"tls": {"clients": {"enabled": True, "secretName": "a", "requireClientCertificate": True}}}, "clientSecretName"),
    ({"auth": {"jwt": {"jwksSecret": "a"}}}, "set auth.mode to tokens"),
    ({"config": {"peers": "a"}}, "config.peers: the chart sets it itself"),
    ({"config": {"listen": "a"}}, "config.listen: the chart sets it itself"),
    ({"terminationGracePeriodSeconds": 60}, "with preStop.waitSeconds 60 it must be at least 80"),
    ({"preStop": {"waitSeconds": 1}}, "settleSeconds is more"),
    ({"metrics": {"serviceMonitor": {"enabled": True}}}, "set metrics.enabled"),
    ({"dispatcher": {"enabled": True}, "auth": {"mode": "tokens"}}, "spillway token create.*dispatcher.tokenSecret"),
    ({"allowInsecure": False}, "tls.clients is not enabled.*tls.clients.enabled.*allowInsecure"),
    ({"allowInsecure": False, "tls": {"clients": {"enabled": True, "secretName": "a"}}}, "tls.peers is not enabled.*allowInsecure"),
    ({"allowInsecure": False, "tls": {"clients": {"enabled": True, "secretName": "a"}, "peers": {"enabled": True, "secretName": "b"}}},
     "auth.mode to tokens.*tls.clients.requireClientCertificate.*allowInsecure"),
    ({"dispatcher": {"enabled": True, "autoscaling": {"enabled": True, "minReplicas": 20}}}, "maxReplicas is less"),
])
def test_the_templates_refuse(values: Values, why: str) -> None:
    """What only together makes no sense, with the remedy."""
    with pytest.raises(helm_python.HelmRenderError, match=re.compile(why, re.DOTALL)):
        render(values)


# -- what is documented --------------------------------------------------------------------------------------------------


def test_every_value_is_documented() -> None:
    """The README's table is that of values.yaml, which describes every value."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "helm_values.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def leaves(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths of what a schema describes that is no map of named values."""
    for name, one in schema["properties"].items():
        if "properties" in one:
            yield from leaves(one, f"{path}{name}.")
        else:
            yield path + name


def test_the_schema_knows_every_value_and_no_other() -> None:
    """Every map of named values is closed."""
    schema = json.loads((PATH / "values.schema.json").read_text())
    values = yaml.safe_load((PATH / "values.yaml").read_text())

    def look(path: str) -> Any:
        found = values
        for name in path.split("."):
            found = found[name]
        return found
    for path in leaves(schema):
        if path != "global" and not path.startswith(("resources.", "dispatcher.resources.", "tls.certManager.issuerRef.")):
            look(path)

    def closed(one: dict[str, Any], where: str) -> None:
        if "properties" in one:
            assert one["additionalProperties"] is False, where
            for name, inner in one["properties"].items():
                closed(inner, f"{where}.{name}")
    closed(schema, "values")


def test_notes_say_what_comes_next() -> None:
    """Three commands, with the names of this release."""
    notes = chart().render(complete({}), name="queue", namespace="queues")["spillway/templates/NOTES.txt"]
    assert [line.split()[0] for line in notes.splitlines() if line.startswith("   ")] == ["kubectl", "helm", "kubectl"]
    assert "statefulset/queue-spillway" in notes and "-n queues test queue" in notes


def test_the_charts_version_of_spillway() -> None:
    """Is this one: the image's tag."""
    assert chart().metadata["appVersion"] == VERSION
