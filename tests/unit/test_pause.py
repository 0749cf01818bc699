# SPDX-License-Identifier: GPL-2.0-only
"""A guest that is stopped goes on, however kvirt ends. QEMU is a thread here that speaks its protocol."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvirt.errors import KvirtError
from kvirt.pause import Pause, connect

TREE = Path(__file__).resolve().parents[2]


class Qemu:
    """One client's monitor, which remembers what it was told."""

    def __init__(self, path, status="running", refuses=()):
        self.status, self.refuses, self.told = status, refuses, []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        connection, _ = self._listener.accept()
        with connection:
            self._say(connection, {"QMP": {"version": {}, "capabilities": []}})
            for line in connection.makefile("rb"):
                request = json.loads(line)
                command = request["execute"]
                self.told.append(command)
                answer = {"id": request["id"]} if "id" in request else {}
                if command in self.refuses:
                    self._say(connection, {"error": {"class": "GenericError", "desc": "not now"}, **answer})
                    continue
                result = {}
                if command == "query-status":
                    result = {"running": self.status == "running", "status": self.status}
                if command in ("stop", "cont"):
                    self.status = {"stop": "paused", "cont": "running"}[command]
                    self._say(connection, {"event": {"stop": "STOP", "cont": "RESUME"}[command]})
                self._say(connection, {"return": result, **answer})

    @staticmethod
    def _say(connection, message):
        connection.sendall(json.dumps(message).encode() + b"\r\n")

    def hang_up(self):
        """Wait until nobody is connected any more."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()


def negotiated(path):
    """What drgn does with a connection."""
    connection = connect(path, 5)
    assert b"QMP" in connection.recv(4096)
    connection.sendall(b'{"execute": "qmp_capabilities"}\n')
    assert b"return" in connection.recv(4096)
    return connection


@pytest.fixture
def path(tmp_path):
    return tmp_path / "qmp.sock"


def test_guest_is_stopped_and_goes_on(path):
    qemu = Qemu(path)
    with negotiated(path) as connection:
        pause = Pause(connection)
        assert qemu.status == "paused"
        assert pause.end()
        assert pause.end()
    qemu.hang_up()
    assert qemu.status == "running"
    assert qemu.told == ["qmp_capabilities", "query-status", "stop", "cont"]


def test_guest_that_did_not_run_is_left_alone(path):
    qemu = Qemu(path, status="paused")
    with negotiated(path) as connection:
        assert Pause(connection).end()
    qemu.hang_up()
    assert qemu.told == ["qmp_capabilities", "query-status"]


@pytest.mark.parametrize("command", ["query-status", "stop"])
def test_refusal_is_a_sentence(path, command):
    qemu = Qemu(path, refuses=(command,))
    with negotiated(path) as connection, pytest.raises(KvirtError, match=rf"obey {command} \(not now\)"):
        Pause(connection)
    qemu.hang_up()
    assert qemu.status == "running"


def test_guest_that_cannot_go_on_is_told(path):
    qemu = Qemu(path, refuses=("cont",))
    with negotiated(path) as connection:
        assert not Pause(connection).end()
    qemu.hang_up()


ENDS = """
import signal, sys
from pathlib import Path
from tests.unit.test_pause import negotiated
from kvirt.pause import Pause
pause = Pause(negotiated(Path(sys.argv[1])))
print("stopped", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError
signal.pause()
"""


@pytest.mark.parametrize("how", ["raise", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_happens(path, how):
    qemu = Qemu(path)
    child = subprocess.Popen(
        [sys.executable, "-c", ENDS, str(path), str(how)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=TREE,
        start_new_session=True,
    )
    with child:
        assert child.stdout.readline() == b"stopped\n"
        if how != "raise":
            # As a terminal does it, to all of them.
            os.killpg(child.pid, how)
        try:
            assert child.wait(10) != 0
        finally:
            child.kill()
    qemu.hang_up()
    assert qemu.status == "running"
    assert qemu.told[-2:] == ["stop", "cont"]


def test_silence_is_not_waited_for(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(TimeoutError):
            connect(path, 0.1)
