"""The broker: gRPC services over replicated shards."""
