"""Bytes that are no message of the method's type are the caller's error: gRPC itself would call them UNKNOWN, as if they were ours."""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from spillway.broker.errors import RequestError
from spillway.broker.services.around import drive
from spillway.broker.services.status import abort


class ParseErrors(grpc.aio.ServerInterceptor):
    """Answers requests that do not parse with INVALID_ARGUMENT. QueueService parses its own: its handlers take bytes."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        if handler.request_streaming:
            return _streaming(handler)
        parse = handler.request_deserializer

        async def parsed(data: bytes, context: Any) -> Any:
            try:
                return parse(data)
            except DecodeError:
                await abort(context, _unparsable())

        if handler.response_streaming:
            async def answers(data: bytes, context: Any) -> None:
                await drive(handler.unary_stream(await parsed(data, context), context), context)
            return grpc.unary_stream_rpc_method_handler(answers, None, handler.response_serializer)

        async def answer(data: bytes, context: Any) -> Any:
            return await handler.unary_unary(await parsed(data, context), context)
        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)


def _streaming(handler: Any) -> Any:
    """A handler that reads its requests from the context, which raises what does not parse."""
    async def stream(requests: Any, context: Any) -> None:
        try:
            await drive(handler.stream_stream(requests, context), context)
        except DecodeError:
            await abort(context, _unparsable())
    return grpc.stream_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)


def _unparsable() -> RequestError:
    return RequestError("request", "does not parse as the method's request message")
