# SPDX-License-Identifier: GPL-2.0-only
"""Work that another processor does meanwhile."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Generic, TypeVar

from kvirt.errors import KvirtError

T = TypeVar("T")
_Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _put_off() -> Iterator[None]:
    """Nobody's handlers of signals run meanwhile, neither here nor in a process that is begun.

    Blocked signals go to another thread, and have their handlers run here nevertheless.
    """
    came: list[int] = []
    handlers: dict[int, _Handler] = {}
    # Each of these calls runs the handlers of what has come before it, and a handler may raise.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    signal.signal(number, lambda it, frame: came.append(it))
        yield
    finally:
        try:
            for given, before in handlers.items():
                signal.signal(given, before)
            # Still blocked: they come when all is as it was, and none is lost if the first handler raises.
            for again in came:
                signal.raise_signal(again)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Aside(Generic[T]):
    """A function that runs in a process of its own while the context is entered: threads would share one
    interpreter's lock, which whoever loads a library holds."""

    def __init__(self, work: Callable[[], T]) -> None:
        """Prepare.

        :param work: what it returns is pickled
        """
        self._work = work

    def __enter__(self) -> Aside[T]:
        self._result, result = os.pipe()
        self._pid: int | None = None
        try:
            # Handlers of what came meanwhile run when it ends.
            with _put_off():
                # Where there may be no more processes, this one does it.
                with suppress(OSError):
                    self._pid = os.fork()
                if self._pid == 0:
                    for number in _SIGNALS:
                        signal.signal(number, signal.SIG_DFL)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                    os.close(self._result)
                    self._run(result)
                os.close(result)
        except BaseException:
            self._end()
            raise
        return self

    def _run(self, result: int) -> None:
        with suppress(BaseException):
            try:
                answer = pickle.dumps((self._work(), None))
            except KvirtError as error:
                answer = pickle.dumps((None, error))
            with os.fdopen(result, "wb") as file:
                file.write(answer)
        os._exit(0)

    def result(self) -> T:
        """Wait for what the function returns. If that process comes to no end, this one does it again.

        :raises KvirtError: as the function does
        """
        with os.fdopen(os.dup(self._result), "rb") as file:
            answer = file.read()
        try:
            value, refused = pickle.loads(answer)
        except (EOFError, pickle.UnpicklingError):
            return self._work()
        if refused is not None:
            raise refused
        done: T = value
        return done

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        os.close(self._result)
        # Where SIGCHLD is ignored, as whoever started this one may have left it, nobody is left to wait for.
        with suppress(ProcessLookupError, ChildProcessError):
            if self._pid is not None:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
