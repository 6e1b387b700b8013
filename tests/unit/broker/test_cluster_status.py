"""What operators are told of the cluster."""
from __future__ import annotations

from spillway.broker.services.cluster_status import cluster_status
from spillway.v1 import cluster_service_pb2 as pb


def nodes(*ids: str, **fields: object) -> list[pb.Node]:
    return [pb.Node(id=n, address=f"{n}:1", state=pb.NODE_STATE_ACTIVE, **fields) for n in ids]  # type: ignore[arg-type]


def answer(**roles: str) -> pb.GetNodeStatusResponse:
    """`g1="leader abc 9"`: role, voters, applied index."""
    out = pb.GetNodeStatusResponse(version="1")
    for group, said in roles.items():
        role, voters, index, *learners = said.split()
        out.groups.add(group=int(group[1:]), role=role, voters=list(voters), learners=list("".join(learners)), term=3,
                       commit_index=int(index), applied_index=int(index))
    return out


def told(found: pb.GetClusterStatusResponse) -> list[str]:
    """All problems, with their remedies."""
    assert all(p.what and p.remedy for p in found.problems)
    return [f"{p.what}: {p.remedy}" for p in found.problems]


HEALTHY = {"a": answer(g0="leader abc 5", g1="leader abc 9"), "b": answer(g0="follower abc 5", g1="follower abc 7"),
           "c": answer(g0="follower abc 5", g1="follower abc 9")}


def test_a_sound_cluster_has_no_problems() -> None:
    """Everybody answers, and all is where it belongs."""
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, HEALTHY)
    assert told(found) == [] and not any(g.moving for g in found.groups)
    assert [(n.node.id, n.reachable, n.replicas, n.leads) for n in found.nodes] == [
        ("a", True, 1, 1), ("b", True, 1, 0), ("c", True, 1, 0)]
    assert [(r.node, r.lag) for r in found.groups[1].replicas] == [("a", 0), ("b", 2), ("c", 0)]


def test_a_node_that_is_silent_and_the_groups_that_may_stop() -> None:
    """One is gone: what that means is said, and what to do."""
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, levels(2, a=2, b=2))
    said = told(found)
    assert "node c does not answer: start it again; if it is gone for good: spillway cluster remove c" in said
    assert "the meta group and shard 1 stop if one more of a, b fails: start the nodes that do not answer" in said


def test_groups_in_one_state_are_told_of_together() -> None:
    """However many shards there are, one sentence says it."""
    found = cluster_status("c", nodes("a", "b", "c"), {n: ["a", "b", "c"] for n in range(1, 26)}, {
        "a": answer(g0="leader abc 5", **{f"g{n}": "leader abc 9" for n in range(1, 26)}),
        "b": answer(g0="follower abc 5", **{f"g{n}": "follower abc 9" for n in range(1, 26)})})
    groups = f"the meta group and shards {', '.join(map(str, range(1, 21)))} and 5 more"
    assert f"{groups} stop if one more of a, b fails: start the nodes that do not answer" in told(found)
    assert len(told(found)) == 2


def test_no_leader() -> None:
    """Who must be started is named."""
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, {"b": HEALTHY["b"]})
    assert "the meta group and shard 1 have no leader: a majority of a, b, c must run; start a, c" in told(found)
    assert found.groups[1].leader == ""


def test_what_moves() -> None:
    """Members that are not those wanted, or that still learn."""
    leads = {"a": answer(g0="leader abcd 5", g1="leader abc 9 d")}
    found = cluster_status("c", nodes("a", "b", "c", "d"), {1: ["a", "b", "d"]}, leads)
    assert found.groups[1].moving and list(found.groups[1].learners) == ["d"]
    assert [n.replicas for n in found.nodes] == [1, 1, 1, 1], "a learner is a replica, too"


def test_of_two_leaders_the_later_term_counts() -> None:
    """One that was deposed may not know it yet."""
    old, new = answer(g1="leader abc 9"), answer(g1="leader abc 9")
    new.groups[0].term = 4
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, {"a": old, "b": new})
    assert (found.groups[1].leader, found.groups[1].term) == ("b", 4)


def levels(level: int, **highest: int) -> dict[str, pb.GetNodeStatusResponse]:
    """The healthy cluster with what its nodes know; 0: from before levels."""
    found = {}
    for node_id, known in highest.items():
        said = found[node_id] = pb.GetNodeStatusResponse(feature_max=known, feature_level=level if known else 0)
        said.MergeFrom(HEALTHY[node_id])
    return found


def test_who_holds_the_feature_level_back() -> None:
    """In the middle of an upgrade the nodes that are left are named, with what to run there."""
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, levels(1, a=2, b=0, c=1))
    assert found.feature_level == 1 and [n.feature_max for n in found.nodes] == [2, 1, 1]
    assert told(found) == ["the cluster stays at feature level 1, as these know no more: b (version 1), c (version 1): "
                           "run version 0.2.0 or newer there, without a lower feature_level_max"]
    assert told(cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, levels(1, a=2, b=2, c=2))) == []
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, levels(7, a=9, b=7, c=8))
    assert told(found) == ["the cluster stays at feature level 7, as these know no more: b (version 1): "
                           "run the version of the other nodes there, without a lower feature_level_max"]


def test_a_node_below_the_feature_level() -> None:
    """It is refused by all others; that it answers is no comfort."""
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, levels(2, a=2, b=2, c=0))
    assert told(found) == ["node c (version 1) knows feature levels up to 1, and the cluster is at 2: the others refuse it: "
                           "run version 0.2.0 or newer there, without a lower feature_level_max"]


def test_members_come_from_nodes_that_tell_them() -> None:
    """Nodes of 0.1.0 do not. What moves is not guessed."""
    answers = {n: pb.GetNodeStatusResponse.FromString(HEALTHY[n].SerializeToString()) for n in "abc"}
    for group in answers["a"].groups:
        del group.voters[:]
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, answers)
    assert (found.groups[1].leader, list(found.groups[1].voters), found.groups[1].moving) == ("a", ["a", "b", "c"], False)
    assert [(r.node, r.lag) for r in found.groups[1].replicas] == [("a", 0), ("b", 2), ("c", 0)]
    assert [n.replicas for n in found.nodes] == [1, 1, 1] and told(found) == []
    for node_id in "bc":
        for group in answers[node_id].groups:
            del group.voters[:]
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, answers)
    assert (found.groups[1].leader, list(found.groups[1].voters), found.groups[1].moving) == ("a", [], False)
    assert [r.node for r in found.groups[1].replicas] == ["a", "b", "c"] and told(found) == []


def test_before_nodes_can_leave_nobody_is_told_to_remove_one() -> None:
    """A dead node of a cluster that is being upgraded is replaced under its own id."""
    found = cluster_status("c", nodes("a", "b", "c"), {1: ["a", "b", "c"]}, levels(1, a=2, b=2))
    assert "node c does not answer: start it again; if it is gone for good: with an empty data_dir" in told(found)


def test_zones_for_all_or_for_none() -> None:
    """A zone that some nodes lack is a mistake."""
    found = cluster_status("c", [*nodes("a", "b", zone="z"), *nodes("c")], {1: ["a", "b", "c"]}, HEALTHY)
    assert told(found) == ["some nodes have a zone, and some have none: start c with --zone"]
