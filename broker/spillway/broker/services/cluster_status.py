"""What the nodes' answers say of the cluster: what moves, what is wrong, and what to do about it. Pure."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from spillway.broker.core import features
from spillway.v1 import cluster_service_pb2 as pb

LAG_MANY = 10_000  # entries; beyond them a replica is said to be behind
NAMED_MAX = 20  # shards in one sentence


def cluster_status(cluster: str, nodes: Sequence[pb.Node], homes: Mapping[int, Sequence[str]],
                   answers: Mapping[str, pb.GetNodeStatusResponse]) -> pb.GetClusterStatusResponse:
    """`nodes`: all of them; `homes`: where shards belong; `answers`: of those that answered."""
    out = pb.GetClusterStatusResponse(cluster=cluster, feature_level=max((a.feature_level or 1 for a in answers.values()), default=1))
    groups: dict[int, dict[str, pb.GroupStatus]] = {0: {}, **{shard: {} for shard in homes}}
    for node_id, answer in answers.items():
        for status in answer.groups:
            groups.setdefault(status.group, {})[node_id] = status
    for number in sorted(groups):
        out.groups.append(_group(number, list(homes.get(number, ())), groups[number]))
    for node in nodes:
        own = [g for g in out.groups if g.group and (node.id in g.voters or node.id in g.learners)]
        out.nodes.add(node=node, reachable=node.id in answers, replicas=len(own),
                      version=answers[node.id].version if node.id in answers else "",
                      feature_max=answers[node.id].feature_max or 1 if node.id in answers else 0,
                      leads=sum(1 for g in out.groups if g.group and g.leader == node.id))
    _problems(out)
    return out


def _group(number: int, wanted: list[str], replicas: Mapping[str, pb.GroupStatus]) -> pb.GroupReport:
    leaders = [(status.term, node_id) for node_id, status in replicas.items() if status.role == "leader"]
    out = pb.GroupReport(group=number, wanted=wanted)
    if leaders:
        out.term, out.leader = max(leaders)
    if not replicas:
        return out

    def latest(*answers: pb.GroupStatus) -> pb.GroupStatus:
        return max(answers, key=lambda status: (status.term, status.commit_index))
    newest = replicas[out.leader] if leaders else latest(*replicas.values())
    telling = [status for status in replicas.values() if status.voters]  # nodes of 0.1.0 do not say who the members are
    members = newest if newest.voters or not telling else latest(*telling)
    out.voters.extend(members.voters)
    out.learners.extend(members.learners)
    out.moving = bool(wanted and members.voters) and (set(wanted) != set(members.voters) or bool(members.learners))
    for node_id, status in sorted(replicas.items()):
        if node_id in members.voters or node_id in members.learners or not telling:
            out.replicas.add(node=node_id, applied_index=status.applied_index, lag=max(0, newest.commit_index - status.applied_index),
                             role=status.role)
    return out


def _problems(out: pb.GetClusterStatusResponse) -> None:
    def say(what: str, remedy: str) -> None:
        out.problems.add(what=what, remedy=remedy)

    reachable = {n.node.id for n in out.nodes if n.reachable}
    for n in out.nodes:
        if not n.reachable:
            say(f"node {n.node.id} does not answer", "start it again; if it is gone for good: " + (
                f"spillway cluster remove {n.node.id}" if out.feature_level >= features.MEMBERS else "with an empty data_dir"))
    _feature_problems(out, say)
    _group_problems(out, reachable, say)
    without = sorted(n.node.id for n in out.nodes if not n.node.zone)
    if without and len(without) < len(out.nodes):
        say("some nodes have a zone, and some have none", f"start {', '.join(without)} with --zone")
    for n in out.nodes:
        behind = [r.lag for g in out.groups for r in g.replicas if r.node == n.node.id and r.lag > LAG_MANY]
        if behind:
            say(f"node {n.node.id} is up to {max(behind)} entries behind", "see whether its disk and network keep up")
    stay = [n for n in out.nodes if n.node.state == pb.NODE_STATE_ACTIVE]
    if len(stay) == 2:
        say("there are two nodes: if one fails, everything stops", "let a third one join")


def _group_problems(out: pb.GetClusterStatusResponse, reachable: set[str], say: Callable[[str, str], None]) -> None:
    """Groups that cannot go on, or could not if one more node failed; those that are so for the same reason are told of together."""
    leaderless: dict[str, list[int]] = {}  # remedy -> groups
    thin: dict[str, list[int]] = {}  # nodes -> groups
    for g in out.groups:
        if not g.leader:
            missing = [v for v in g.voters if v not in reachable]
            leaderless.setdefault(f"a majority of {', '.join(g.voters)} must run; start {', '.join(missing)}" if missing else
                                  "an election takes some seconds; if it lasts, look at the logs of its nodes", []).append(g.group)
        elif len(alive := [v for v in g.voters if v in reachable]) < len(g.voters) and len(alive) == len(g.voters) // 2 + 1:
            thin.setdefault(", ".join(alive), []).append(g.group)
    for remedy, groups in leaderless.items():
        say(f"{_named(groups)} {'has' if len(groups) == 1 else 'have'} no leader", remedy)
    for rest, groups in thin.items():
        say(f"{_named(groups)} {'stops' if len(groups) == 1 else 'stop'} if one more of {rest} fails", "start the nodes that do not answer")


def _named(groups: list[int]) -> str:
    """Group 0 is the meta group."""
    shards = [str(g) for g in groups if g]
    more = f" and {len(shards) - NAMED_MAX} more" if len(shards) > NAMED_MAX else ""
    names = ["the meta group"] * (0 in groups)
    if shards:
        names.append(f"shard{'s' if len(shards) > 1 else ''} {', '.join(shards[:NAMED_MAX])}{more}")
    return " and ".join(names)


def _feature_problems(out: pb.GetClusterStatusResponse, say: Callable[[str, str], None]) -> None:
    """Nodes that do not know what others know."""
    counting = [n for n in out.nodes if n.reachable and n.node.state != pb.NODE_STATE_REMOVING]
    for n in counting:
        if n.feature_max < out.feature_level:
            say(f"node {n.node.id} (version {n.version}) knows feature levels up to {n.feature_max}, and the cluster is at "
                f"{out.feature_level}: the others refuse it", _upgrade(out.feature_level))
    newest = max((n.feature_max for n in counting), default=0)
    behind = [n for n in counting if out.feature_level <= n.feature_max < newest]
    level = min((n.feature_max for n in behind), default=newest)
    if level == out.feature_level < newest:
        nodes = ", ".join(f"{n.node.id} (version {n.version})" for n in behind if n.feature_max == level)
        say(f"the cluster stays at feature level {level}, as these know no more: {nodes}", _upgrade(level + 1))


def _upgrade(level: int) -> str:
    newer = f"version {features.LEVELS[level].since} or newer" if level in features.LEVELS else "the version of the other nodes"
    return f"run {newer} there, without a lower feature_level_max"
