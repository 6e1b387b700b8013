"""An event loop without a clock: time jumps to the next thing that is due, so what asyncio code does depends on its inputs only.

Code of several processes shares the loop. A context variable says whose code runs; when a process is killed, nothing of it
runs any more: neither its callbacks nor its `finally` blocks, as after kill -9.
"""
from __future__ import annotations

import asyncio
import asyncio.events
import heapq
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Any

STEP_SECONDS = 1e-5  # of one round of the loop


class Process:
    """What can be killed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.context = copy_context()
        self.context.run(PROCESS.set, self)
        self.paused_until = 0.0
        """When the last callback that a pause has held back runs: what comes until then queues up behind it."""
        self.io_seconds: Callable[[], float] = lambda: 0.0
        """How long work in a thread (of the disk) takes."""

    def __repr__(self) -> str:
        return f"<process {self.name}{'' if self.alive else ', dead'}>"


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


class _Task(asyncio.Task[Any]):
    """A task that knows whose it is."""

    process: Process | None


class _Timer(asyncio.TimerHandle):
    """Timers of one moment fire in the order in which they were set; asyncio promises no order."""

    __slots__ = ("order",)
    order: int

    def __lt__(self, other: Any) -> bool:
        return bool((self._when, self.order) < (other._when, other.order))  # type: ignore[attr-defined]


class Stuck(Exception):
    """Nothing is due, and what was waited for has not come."""


class _Time:
    """In place of a selector: waiting is a jump."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        """Nothing ever comes from outside."""
        if timeout is None:
            raise Stuck
        if timeout > 0:  # exactly to the next timer: a rounding error would make it fire for ever at the same moment
            self._loop.now = self._loop._scheduled[0]._when
        else:  # work takes time, too: whoever polls until something is due gets there
            self._loop.now += STEP_SECONDS
        return []


class SimLoop(asyncio.BaseEventLoop):
    """See the module. `now` is in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self._selector = _Time(self)
        self._clock_resolution = 1e-12
        self.tasks: list[asyncio.Task[Any]] = []  # kept until the end: what a dead process has must not be collected at some time
        self.set_task_factory(self._make_task)
        self.failures: list[str] = []
        self._order = 0
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        """Simulated seconds."""
        return self.now

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Nothing runs because of a collection of garbage."""

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = _Task(coroutine, loop=loop, **options)
        task.process = options.get("context", copy_context()).get(PROCESS)
        self.tasks.append(task)
        if len(self.tasks) > 4096 and len(self.tasks) % 1024 == 0:
            self.tasks = [t for t in self.tasks if not t.done()]
        return task

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), asyncio.CancelledError):
            return  # of a process that was killed while it was cancelling something
        process = getattr(context.get("future"), "process", None)
        if process is not None and not process.alive:
            return  # it was killed before whoever waits for the task could look
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    # -- processes -----------------------------------------------------------------------------------------------

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        """As of BaseEventLoop; nothing of a dead process."""
        handle: Any = super().call_soon(callback, *args, context=context)
        process = handle._context.get(PROCESS)
        if process is not None:
            if not process.alive:
                handle.cancel()
            elif process.paused_until > self.now:
                handle.cancel()
                return self.call_at(self._after_pause(process), callback, *args, context=handle._context)
        return handle  # type: ignore[no-any-return]

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        """As of BaseEventLoop; nothing of a dead process."""
        if context is None:
            context = copy_context()
        process = context.get(PROCESS)
        if process is not None and process.paused_until > when:
            when = self._after_pause(process)
        handle = _Timer(when, callback, args, self, context)
        self._order += 1
        handle.order = self._order
        if process is not None and not process.alive:
            handle.cancel()
        else:
            heapq.heappush(self._scheduled, handle)
            handle._scheduled = True
        return handle

    @staticmethod
    def _after_pause(process: Process) -> float:
        """When a callback of a paused process runs: in the order in which they came."""
        process.paused_until += 1e-9
        return process.paused_until

    def pause(self, process: Process, seconds: float) -> None:
        """Nothing of the process runs for a while, as after SIGSTOP; then all that was due does, in order."""
        if process.paused_until >= self.now + seconds:
            return
        process.paused_until = self.now + seconds
        own = [h for h in self._scheduled if h._context.get(PROCESS) is process and h._when < process.paused_until]
        for handle in sorted(own):
            handle._when = self._after_pause(process)
        heapq.heapify(self._scheduled)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Takes as long as the process' disk says; the work is done at the end of it, or never."""
        future = self.create_future()
        process = PROCESS.get()

        def work() -> None:
            if future.done():
                return
            try:
                result = func(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        self.call_later(process.io_seconds() if process is not None else 0.0, work)
        return future

    def kill(self, process: Process) -> None:
        """From now on nothing of the process runs."""
        process.alive = False
        for handle in [*self._ready, *self._scheduled]:
            if handle._context.get(PROCESS) is process:
                handle.cancel()

    def spawn(self, process: Process, coroutine: Any) -> asyncio.Task[Any]:
        """A task of a process."""
        task: asyncio.Task[Any] = self.create_task(coroutine, context=process.context.copy())
        return task

    def run_until(self, when: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Runs what is due until then; stops early, and says so, when `done`, which is asked ten times a second."""
        async def watch() -> bool:
            while self.now < when:
                await asyncio.sleep(min(0.1, when - self.now))
                if done():
                    return True
            return done()
        return self.run_until_complete(self.create_task(watch()))

    def dispose(self) -> None:
        """Ends all that is left, without a sound."""
        for handle in [*self._ready, *self._scheduled]:
            handle.cancel()
        self.call_soon = self._nothing  # type: ignore[method-assign, assignment]
        self.call_at = self._nothing  # type: ignore[method-assign, assignment]
        asyncio.events._set_running_loop(self)
        try:
            for task in self.tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    try:
                        task.get_coro().close()  # type: ignore[union-attr]
                    except Exception:  # a `finally` that assumes that it is still needed
                        pass
        finally:
            asyncio.events._set_running_loop(None)
        self.tasks.clear()
        self._ready.clear()
        self._scheduled.clear()
        self.close()

    def _nothing(self, *args: Any, **options: Any) -> Any:
        handle = asyncio.Handle(lambda: None, (), self)
        handle.cancel()
        return handle
