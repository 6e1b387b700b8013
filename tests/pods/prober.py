"""Health checks as kubelet makes them, from a network namespace of its own: a line `host:port service seconds` on standard input, one with
the answer on standard output."""
from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def check(address: str, service: str, seconds: float) -> str:
    """SERVING, another status, or the code of an error."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


if __name__ == "__main__":
    for line in sys.stdin:
        address, service, seconds = line.split()
        print(check(address, service, float(seconds)), flush=True)
