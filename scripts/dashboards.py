"""Grafana dashboards, as what they show: rows of panels with their queries. `scripts/observability.py` writes the JSON."""
from __future__ import annotations

import json
from typing import Any

NODES = 'job=~"$job", instance=~"$instance"'
OF = 'job=~"$job", destination=~"$destination"'
WIDTH, HEIGHT = 8, 7
Query = tuple[str, str]  # PromQL, legend
Panel = tuple[str, str, str, list[Query]]  # title, what it answers, unit as Grafana has it, queries


def quantiles(metric: str, labels: str, by: str = "") -> list[Query]:
    """Median, p99 of a histogram."""
    of = f"{by}, le" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return [(f"histogram_quantile({q}, sum by ({of}) (rate({metric}_bucket{{{labels}}}[$__rate_interval])))", f"{legend}p{q * 100:g}")
            for q in (0.5, 0.99)]


def rate(metric: str, labels: str, by: str, legend: str = "", more: str = "") -> Query:
    """Per second."""
    return f"sum by ({by}) (rate({metric}{{{labels}{more}}}[$__rate_interval]))", legend or f"{{{{{by}}}}}"


CLUSTER: list[tuple[str, list[Panel]]] = [
    ("How it is", [
        ("Nodes", "Who is there, in which version?", "none", [(f"spillway_node_info{{{NODES}}}", "{{node}} {{version}}")]),
        ("Shards without a leader", "Is a part of the queues out of reach?", "none",
         [(f"max(spillway_raft_leaderless_groups{{{NODES}}})", "shards")]),
        ("Peers connected", "Is the network between nodes whole?", "none", [(f"spillway_raft_peers_connected{{{NODES}}}", "{{instance}}")]),
        ("Stored and acknowledged", "Does as much go as comes?", "cps",
         [(f"sum(rate(spillway_messages_enqueued_total{{{NODES}}}[$__rate_interval]))", "stored"),
          (f"sum(rate(spillway_messages_acked_total{{{NODES}}}[$__rate_interval]))", "acknowledged"),
          (f"sum(rate(spillway_messages_leased_total{{{NODES}}}[$__rate_interval]))", "leased")]),
        ("Messages", "How deep is the backlog, and is it moving or parked?", "short",
         [(f"sum by (state) (spillway_messages{{{NODES}}})", "{{state}}")]),
        ("Refused", "Do producers get errors?", "cps", [rate("spillway_produce_refused_total", NODES, "code")])]),
    ("Raft and disk", [
        ("Commit", "What does replication cost a producer?", "s", quantiles("spillway_commit_seconds", NODES, "instance")),
        ("Sync", "Is the disk slow?", "s", quantiles("spillway_fsync_seconds", NODES, "instance")),
        ("Groups led", "Is leadership even?", "none", [(f"sum by (instance) (spillway_raft_leading{{{NODES}}})", "{{instance}}")]),
        ("Changes of leader", "Do leaders come and go?", "none",
         [(f"sum by (instance) (increase(spillway_raft_leader_changes_total{{{NODES}}}[$__rate_interval]))", "{{instance}}")]),
        ("Entries behind", "Does a replica fall behind?", "none",
         [(f"max by (instance) (spillway_raft_applied_lag_entries{{{NODES}}})", "{{instance}}")]),
        ("Snapshots", "Who catches up, and how fast?", "Bps",
         [rate("spillway_snapshot_sent_bytes_total", NODES, "instance", "{{instance}} sends"),
          rate("spillway_snapshot_received_bytes_total", NODES, "instance", "{{instance}} takes")]),
        ("Disk free", "When will it be full?", "bytes", [(f"spillway_disk_free_bytes{{{NODES}}}", "{{instance}}")])]),
    ("Processes", [
        ("Processor", "What does it cost?", "none", [rate("process_cpu_seconds_total", NODES, "instance")]),
        ("Memory", "Does it fit?", "bytes", [(f"process_resident_memory_bytes{{{NODES}}}", "{{instance}}")]),
        ("Event loop's lag", "Is a node out of processor?", "s", quantiles("spillway_event_loop_lag_seconds", NODES, "instance")),
        ("Ingress", "Does it commit as fast as it takes in?", "percentunit",
         [(f"spillway_ingress_bytes{{{NODES}}} / spillway_ingress_limit_bytes{{{NODES}}}", "{{instance}}")]),
        ("Streams", "How many clients are there?", "none", [(f"spillway_streams{{{NODES}}}", "{{instance}}")]),
        ("Files", "How near is the limit?", "percentunit",
         [(f"process_open_fds{{{NODES}}} / process_max_fds{{{NODES}}}", "{{instance}}")]),
        ("Spans", "Are traces whole?", "cps", [rate("spillway_spans_total", NODES, "result")])])]

