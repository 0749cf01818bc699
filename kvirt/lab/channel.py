# SPDX-License-Identifier: GPL-2.0-only
"""The host's end of the agent's port: commands in the guest as objects."""

from __future__ import annotations

import io
import itertools
import signal as signals
import socket
import threading
import time
from collections.abc import Callable, Sequence

from kvirt.lab.agent import CHUNK, Message, decode, encode

Sink = Callable[[bytes], None]
"""Takes output as it comes, on the channel's thread; a slow one slows the guest's command down."""


class GuestProcess:
    """A command in the guest."""

    def __init__(
        self, channel: Channel, number: int, argv: Sequence[str], stdout: Sink | None, stderr: Sink | None
    ) -> None:
        self.argv = list(argv)
        self._channel = channel
        self._number = number
        self._changed = threading.Condition()
        self._pid: int | None = None
        self._status: int | None = None
        self._unwritten = 0
        self._sink_error: OSError | None = None
        self._sinks = {"stdout": stdout, "stderr": stderr}
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._read = 0

    @property
    def pid(self) -> int:
        """The process's id in the guest."""
        self._until(lambda: self._pid is not None or self._status is not None, None)
        return self._pid or 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit status, 128 + N after death by signal N.

        Raises TimeoutError after ``timeout`` seconds.
        """
        self._until(lambda: self._status is not None, timeout)
        assert self._status is not None
        return self._status

    def readline(self, timeout: float | None = None) -> str:
        """Return the next line of stdout, or what is left of it at the end ("" if nothing is).

        Raises TimeoutError after ``timeout`` seconds.
        """
        output = self._output["stdout"]
        self._until(lambda: b"\n" in output[self._read :] or self._status is not None, timeout)
        end = output.find(b"\n", self._read)
        end = len(output) if end < 0 else end + 1
        line = bytes(output[self._read : end])
        self._read = end
        return line.decode(errors="replace")

    def stdout_text(self) -> str:
        """Return all of stdout up to now, what was read by lines too."""
        return self._output["stdout"].decode(errors="replace")

    def stderr_text(self) -> str:
        """Return all of stderr up to now."""
        return self._output["stderr"].decode(errors="replace")

    def write(self, data: bytes) -> None:
        """Write to stdin; returns when the command has taken it."""
        for start in range(0, len(data), CHUNK):
            with self._changed:
                self._unwritten += 1
            self._tell("write", data=data[start : start + CHUNK].decode("latin-1"))
            self._until(lambda: self._unwritten == 0 or self._status is not None, None)

    def close_stdin(self) -> None:
        """Close stdin."""
        self._tell("eof")

    def signal(self, number: int = signals.SIGKILL) -> None:
        """Send a signal to the command and what it has started."""
        self._tell("signal", signal=int(number))

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        self._tell("resize", rows=rows, columns=columns)

    def receive(self, message: Message) -> None:
        """Take a message of the agent. The channel calls this."""
        event = message["event"]
        if event in self._sinks:
            data = message["data"].encode("latin-1")
            sink = self._sinks[event]
            if sink is not None:
                self._pour(sink, data)
                return
        with self._changed:
            match event:
                case "started":
                    self._pid = message["pid"]
                case "stdout" | "stderr":
                    self._output[event] += data
                case "written":
                    self._unwritten -= 1
                case "exit":
                    self._status = message["status"]
            self._changed.notify_all()

    def wake(self) -> None:
        """Let waiting threads look at the channel again. The channel calls this."""
        with self._changed:
            self._changed.notify_all()

    def _pour(self, sink: Sink, data: bytes) -> None:
        if self._sink_error is None:
            try:
                sink(data)
            except OSError as error:
                # Not this thread's matter: the one that waits is told.
                self._sink_error = error
                self.wake()

    def _tell(self, op: str, **fields: object) -> None:
        if self._status is None:
            self._channel.send({"op": op, "id": self._number, **fields})

    def _until(self, done: Callable[[], bool], timeout: float | None) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: done() or self._sink_error is not None or self._channel.closed, timeout
            )
            if self._sink_error is not None:
                raise self._sink_error
            if done():
                return
        if self._channel.closed:
            raise self._channel.why_closed()
        raise TimeoutError


class Channel:
    """Starts commands through the agent, and hands each its messages.

    :param why_closed: Makes the error to raise when the guest's end has gone.
    """

    def __init__(self, connection: socket.socket, why_closed: Callable[[], Exception]) -> None:
        self.closed = False
        self.why_closed = why_closed
        self.hello: Message | None = None
        self._connection = connection
        self._lines: io.BufferedReader = connection.makefile("rb")
        self._sending = threading.Lock()
        self._said_hello = threading.Event()
        self._numbers = itertools.count(1)
        self._processes: dict[int, GuestProcess] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def wait_hello(self, timeout: float) -> bool:
        """Wait until the agent serves, or the channel is closed; False when neither came about."""
        deadline = time.monotonic() + timeout
        while not self._said_hello.wait(0.1):
            if self.closed or time.monotonic() > deadline:
                break
        return self._said_hello.is_set()

    def start(
        self,
        argv: Sequence[str],
        *,
        tty: bool = False,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> GuestProcess:
        """Start a command in the guest."""
        number = next(self._numbers)
        process = GuestProcess(self, number, argv, stdout, stderr)
        self._processes[number] = process
        self.send({"op": "start", "id": number, "argv": list(argv), "tty": tty})
        return process

    def send(self, message: Message) -> None:
        """Send one message to the agent."""
        try:
            with self._sending:
                self._connection.sendall(encode(message))
        except OSError as error:
            raise self.why_closed() from error

    def _serve(self) -> None:
        try:
            for line in self._lines:
                message = decode(line)
                if message["event"] == "hello":
                    self.hello = message
                    self._said_hello.set()
                elif (process := self._processes.get(message["id"])) is not None:
                    process.receive(message)
                    if message["event"] == "exit":
                        del self._processes[message["id"]]
        except (OSError, ValueError):
            # The guest is gone, in the middle of a line perhaps.
            pass
        finally:
            self.closed = True
            self._lines.close()
            for process in list(self._processes.values()):
                process.wake()
