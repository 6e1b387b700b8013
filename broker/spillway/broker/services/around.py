"""Something around the handlers of RPCs, of every kind: for interceptors."""
from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

Guard = Callable[[Any, Any], AbstractAsyncContextManager[None]]
"""(request, context): entered before the handler, left after it. The request of a streaming one is the stream."""


def around(handler: Any, guard: Guard) -> Any:
    """The handler, within the guard."""
    if handler.request_streaming:
        inner, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
    elif handler.response_streaming:
        inner, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
    else:
        async def answer(request: Any, context: Any) -> Any:
            async with guard(request, context):
                return await handler.unary_unary(request, context)
        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    async def stream(request: Any, context: Any) -> None:
        async with guard(request, context):
            await drive(inner(request, context), context)
    return make(stream, handler.request_deserializer, handler.response_serializer)


async def drive(running: Any, context: Any) -> None:
    """Runs a streaming handler, whether it writes its answers or yields them."""
    if not isinstance(running, AsyncIterator):
        await running
        return
    try:
        async for message in running:
            await context.write(message)
    finally:
        await running.aclose()  # type: ignore[attr-defined]