DESTINATIONS: list[tuple[str, list[Panel]]] = [
    ("How they stand", [
        ("Oldest ready message", "For how long has somebody been waiting?", "s",
         [(f'max by (destination) (spillway_oldest_message_seconds{{{OF}, state="ready"}})', "{{destination}}")]),
        ("Messages", "How deep is the backlog, and is it moving or parked?", "short",
         [(f"sum by (destination, state) (spillway_messages{{{OF}}})", "{{destination}} {{state}}")]),
        ("Queues", "Why does it not move: no consumers (ready), slow ones (leased), retries (delayed), a gate (parked)?", "short",
         [(f"sum by (destination, state) (spillway_queues{{{OF}}})", "{{destination}} {{state}}")]),
        ("Parked", "Which receivers are throttling or down?", "none",
         [(f"max by (destination) (spillway_parked{{{OF}}})", "{{destination}}"),
          (f"max by (destination) (spillway_parked_tenants{{{OF}}})", "{{destination}} tenants")]),
        ("Consumers", "Does anybody consume?", "none", [(f"max by (destination) (spillway_consumers{{{OF}}})", "{{destination}}")]),
        ("Bytes", "What does the backlog weigh?", "bytes",
         [(f"sum by (destination) (spillway_message_bytes{{{OF}}})", "{{destination}}")])]),
    ("What happens", [
        ("Stored", "How much comes in?", "cps", [rate("spillway_messages_enqueued_total", OF, "destination")]),
        ("Acknowledged", "How much is done?", "cps", [rate("spillway_messages_acked_total", OF, "destination")]),
        ("Leases by their end", "What do consumers say of the receiver?", "cps",
         [rate("spillway_leases_ended_total", OF, "destination, outcome", "{{destination}} {{outcome}}")]),
        ("Retries and redeliveries", "How much work is repetition?", "cps",
         [rate("spillway_messages_retried_total", OF, "destination", "{{destination}} failed"),
          rate("spillway_messages_redelivered_total", OF, "destination", "{{destination}} again")]),
        ("Given up", "What does nobody get?", "cps",
         [rate("spillway_messages_dead_lettered_total", OF, "destination", "{{destination}} dead letters"),
          rate("spillway_messages_discarded_total", OF, "destination", "{{destination}} discarded"),
          rate("spillway_messages_ttl_expired_total", OF, "destination", "{{destination}} too late")]),
        ("Leases expired, settled too late", "Do consumers die, or hang?", "cps",
         [rate("spillway_lease_expirations_total", OF, "destination"),
          ('sum(rate(spillway_stale_settlements_total{job=~"$job"}[$__rate_interval]))', "too late")])]),
    ("How long it takes", [
        ("Until leased", "How long do messages wait?", "s", quantiles("spillway_queue_wait_seconds", OF, "destination")),
        ("Until acknowledged", "How long until an event has arrived?", "s", quantiles("spillway_end_to_end_seconds", OF, "destination")),
        ("Fairness", "Are tenants served alike? 1 is equal.", "none",
         [(f"min by (destination) (spillway_fairness_index{{{OF}}})", "{{destination}}")]),
        ("Largest backlogs", "Who fills the queue?", "short",
         [(f"topk(20, sum by (destination, tenant) (spillway_tenant_backlog_messages{{{OF}}}))", "{{destination}} {{tenant}}")])])]

