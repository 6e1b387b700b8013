"""Files of a cluster of one are damaged: it serves everything that was acknowledged, or refuses and says what to do."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from random import Random

import grpc
import pytest
from spillway.v1.queue_service_pb2 import OUTCOME_ACK, Credit, LeaseRequest, Settlement, Subscribe
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

from tests.integration.plain_client import Open, produce, record, settle
from tests.torture.damage import WAYS, Damage
from tests.torture.disk_faults import EXIT_DATA, REMEDIES
from tests.torture.network import Loopback
from tests.torture.nodes import Nodes, until

KEYS, EACH = 20, 40
PAYLOAD_BYTES = (200, 20_000)  # the larger ones are kept apart from the tables


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A node that was killed with messages in all kinds of files; `base` beside its directory keeps them."""
    directory = tmp_path_factory.mktemp("damage")
    made = Nodes(directory, 1, Loopback())
    node = made.nodes["n1"]
    try:
        for part in range(2):
            node.start()
            made.wait_healthy()
            with grpc.insecure_channel(node.address) as channel:
                for n in range(part * EACH // 2, (part + 1) * EACH // 2):
                    response = produce(channel, *(record("d", key=f"k{k}", payload=b"%d " % n + Random(n).randbytes(
                        PAYLOAD_BYTES[k % 2])) for k in range(KEYS)))
                    assert not response.errors
            node.kill()
        shutil.copytree(node.data_dir, directory / "base")
        yield made
    finally:
        made.end()


def intact(nodes: Nodes) -> bool:
    """Whether the node hands out everything, in order; False: it ended."""
    node = nodes.nodes["n1"]
    node.start()
    until("at work, or ended", lambda: not node.running or nodes.healthy())
    got: dict[str, list[bytes]] = {f"k{k}": [] for k in range(KEYS)}
    left = KEYS * EACH
    requests = Open(LeaseRequest(subscribe=Subscribe(destinations=["d"], credit=Credit(messages=left, bytes=1 << 28))))
    try:
        with grpc.insecure_channel(node.address) as channel:
            for response in QueueServiceStub(channel).Lease(iter(requests), timeout=20):
                for run in response.runs:
                    got[run.key] += [m.message.payload.partition(b" ")[0] for m in run.messages]
                    left -= len(run.messages)
                    settle(channel, Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=OUTCOME_ACK,
                                               sequence=run.messages[-1].sequence))
                if not left:
                    break
    except grpc.RpcError:
        until("ended", lambda: not node.running)
        return False
    finally:
        requests.end.set()
    assert all(numbers == [b"%d" % n for n in range(EACH)] for numbers in got.values())
    node.kill()
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["log WAL", "node identity", "state table", "state blobs"])
def test_a_damaged_node_serves_everything_or_refuses(nodes: Nodes, what: str, way: str) -> None:
    """No acknowledged message is ever silently gone, or another one, or in another place."""
    node = nodes.nodes["n1"]
    shutil.rmtree(node.data_dir)
    shutil.copytree(node.data_dir.parent / "base", node.data_dir)
    assert Damage(what, way).inflict(node.data_dir, Random(7))
    if not intact(nodes):
        assert node.process is not None and node.process.returncode == EXIT_DATA
        assert any(remedy in node.said() for remedy in REMEDIES) and "Traceback" not in node.said()
    elif what == "node identity" or (what == "log WAL" and way != "tail"):  # a last write may be one that nobody was told of
        pytest.fail("what was damaged is needed")
