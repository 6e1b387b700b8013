"""gRPC handlers: parse, call, map. No rules."""