DISPATCHER: list[tuple[str, list[Panel]]] = [
    ("Receivers", [
        ("Requests", "How fast are receivers?", "s", quantiles("spillway_dispatcher_http_seconds", OF, "destination")),
        ("Outcomes", "What do they answer?", "cps",
         [rate("spillway_dispatcher_outcomes_total", OF, "destination, outcome", "{{destination}} {{outcome}}")]),
        ("Under way", "Is concurrency what limits it?", "percentunit",
         [(f"sum by (destination) (spillway_dispatcher_in_flight{{{OF}}}) / "
           f"sum by (destination) (spillway_dispatcher_concurrency_max{{{OF}}})", "{{destination}}")]),
        ("Cannot be reached", "Which are down?", "none",
         [(f"max by (destination) (spillway_dispatcher_circuit_open{{{OF}}})", "{{destination}}")]),
        ("Failures in a row", "Broken, or unlucky?", "none",
         [(f"max by (destination) (spillway_dispatcher_failures_in_a_row{{{OF}}})", "{{destination}}")])]),
    ("Dispatchers", [
        ("Destinations", "Does each have work?", "none", [('spillway_dispatcher_destinations{job=~"$job"}', "{{instance}}")]),
        ("Not delivered", "Is a target of no use?", "none", [('spillway_dispatcher_destinations_unusable{job=~"$job"}', "{{instance}}")]),
        ("Cluster reachable", "Do they see it?", "none", [('spillway_dispatcher_broker_reachable{job=~"$job"}', "{{instance}}")]),
        ("Processor", "What do they cost?", "none",
         [('sum by (instance) (rate(process_cpu_seconds_total{job=~"$job"}[$__rate_interval]))', "{{instance}}")])])]

BOARDS = {  # file: title, rows, the variable beside the job, a metric that has its labels
    "cluster": ("Spillway: cluster", CLUSTER, "instance", "spillway_node_info"),
    "destinations": ("Spillway: destinations", DESTINATIONS, "destination", "spillway_messages_enqueued_total"),
    "dispatcher": ("Spillway: dispatchers", DISPATCHER, "destination", "spillway_dispatcher_outcomes_total")}


def rendered(name: str) -> str:
    """A dashboard as JSON."""
    title, rows, variable, metric = BOARDS[name]
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels: list[dict[str, Any]] = []
    y = 0
    for heading, row in rows:
        panels.append({"type": "row", "title": heading, "collapsed": False, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}, "panels": []})
        y += 1
        for i, (what, why, unit, queries) in enumerate(row):
            panels.append({
                "type": "timeseries", "title": what, "description": why, "datasource": source,
                "gridPos": {"h": HEIGHT, "w": WIDTH, "x": i % 3 * WIDTH, "y": y + i // 3 * HEIGHT},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"lineWidth": 1, "fillOpacity": 5}}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
                "targets": [{"refId": chr(65 + k), "datasource": source, "expr": expr, "legendFormat": legend}
                            for k, (expr, legend) in enumerate(queries)]})
        y += -(-len(row) // 3) * HEIGHT
    for i, panel in enumerate(panels):
        panel["id"] = i + 1

    def asked(of: str, query: str) -> dict[str, Any]:
        return {"name": of, "type": "query", "datasource": source, "query": {"query": query, "refId": of}, "definition": query,
                "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "refresh": 2, "sort": 1}

    board = {
        "uid": f"spillway-{name}", "title": title, "tags": ["spillway"], "schemaVersion": 39, "version": 1, "editable": True,
        "refresh": "30s", "time": {"from": "now-1h", "to": "now"}, "timezone": "", "annotations": {"list": []},
        "links": [{"type": "dashboards", "tags": ["spillway"], "title": "Spillway", "asDropdown": False, "includeVars": False,
                   "keepTime": True}],
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}, "refresh": 1},
            asked("job", f"label_values({metric}, job)"), asked(variable, f'label_values({metric}{{job=~"$job"}}, {variable})')]},
        "panels": panels}
    return json.dumps(board, indent=1) + "\n"
