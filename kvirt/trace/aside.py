# SPDX-License-Identifier: GPL-2.0-only
"""Work that another processor does meanwhile."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from kvirt.errors import KvirtError

T = TypeVar("T")


class Aside(Generic[T]):
    """A function that runs in a process of its own: threads would share one interpreter's lock, which whoever
    loads a library holds."""

    def __init__(self, work: Callable[[], T]) -> None:
        """Begin. What *work* returns is pickled."""
        self._result, result = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(result)
            return
        # Nobody's handlers are to run here, and nobody's context to be left.
        with suppress(BaseException):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            answer: T | Exception
            try:
                answer = work()
            except Exception as error:
                answer = error
            with os.fdopen(result, "wb") as file:
                pickle.dump(answer, file)
        os._exit(0)

    def result(self) -> T:
        """Wait for what the function returns.

        :raises Exception: what it raised
        :raises KvirtError: if it was ended
        """
        with os.fdopen(self._result, "rb") as file:
            answer = file.read()
        os.waitpid(self._pid, 0)
        if not answer:
            raise KvirtError("A process that kvirt had started was ended by somebody: run kvirt again.")
        value: T | Exception = pickle.loads(answer)
        if isinstance(value, Exception):
            raise value
        return value
