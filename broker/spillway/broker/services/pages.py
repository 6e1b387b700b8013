"""Answers in pages: sizes, tokens, and how many bytes a page may have."""
from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from spillway.broker.errors import RequestError

PAGE_DEFAULT = 100
PAGE_MAX = 1000
PAGE_BYTES_MAX = 2 << 20  # what a page has at most before its last entry: clients take 4 MiB


class _Sized(Protocol):
    def ByteSize(self) -> int: ...


_Key = TypeVar("_Key")
_Message = TypeVar("_Message", bound=_Sized)


def page_size(size: int) -> int:
    """How many entries a request wants; 0 takes the default. Raises RequestError."""
    if not 0 <= size <= PAGE_MAX:
        raise RequestError("page_size", f"is {size}; it must be 0 to {PAGE_MAX}")
    return size or PAGE_DEFAULT


def token(raw: bytes) -> str:
    """A page token that stands for some bytes."""
    return base64.urlsafe_b64encode(raw).decode()


def no_token() -> RequestError:
    """The error for a token that was never given."""
    return RequestError("page_token", "is not one of this service; start from an empty one")


def token_bytes(text: str) -> bytes:
    """What a page token stands for; b"" for none. Raises RequestError."""
    try:
        return base64.b64decode(text.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise no_token() from None


def token_name(text: str) -> str:
    """The name that a page token stands for; "" for none. Raises RequestError."""
    try:
        return token_bytes(text).decode()
    except UnicodeDecodeError:
        raise no_token() from None


def take_page(keys: Sequence[_Key], size: int, make: Callable[[_Key], _Message]) -> tuple[list[_Message], bool]:
    """The first entries of a sorted listing, at most `size` and about PAGE_BYTES_MAX, and whether there are more."""
    page: list[_Message] = []
    bytes_left = PAGE_BYTES_MAX
    for key in keys[:size]:
        if bytes_left <= 0:
            break
        page.append(make(key))
        bytes_left -= page[-1].ByteSize()
    return page, len(page) < len(keys)
