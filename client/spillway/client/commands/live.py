"""Views that are drawn again and again on a terminal, and keys that steer them."""
from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# What terminals send for keys without a character.
_NAMED = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1b[C": "right", b"\x1b[D": "left", b"\x1bOA": "up", b"\x1bOB": "down",
          b"\x1bOC": "right", b"\x1bOD": "left", b"\x1b": "escape", b"\r": "enter", b"\n": "enter", b"\x7f": "left"}


def is_terminal() -> bool:
    """Whether a person watches: standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class Keys:
    """Keys as they are pressed. Without a terminal on standard input there are none."""

    def __init__(self) -> None:
        self._pressed: asyncio.Queue[str] = asyncio.Queue()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Reads keys one by one, unechoed, as long as it is open."""
        if not sys.stdin.isatty():
            yield
            return
        import termios
        import tty

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        loop = asyncio.get_running_loop()
        tty.setcbreak(number)
        loop.add_reader(number, self._read, number)
        try:
            yield
        finally:
            loop.remove_reader(number)
            termios.tcsetattr(number, termios.TCSADRAIN, before)

    def _read(self, number: int) -> None:
        for key in named(os.read(number, 64)):
            self._pressed.put_nowait(key)

    async def next(self, seconds: float) -> str | None:
        """The next key, if one is pressed within so long."""
        try:
            async with asyncio.timeout(seconds):
                return await self._pressed.get()
        except TimeoutError:
            return None


def named(pressed: bytes) -> list[str]:
    """The keys that were read: names of those without a character, else the characters."""
    keys = []
    while pressed:
        known = next((one for one in sorted(_NAMED, key=len, reverse=True) if pressed.startswith(one)), None)
        keys.append(_NAMED[known] if known else chr(pressed[0]))
        pressed = pressed[len(known or b"."):]
    return keys


@contextlib.contextmanager
def screen() -> Iterator[Callable[[Any], None]]:
    """The whole terminal; gives a function that draws something of rich's. What was on it comes back at the end."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        yield lambda drawn: live.update(drawn, refresh=True)
