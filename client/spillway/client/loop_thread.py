"""An event loop in a thread of its own, for callers without one."""
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from spillway.client.errors import Closed

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._main, name="spillway client", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop):  # which ends in order what is left
            asyncio.set_event_loop(self.loop)
            self.loop.run_forever()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine there and waits for it. KeyboardInterrupt cancels it."""
        if not self.thread.is_alive():
            coroutine.close()
            raise Closed("the client is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls a function there and waits for it."""

        async def called() -> T:
            return function(*args, **kwargs)

        return self.run(called())

    def stop(self) -> None:
        """Ends the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
