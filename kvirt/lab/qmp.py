# SPDX-License-Identifier: GPL-2.0-only
"""The few words of QEMU's machine protocol that the lab needs."""

from __future__ import annotations

import json
import socket
from typing import Any


class QmpError(Exception):
    """QEMU refused a command, in its own words."""


class Qmp:
    """A client on an accepted or connected monitor socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._lines.readline()  # The greeting.
        self.execute("qmp_capabilities")

    def execute(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        """Run a command and return its answer; events in between are passed over.

        :param fd: A file descriptor to hand over with the command.
        """
        request = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            socket.send_fds(self._connection, [request], [] if fd is None else [fd])
            for line in self._lines:
                message = json.loads(line)
                if "error" in message:
                    raise QmpError(message["error"]["desc"])
                if "return" in message:
                    return message["return"]
        except OSError as error:
            raise QmpError(f"the connection failed: {error}") from error
        raise QmpError("QEMU has ended")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
