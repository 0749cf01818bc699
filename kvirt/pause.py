# SPDX-License-Identifier: GPL-2.0-only
"""Stops a QEMU guest while it is read, and lets it go on whatever happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from kvirt import resume
from kvirt.errors import KvirtError

# Seconds in which QEMU has to answer.
_PATIENCE = 30


class Pause:
    """A guest that stands still.

    QEMU serves one client on a socket, which drgn is as long as it reads. So this speaks on drgn's own
    connection, while drgn does not; and a program of its own holds the connection too, and sends ``cont``
    when kvirt closes a pipe or is killed.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Stop the guest, unless it does not run anyway.

        :param connection: on which drgn has negotiated QMP's capabilities
        :raises KvirtError: if QEMU refuses
        """
        self._connection = connection
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", resume.__file__, str(connection.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[connection.fileno()],
            # Ctrl-C is for kvirt alone.
            start_new_session=True,
            cwd="/",
        )
        try:
            if self._execute("query-status")["running"]:
                # First: a guest that runs takes no harm from being told to.
                assert self._watcher.stdin is not None
                self._watcher.stdin.write(resume.ARMED)
                self._watcher.stdin.flush()
                self._execute("stop")
        except BaseException:
            self.end()
            raise

    def _execute(self, command: str) -> dict[str, object]:
        message = ""
        try:
            self._connection.settimeout(_PATIENCE)
            request = {"execute": command, "id": f"kvirt-{command}"}
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            # A byte at a time: what follows is for drgn.
            while byte := self._connection.recv(1):
                data += byte
                if byte == b"\n":
                    answer = json.loads(data)
                    data = b""
                    if answer.get("id") == request["id"]:
                        if "return" in answer:
                            result: dict[str, object] = answer["return"]
                            return result
                        message = answer["error"]["desc"]
                        break
        except OSError as error:
            message = str(error)
        finally:
            self._connection.settimeout(None)
        raise KvirtError(
            f"QEMU does not obey {command} ({message or 'it hung up'}): leave out --pause, and the "
            "guest is read while it runs."
        )

    def end(self) -> bool:
        """Let the guest go on, if it ran before; returns whether that succeeded."""
        if self._watcher.stdin is not None and not self._watcher.stdin.closed:
            self._watcher.stdin.close()
        return self._watcher.wait() == 0


def connect(path: Path, patience: float) -> socket.socket:
    """Connect to a QMP socket, and see that it answers, without taking the greeting.

    :raises TimeoutError: if it does not within *patience* seconds
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(patience)
        connection.connect(os.fspath(path))
        greeting = connection.recv(4096, socket.MSG_PEEK)
        if b'"QMP"' not in greeting:
            raise KvirtError(f"What listens on {path} does not speak QMP: give --qemu the QMP socket.")
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection
