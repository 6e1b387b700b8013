"""Alerts and dashboards: that Prometheus takes them, that they fire when they should and only then, and that they name what there is."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from spillway.broker.telemetry import registry
from spillway.client.dispatcher import metrics as dispatcher
from spillway.contract.telemetry.metrics import Metric

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "helm/spillway/rules/spillway.yaml"
BOARDS = sorted((ROOT / "helm/spillway/dashboards").glob("*.json"))
PROMTOOL = shutil.which("promtool")
METRICS = {m.name: m for m in (*registry.ALL, *dispatcher.ALL)}
OF_THE_SCRAPE = {"instance", "job"}  # labels that Prometheus adds
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")


def promtool(*argv: str | Path) -> str:
    """What it prints. Fails if it does."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def queries() -> list[tuple[str, str]]:
    """(where, PromQL) of all rules and dashboards; variables and Grafana's interval filled in."""
    found = [(f"{RULES.name} {name}", expr) for name, expr in re.findall(r"- alert: (\w+)\n +expr: >-\n +(.+)", RULES.read_text())]
    for board in BOARDS:
        for panel in json.loads(board.read_text())["panels"]:
            found += [(f"{board.name} {panel['title']}", t["expr"].replace("$__rate_interval", "5m")) for t in panel.get("targets", ())]
    return found


def metric_of(series: str) -> Metric | None:
    """The metric that a series' name is of."""
    if series in METRICS:
        return METRICS[series]
    base = re.sub(r"_(bucket|sum|count)$", "", series)
    return METRICS[base] if base in METRICS and METRICS[base].kind == "histogram" else None


@needs_promtool
def test_prometheus_takes_the_rules() -> None:
    """As they stand in the file."""
    assert "SUCCESS" in promtool("check", "rules", RULES)


@needs_promtool
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    """With all in order none does; with all wrong for two hours each does."""
    promtool("test", "rules", Path(__file__).with_name("rules.yaml"))
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert sorted(alerts) == re.findall(r'alertname="(\w+)"', Path(__file__).with_name("rules.yaml").read_text())


@needs_promtool
def test_prometheus_takes_the_dashboards_queries(tmp_path: Path) -> None:
    """Each of them is PromQL."""
    rules = tmp_path / "rules.yaml"
    lines = ["groups:", "  - name: dashboards", "    rules:"]
    for i, (_, expr) in enumerate(queries()):
        lines += [f"      - record: a:b{i}", "        expr: >-", f"          {expr}"]
    rules.write_text("\n".join(lines) + "\n")
    promtool("check", "rules", rules)


def test_they_name_metrics_and_labels_that_there_are() -> None:
    """Every series is one of a metric, and what it is selected by is a label of that, with a value that there can be."""
    seen = set()
    for where, expr in queries():
        for name, selector in re.findall(r"\b((?:spillway|process)_\w+)(?:\{([^}]*)\})?", expr):
            metric = metric_of(name)
            assert metric is not None, f"{where}: there is no {name}"
            seen.add(metric.name)
            labels = {*re.findall(r"(\w+)\s*[=!]~?", selector)}
            assert labels <= {*metric.labels, *OF_THE_SCRAPE}, f"{where}: {name} has no {labels}"
        for by in re.findall(r"by \(([^)]*)\)", expr):
            known = {label for m in METRICS.values() for label in m.labels} | OF_THE_SCRAPE | {"le"}
            assert {part.strip() for part in by.split(",")} <= known, f"{where}: by {by}"
    assert len(seen) > 40


def test_every_alert_says_where_to_go_on_reading() -> None:
    """And what is the matter, for how long, and how bad it is."""
    text = RULES.read_text()
    count = len(re.findall(r"- alert: Spillway\w+\n", text))
    assert count == len(re.findall(r"runbook_url: docs/runbook\.md#[a-z-]+\n", text))
    assert count == len(re.findall(r"severity: (critical|warning)\n", text)) == len(re.findall(r" summary: '.+'\n", text))


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_a_dashboard_is_whole(board: Path) -> None:
    """It has an id, a choice of data source, and panels that say what they answer and do not lie over each other."""
    found = json.loads(board.read_text())
    assert found["uid"] == f"spillway-{board.stem}"
    assert [v["name"] for v in found["templating"]["list"]][:2] == ["datasource", "job"]
    panels = [p for p in found["panels"] if p["type"] != "row"]
    assert len({p["id"] for p in found["panels"]}) == len(found["panels"])
    assert all(p["description"] and p["targets"] for p in panels)
    places = [(p["gridPos"]["x"] // 8, y) for p in panels for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])]
    assert len(set(places)) == len(places)
