# SPDX-License-Identifier: GPL-2.0-only
"""The host's programs: found, started so that they cannot outlive kvirt, and asked to end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from kvirt.errors import KvirtError

# The Debian package that has the program.
PACKAGES = {
    "apt-cache": "apt",
    "apt-config": "apt",
    "chroot": "coreutils",
    "apt-get": "apt",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "fallocate": "util-linux",
    "make": "make",
    "mmdebstrap": "mmdebstrap",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
}
# A user's PATH often leaves these out, and depmod lives there.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


_children: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()
_ending = threading.Event()


def program(name: str) -> str:
    """Return the path of a host program, or say which package has it."""
    found = shutil.which(name, path=SEARCH_PATH)
    if found is None:
        raise KvirtError(
            f"{name} is not installed: install the package {PACKAGES[name]}, or run scripts/bootstrap, which "
            "installs all but what arm64 guests need."
        )
    return found


def require_root(what: str) -> None:
    """Refuse to go on without root, naming what needs it."""
    if os.geteuid() != 0:
        raise KvirtError(f"{what} needs root: run the same command with sudo.")


def start(
    argv: Sequence[str | Path],
    *,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child that is killed when this kvirt ends, however it ends.

    The child has its own session: Ctrl-C reaches kvirt alone, which then ends its children in order.
    setpriv sets the parent-death signal, so that no Python code runs between fork and exec.
    """
    if _ending.is_set():
        raise KvirtError("kvirt has been interrupted: run it again.")
    setpriv = [program("setpriv"), "--pdeathsig", "KILL", "--"]
    child = subprocess.Popen(
        [*setpriv, *map(str, argv)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=pass_fds,
        env=env,
    )
    _children.add(child)
    return child


def family(argv: Sequence[str | Path]) -> list[str | Path]:
    """Return the command that runs ``argv`` so that all it starts ends with it, where that is possible.

    It is given a namespace of processes, which the kernel clears when its first one ends. A container may
    not allow that.
    """
    unshare = [program("unshare"), "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return [*unshare, "--", *argv] if run([*unshare, "--", "true"]).returncode == 0 else list(argv)


def end_all() -> None:
    """End all children, whatever thread waits for them, and let nobody start another."""
    _ending.set()
    for child in list(_children):
        end(child, grace=0.2)


def run(argv: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return its output and status."""
    child = start(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = child.communicate()
    finally:
        end(child)
    return subprocess.CompletedProcess(
        list(argv), child.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )


def end(child: subprocess.Popen[bytes], grace: float = 2) -> None:
    """End a child and what it has started: politely, then after ``grace`` seconds not."""
    if child.poll() is not None:
        return
    _signal_session(child, signal.SIGTERM)
    deadline = time.monotonic() + grace
    # Not reaped yet, so that its id stays its own until all of its session have got the last signal.
    with contextlib.suppress(ChildProcessError):
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        _signal_session(child, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 1
    while _signal_session(child, 0) and time.monotonic() < deadline:
        time.sleep(0.005)


def _signal_session(child: subprocess.Popen[bytes], number: int) -> bool:
    """Signal all processes of the child's session; False if there are none left."""
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
