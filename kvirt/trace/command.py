# SPDX-License-Identifier: GPL-2.0-only
"""A command that is traced from its first instruction to its end."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

# As env(1) and shells have it.
NOT_FOUND, NOT_RUN = 127, 126


class CannotRun(Exception):
    """A sentence that says why a command cannot be run."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} cannot be run: {os.strerror(number)}.")
        self.status = NOT_FOUND if number == errno.ENOENT else NOT_RUN


class Command:
    """Forks at once, and executes the command when it is told to; its context ends it.

    :param argv: name, looked up in PATH, and arguments
    :raises CannotRun: if there is no such program
    """

    def __init__(self, argv: Sequence[str]) -> None:
        name = argv[0]
        if shutil.which(name) is None:
            # Before anything is compiled for it.
            raise CannotRun(name, errno.EACCES if "/" in name and Path(name).exists() else errno.ENOENT)
        self._argv = list(argv)
        self._status: int | None = None
        self._started = False
        # The child waits for a byte in the first. From the second comes an errno, or its end when the program
        # was executed.
        waiting, self._holding = os.pipe()
        self._failing, failed = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._holding)
            self._child(waiting, failed)
        os.close(waiting)
        os.close(failed)

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._failing)
        if self._started:
            # Only after an exception does it still run.
            self.signal(signal.SIGTERM)
        else:
            # Sees that nobody writes, and ends.
            os.close(self._holding)
            os.waitpid(self.pid, 0)

    def start(self) -> None:
        """Let the child execute the program.

        :raises CannotRun: if the kernel refuses
        """
        # It may have been killed by now: then that is how it ended.
        with suppress(BrokenPipeError):
            os.write(self._holding, b"1")
        os.close(self._holding)
        self._started = True
        answer = os.read(self._failing, 16)
        if answer:
            raise CannotRun(self._argv[0], int(answer))

    def status(self) -> int | None:
        """The exit status, 128 + N after death by signal N, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code
        return self._status

    def signal(self, number: int) -> None:
        """Send a signal to it, if it still runs."""
        if self.status() is None:
            os.kill(self.pid, number)

    def _child(self, waiting: int, failed: int) -> None:
        """Wait and execute, and never return: what the parent has to do is not to be done twice."""
        try:
            # Python ignores these, and what is ignored stays so through exec.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            # Without an answer the parent is gone, and nobody would trace.
            if os.read(waiting, 1):
                os.execvp(self._argv[0], self._argv)
        except OSError as error:
            os.write(failed, str(error.errno).encode())
        finally:
            os._exit(NOT_RUN)
