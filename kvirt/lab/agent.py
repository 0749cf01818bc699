# SPDX-License-Identifier: GPL-2.0-only
"""Runs inside the guest: starts commands for the host and carries their bytes.

Both directions are lines of JSON on one virtio-serial port. Bytes are carried as strings of the
characters U+0000 to U+00FF, which keeps text readable and loses nothing.

From the host: ``{"op": "start", "id", "argv", "tty"}``, and for a started command ``write`` (with
``data``), ``eof``, ``signal`` (with ``signal``), ``resize`` (with ``rows``, ``columns``).
From the guest: ``{"event": "hello", "release", "vmcoreinfo"}`` once, and for a command ``started``
(with ``pid``), ``stdout``/``stderr`` (with ``data``), ``written`` when the command has taken what was
written, and last ``exit`` (with ``status``; death by signal N is 128 + N).

Only the standard library: the guest's root may be anyone's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import queue
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from typing import Any

PORT = "kvirt.agent"
CHUNK = 1 << 16
# How long output is waited for after a command's end: a background child may hold the pipe open.
LINGER = 2.0

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """Return a message as one line."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of one line."""
    message: Message = json.loads(line)
    return message


class Command:
    """One running command."""

    def __init__(self, number: int, argv: list[str], tty: bool, send: Callable[..., None]) -> None:
        self._number = number
        self._send = send
        self._pending: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._terminal: int | None = None
        if tty:
            self._terminal, slave = os.openpty()
            os.set_inheritable(slave, True)
            self._child = subprocess.Popen(argv, preexec_fn=lambda: os.login_tty(slave), close_fds=False)
            os.close(slave)
            readers = [("stdout", self._terminal)]
            self._stdin = os.dup(self._terminal)
        else:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            assert self._child.stdin and self._child.stdout and self._child.stderr
            readers = [
                ("stdout", self._child.stdout.fileno()),
                ("stderr", self._child.stderr.fileno()),
            ]
            self._stdin = self._child.stdin.fileno()
        # Whoever runs out of memory, the agent is spared and its commands are not.
        with contextlib.suppress(OSError):
            pathlib.Path(f"/proc/{self._child.pid}/oom_score_adj").write_text("0")
        send(event="started", id=number, pid=self._child.pid)
        self._pumps = [threading.Thread(target=self._pump, args=r, daemon=True) for r in readers]
        for thread in (*self._pumps, threading.Thread(target=self._feed, daemon=True)):
            thread.start()

    def write(self, data: bytes | None) -> None:
        """Queue bytes for the command's stdin; None closes it."""
        self._pending.put(data)

    def signal(self, number: int) -> None:
        """Send a signal to the command and all it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if self._terminal is not None:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def wait(self) -> None:
        """Wait for the end, and tell the host."""
        status = self._child.wait()
        for pump in self._pumps:
            pump.join(LINGER)
        self._pending.put(None)
        self._send(event="exit", id=self._number, status=status if status >= 0 else 128 - status)

    def _pump(self, name: str, source: int) -> None:
        # A terminal whose last user has gone gives EIO where a pipe gives an end of file.
        with contextlib.suppress(OSError):
            while data := os.read(source, CHUNK):
                self._send(event=name, id=self._number, data=data.decode("latin-1"))

    def _feed(self) -> None:
        while (data := self._pending.get()) is not None:
            # The command may have closed its stdin, or ended: what is written then is lost.
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(self._stdin, data) :]
            self._send(event="written", id=self._number)
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()


class Agent:
    """Serves the host over a port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._commands: dict[int, Command] = {}

    def send(self, **message: Any) -> None:
        """Send one message to the host."""
        data = encode(message)
        # When the host has hung up, serve() ends too.
        with self._lock, contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._port, data) :]

    def serve(self) -> None:
        """Do what the host asks until it hangs up."""
        with os.fdopen(self._port, "rb", closefd=False) as lines:
            for line in lines:
                message = decode(line)
                if message["op"] == "start":
                    self._start(message)
                elif (command := self._commands.get(message["id"])) is not None:
                    self._control(command, message)

    def _start(self, message: Message) -> None:
        # Not in a thread: what the host says next may be for this command.
        number = message["id"]
        try:
            command = Command(number, message["argv"], message.get("tty", False), self.send)
        except OSError as error:
            # As a shell says it, with the shell's statuses.
            text = f"{message['argv'][0]}: {error.strerror}\n"
            self.send(event="stderr", id=number, data=text.encode().decode("latin-1"))
            missing = isinstance(error, FileNotFoundError)
            self.send(event="exit", id=number, status=127 if missing else 126)
            return
        self._commands[number] = command
        threading.Thread(target=self._finish, args=(number, command), daemon=True).start()

    def _finish(self, number: int, command: Command) -> None:
        command.wait()
        del self._commands[number]

    def _control(self, command: Command, message: Message) -> None:
        match message["op"]:
            case "write":
                command.write(message["data"].encode("latin-1"))
            case "eof":
                command.write(None)
            case "signal":
                command.signal(message["signal"])
            case "resize":
                command.resize(message["rows"], message["columns"])


def find_port() -> str:
    """Return the device of the port that the host has given our name."""
    for name in pathlib.Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT:
            return f"/dev/{name.parent.name}"
    sys.exit("kvirt: the host has given this guest no port for the agent")


def main() -> None:
    """Say hello and serve."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("-1000")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    agent = Agent(os.open(find_port(), os.O_RDWR))
    agent.send(
        event="hello",
        release=os.uname().release,
        vmcoreinfo=pathlib.Path("/sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo").is_dir(),
    )
    agent.serve()


if __name__ == "__main__":
    main()
