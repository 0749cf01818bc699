# SPDX-License-Identifier: GPL-2.0-only
"""Lets a QEMU guest go on when kvirt is done with it, or is gone. Run by kvirt.pause as a program of its own.

It waits until nobody holds the other end of its standard input any more, however that came about, and then
sends ``cont`` on the QMP connection that it was given, unless it was never told that the guest was stopped.
"""

import json
import socket
import sys

ARMED = b"s"
_ID = "kvirt-resume"
# Seconds in which QEMU has to answer.
_PATIENCE = 30


def main(fd: int) -> int:
    """Wait and resume.

    :param fd: of the connection, on which QMP's capabilities have been negotiated
    """
    armed = ARMED in sys.stdin.buffer.read()
    if not armed:
        return 0
    with socket.socket(fileno=fd) as connection:
        connection.settimeout(_PATIENCE)
        connection.sendall(json.dumps({"execute": "cont", "id": _ID}).encode() + b"\n")
        # Who was killed may have left an answer of its own.
        for line in connection.makefile("rb"):
            message = json.loads(line)
            if message.get("id") == _ID:
                return 0 if "return" in message else 1
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
