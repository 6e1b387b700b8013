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
RESOLUTION_SECONDS = 1e-12


class Process:
    """What can be killed."""

    def __init__(self, name: str, may_raise: tuple[type[BaseException], ...] | None = None) -> None:
        self.name = name
        self.alive = True
        self.context = copy_context()
        self.context.run(PROCESS.set, self)
        self.may_raise = may_raise
        """What its tasks may end with; None: anything, which is somebody else's to look at."""
        self.paused_until = 0.0
        """When the last callback that a pause has held back runs: what comes until then queues up behind it."""
        self.paused_end = 0.0
        """When the pause ends."""
        self.io_seconds: Callable[[], float] = lambda: 0.0
        """How long work in a thread (of the disk) takes."""

    def __repr__(self) -> str:
        return f"<process {self.name}{'' if self.alive else ', dead'}>"


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


class _Task(asyncio.Task[Any]):
    """A task that knows whose it is."""

    process: Process | None


class _Soon(asyncio.Handle):
    """As asyncio.Handle; a simulation makes millions."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, loop: SimLoop, context: Context) -> None:
        self._callback, self._args, self._loop, self._context = callback, args, loop, context
        self._cancelled, self._repr, self._source_traceback = False, None, None


class _Timer(asyncio.TimerHandle):
    """As asyncio.TimerHandle, likewise."""

    __slots__ = ()

    def __init__(self, when: float, callback: Any, args: Any, loop: SimLoop, context: Context) -> None:
        self._when, self._callback, self._args, self._loop, self._context = when, callback, args, loop, context
        self._cancelled, self._repr, self._source_traceback, self._scheduled = False, None, None, False


class Stuck(Exception):
    """Nothing is due, and what was waited for has not come."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module. `now` is in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self._timers: list[tuple[float, int, _Timer]] = []
        """A heap. Timers of one moment fire in the order in which they were set; asyncio promises no order."""
        self.tasks: list[asyncio.Task[Any]] = []  # kept until the end: what a dead process has must not be collected at some time
        self.set_task_factory(self._make_task)
        self.failures: list[str] = []
        self._order = 0
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        """Simulated seconds."""
        return self.now

    def _run_once(self) -> None:
        """One round: time goes on to the next timer, or, as work takes time, too, by a step. Then everything that is due runs."""
        timers, ready = self._timers, self._ready  # type: ignore[attr-defined]
        while timers and timers[0][2]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(timers)[2]._scheduled = False  # type: ignore[attr-defined]
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise Stuck
            if timers[0][0] > self.now:
                self.now = timers[0][0]
            else:
                self.now += STEP_SECONDS
        else:
            self.now += STEP_SECONDS
        due = self.now + RESOLUTION_SECONDS
        while timers and timers[0][0] < due:
            timer = heapq.heappop(timers)[2]
            timer._scheduled = False  # type: ignore[attr-defined]
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler({"message": f"Exception in callback {handle!r}", "exception": error, "handle": handle})

    def _timer_handle_cancelled(self, handle: Any) -> None:
        """It goes when its time has come."""

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Nothing runs because of a collection of garbage."""

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = _Task(coroutine, loop=loop, **options)
        task.process = options.get("context", copy_context()).get(PROCESS)
        self.tasks.append(task)
        if task.process is not None and task.process.may_raise is not None:
            task.add_done_callback(self._look)
        if len(self.tasks) > 4096 and len(self.tasks) % 1024 == 0:
            self.tasks = [t for t in self.tasks if not t.done()]
        return task

    def _look(self, task: asyncio.Task[Any]) -> None:
        process = task.process  # type: ignore[attr-defined]
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, process.may_raise):
            self.failures.append(f"a task of {process.name} ended with {error!r}: {task.get_coro()!r}")

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
        if context is None:
            context = copy_context()
        handle = _Soon(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        process = context.get(PROCESS)
        if process is not None:
            if not process.alive:
                handle.cancel()
            elif process.paused_until > self.now:
                handle.cancel()
                return self.call_at(self._after_pause(process), callback, *args, context=context)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        """As of BaseEventLoop; nothing of a dead process."""
        if context is None:
            context = copy_context()
        process = context.get(PROCESS)
        if process is not None and process.paused_until > when:
            when = self._after_pause(process)
        handle = _Timer(when, callback, args, self, context)
        if process is not None and not process.alive:
            return _cancelled(handle)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, handle))
        handle._scheduled = True  # type: ignore[attr-defined]
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        """As of BaseEventLoop."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    @staticmethod
    def _after_pause(process: Process) -> float:
        """When a callback of a paused process runs: in the order in which they came."""
        process.paused_until += 1e-9
        return process.paused_until

    def pause(self, process: Process, seconds: float) -> None:
        """Nothing of the process runs for a while, as after SIGSTOP; then all that was due does, in order."""
        if process.paused_until >= self.now + seconds:
            return
        end = process.paused_end = process.paused_until = self.now + seconds
        self._put_off(process, lambda when: when < end)

    def resume(self, process: Process) -> None:
        """Ends a pause now: all that it holds back runs, in order."""
        end = process.paused_end
        process.paused_end = process.paused_until = self.now
        self._put_off(process, lambda when: when >= end)

    def _put_off(self, process: Process, those: Callable[[float], bool]) -> None:
        """Timers of a process, by when they were due: until its pause is over, in order."""
        own = sorted(timer for timer in self._timers if those(timer[0]) and _of(timer[2], process))
        if own:
            late = {timer[1] for timer in own}
            self._timers = [timer for timer in self._timers if timer[1] not in late]
            self._timers += [(self._after_pause(process), order, timer) for _, order, timer in own]
            heapq.heapify(self._timers)

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

    def _handles(self) -> list[asyncio.Handle]:
        return [*self._ready, *(timer[2] for timer in self._timers)]  # type: ignore[attr-defined]

    def kill(self, process: Process) -> None:
        """From now on nothing of the process runs."""
        process.alive = False
        for handle in self._handles():
            if _of(handle, process):
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
        for handle in self._handles():
            handle.cancel()
        self.call_soon = self._nothing  # type: ignore[method-assign, assignment]
        self.call_at = self._nothing  # type: ignore[method-assign, assignment]
        asyncio.events._set_running_loop(self)
        try:
            while self.tasks:
                tasks, self.tasks = self.tasks, []  # what ends may begin something
                for task in tasks:
                    if not task.done():
                        task._log_destroy_pending = False  # type: ignore[attr-defined]
                        _end(task.get_coro())
        finally:
            asyncio.events._set_running_loop(None)
        self._ready.clear()  # type: ignore[attr-defined]
        self._timers.clear()
        self.close()

    def _nothing(self, *args: Any, **options: Any) -> Any:
        return _cancelled(_Soon(print, (), self, copy_context()))


def _end(coroutine: Any) -> None:
    """Closes it, however often it waits for something on its way out."""
    while True:
        try:
            coroutine.close()
            return
        except Exception:  # it waits, or a `finally` assumes that it is still needed
            pass


def _of(handle: Any, process: Process) -> bool:
    return handle._context.get(PROCESS) is process


def _cancelled(handle: Any) -> Any:
    handle.cancel()
    return handle
