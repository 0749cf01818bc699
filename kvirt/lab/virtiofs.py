# SPDX-License-Identifier: GPL-2.0-only
"""Host directories in the guest, by either of the two virtiofsd programs that Debian has had."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import host

# Debian 13: a package of its own, written in Rust. Debian 12: a part of QEMU, written in C.
RUST = Path("/usr/libexec/virtiofsd")
C = Path("/usr/lib/qemu/virtiofsd")
OPEN_FILES = 1 << 18
# include/uapi/linux/net.h: __SO_ACCEPTCON
_SO_ACCEPTCON = b"%08X" % (1 << 16)
# The strict sandbox wants to make namespaces, which a container may not be allowed to do.
SANDBOXES = ("namespace", "chroot")
# glibc asks for the number of processors before it gives a ninth thread a heap of its own, unless it is told
# how many there may be (malloc/arena.c: arena_get2()). For that the filter of system calls of Debian 12 ends
# it, in the middle of a guest's reading.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "4"}


def find() -> tuple[Path, bool]:
    """Return the program, and whether it is the Rust one."""
    if RUST.exists():
        return RUST, True
    if C.exists():
        return C, False
    found = shutil.which("virtiofsd")
    if found is not None:
        return Path(found), True
    raise KvirtError(
        "virtiofsd is not installed: install the package virtiofsd (Debian 13) or "
        "qemu-system-common (Debian 12; scripts/bootstrap installs the right one)."
    )


def arguments(directory: Path, socket: Path, sandbox: str) -> list[str]:
    """Return the command that serves a directory on a socket."""
    path, rust = find()
    # They keep this kvirt's limit: a container may not allow the one they want, and the C one gives up then.
    common = [str(path), f"--socket-path={socket}", "--thread-pool-size=4", "--rlimit-nofile=0"]
    if rust:
        return [*common, f"--shared-dir={directory}", "--cache=always", f"--sandbox={sandbox}"]
    options = f"source={directory},cache=always,sandbox={sandbox},log_level=err"
    if "," in str(directory):
        raise KvirtError(f"virtiofsd cannot serve {directory}: move it to a path without commas.")
    return [*common, "-o", options]


class Share:
    """A directory that a guest can mount by its tag."""

    def __init__(self, tag: str, directory: Path, runtime: Path) -> None:
        self.tag = tag
        self.socket = runtime / f"{tag}.sock"
        self._log = runtime / f"{tag}.log"
        _raise_file_limit()
        for sandbox in SANDBOXES:
            with self._log.open("wb") as log:
                self._child = host.start(
                    arguments(directory, self.socket, sandbox),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **ENVIRONMENT},
                )
            if self._serves():
                return
            self.close()
        said = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        raise KvirtError(
            f"virtiofsd does not serve {directory}: it must run as root, and may not work in a "
            "container without privileges. It says:\n" + "\n".join(said)
        )

    def qemu_arguments(self) -> list[str]:
        """Return the options that give the share to a QEMU machine."""
        return [
            *("-chardev", f"socket,id={self.tag},path={self.socket}"),
            *("-device", f"vhost-user-fs-pci,chardev={self.tag},tag={self.tag}"),
        ]

    def close(self) -> None:
        """Stop serving."""
        host.end(self._child)

    def _serves(self, limit: float = 10) -> bool:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and self._child.poll() is None:
            if listens(self.socket):
                return True
            time.sleep(0.01)
        return False


def listens(socket: Path) -> bool:
    """Whether somebody waits for connections at a path. The path is there before that, and refuses them."""
    # Num RefCount Protocol Flags Type St Inode Path; net/unix/af_unix.c: unix_seq_show(). Paths are there as
    # they are, those of others too: a line may be a part of one.
    lines = Path("/proc/net/unix").read_bytes().split(b"\n")
    sockets = [line.split(maxsplit=7) for line in lines]
    return any(len(one) == 8 and one[3] == _SO_ACCEPTCON and one[7] == os.fsencode(socket) for one in sockets)


def _raise_file_limit() -> None:
    """Allow many open files: virtiofsd keeps every file open that the guest has looked at."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (OPEN_FILES, hard):
        # A container's root may not go beyond what it has been given.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            return
