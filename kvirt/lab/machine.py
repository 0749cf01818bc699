# SPDX-License-Identifier: GPL-2.0-only
"""One QEMU process: what it is started with, its sockets and console, and why it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import accel, agent, capture, host
from kvirt.lab.cache import locked
from kvirt.lab.kernels import Kernel
from kvirt.lab.tree import TREE
from kvirt.lab.virtiofs import Share

RUNTIME_PREFIX = "kvirt-guest-"
# init.sh writes it to the console as soon as it can.
INIT_MARK = "kvirt: init"
TAIL = 15
OOPS = re.compile(r"BUG: |Oops: |Kernel panic - ")
# What a console is sent beside text: colours, cursor movements.
CONTROL = re.compile(r"\x1b\[[\d;?=]*[A-Za-z]|[^\x20-\x7e\n\t]")


class GuestError(KvirtError):
    """What went wrong with a guest: one sentence, then the end of what it said."""

    def __init__(self, sentence: str, said: str = "") -> None:
        self.sentence = sentence
        super().__init__(sentence + said)


@dataclass(frozen=True)
class Specification:
    """What to start."""

    kernel: Kernel
    root: Path
    accelerator: str
    memory: str
    cpus: int
    timeout: float
    append: str = ""
    output: Path | None = None
    """A directory that the guest may write to, by :data:`kvirt.lab.capture.TAG`."""


class Machine:
    """A running QEMU. Everything it needed is ended and removed by :meth:`close`."""

    def __init__(self, specification: Specification) -> None:
        self._spec = specification
        self._expired = False
        with contextlib.ExitStack() as resources:
            self._runtime = resources.enter_context(_runtime_directory())
            agent_listener = self._listen("agent.sock", resources)
            control_listener = self._listen("control.sock", resources)
            shares = self._start_shares(resources)
            with self._log.open("wb") as log:
                self._qemu = host.start(self._arguments(shares), stdout=log, stderr=subprocess.STDOUT)
            resources.callback(host.end, self._qemu)
            timer = threading.Timer(specification.timeout, self._expire)
            timer.daemon = True
            timer.start()
            resources.callback(timer.cancel)
            self.agent = self._accept(agent_listener, resources)
            self.control = self._accept(control_listener, resources)
            # From here on the caller closes.
            self._resources = resources.pop_all()

    @property
    def qmp_socket(self) -> Path:
        """A QMP socket that nobody else uses."""
        return self._runtime / "qmp.sock"

    def close(self) -> None:
        """End it."""
        self._resources.close()

    def console_tail(self, lines: int = TAIL) -> str:
        """Return the last lines of the console."""
        try:
            text = self._console.read_text(errors="replace")
        except OSError:
            return ""
        printable = CONTROL.sub("", text.replace("\r", ""))
        return "\n".join(printable.strip().splitlines()[-lines:])

    def hang(self, limit: float) -> GuestError:
        """Return the error for a guest that has not come up in time."""
        return GuestError(
            f"Linux {self._spec.kernel.release} hangs: it has not come up within {limit:g} s "
            f"with {self._spec.accelerator}.",
            self._console_paragraph(),
        )

    def death(self) -> GuestError:
        """Return the error that says why the guest is gone."""
        # A guest's connections close a moment before QEMU ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._qemu.wait(5)
        release = self._spec.kernel.release
        console = self.console_tail(1000)
        panic = re.search(r"Kernel panic - not syncing: (.+)", console)
        if self._expired:
            what = f"The guest was ended after {self._spec.timeout:g} s, its time limit (--timeout)."
        elif panic is not None:
            what = f"The guest's kernel {release} panicked: {panic[1].strip()}."
        elif self._qemu.poll() is None:
            what = "The guest's agent has hung up, though the guest still runs."
        elif self._qemu.returncode != 0:
            said = self._log.read_text(errors="replace").strip().splitlines()
            last = said[-1] if said else f"exit status {self._qemu.returncode}"
            what = f"QEMU could not run the guest: {last}."
        elif INIT_MARK not in console:
            what = f"Linux {release} died while it booted, before it had started its init."
        else:
            what = f"The guest with Linux {release} ended by itself: it was shut down, or it crashed."
        return GuestError(what, self._console_paragraph())

    def crashed(self) -> bool:
        """Say whether the guest has ended by itself."""
        return not self._expired and self._qemu.poll() == 0

    def wait_end(self, mark: str) -> None:
        """Wait until the guest has ended by itself, and has said a last word on its console.

        :raises GuestError: if it has not said it
        """
        self._qemu.wait()
        tail = self.console_tail()
        if self._expired:
            what = f"The guest was ended after {self._spec.timeout:g} s, its time limit (--timeout)."
        elif mark not in tail:
            what = "The guest crashed, and its memory could not be saved."
        else:
            return
        raise GuestError(what, f" The end of its console:\n{tail}")

    @property
    def _console(self) -> Path:
        return self._runtime / "console"

    @property
    def _log(self) -> Path:
        return self._runtime / "qemu.log"

    def _arguments(self, shares: list[Share]) -> list[str]:
        spec, runtime = self._spec, self._runtime
        argv = [host.program("qemu-system-x86_64"), *accel.arguments(spec.accelerator)]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-m", spec.memory, "-smp", str(spec.cpus)]
        # virtiofsd reads and writes the guest's memory, which has to be shared for that.
        argv += ["-object", f"memory-backend-memfd,id=memory,size={spec.memory},share=on"]
        argv += ["-machine", "q35,memory-backend=memory", "-device", "vmcoreinfo"]
        argv += ["-chardev", f"file,id=console,path={self._console}", "-serial", "chardev:console"]
        # Two monitors, since each takes one client.
        argv += ["-chardev", f"socket,id=control,path={runtime / 'control.sock'}"]
        argv += ["-mon", "chardev=control,mode=control"]
        argv += ["-chardev", f"socket,id=users,path={self.qmp_socket},server=on,wait=off"]
        argv += ["-mon", "chardev=users,mode=control"]
        argv += ["-device", "virtio-serial-pci"]
        argv += ["-chardev", f"socket,id=agent,path={runtime / 'agent.sock'}"]
        argv += ["-device", f"virtserialport,chardev=agent,name={agent.PORT}"]
        for share in shares:
            argv += share.qemu_arguments()
        if spec.kernel.initramfs is not None:
            argv += ["-initrd", str(spec.kernel.initramfs)]
        return [*argv, "-kernel", str(spec.kernel.image), "-append", self._command_line()]

    def _command_line(self) -> str:
        words = ["console=ttyS0", "root=kvirt-root", "rootfstype=virtiofs", "ro"]
        # A panic ends the guest, whose console has been kept.
        words += ["panic=-1", "init=/usr/sbin/kvirt-init"]
        if self._spec.kernel.vmlinux is not None:
            words.append(f"kvirt.vmlinux={self._spec.kernel.vmlinux.name}")
        if self._spec.kernel.modules is not None:
            words.append("kvirt.modules=1")
        return " ".join([*words, self._spec.append]).strip()

    def _start_shares(self, resources: contextlib.ExitStack) -> list[Share]:
        kernel = self._spec.kernel
        directories = {"kvirt-root": self._spec.root, "kvirt-tree": TREE}
        if kernel.vmlinux is not None:
            directories["kvirt-symbols"] = kernel.vmlinux.parent
        if kernel.modules is not None:
            directories["kvirt-modules"] = kernel.modules
        if self._spec.output is not None:
            directories[capture.TAG] = self._spec.output
        shares = []
        for tag, directory in directories.items():
            share = Share(tag, directory, self._runtime)
            resources.callback(share.close)
            shares.append(share)
        return shares

    def _listen(self, name: str, resources: contextlib.ExitStack) -> socket.socket:
        listener = resources.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self._runtime / name))
        listener.listen(1)
        listener.settimeout(0.1)
        return listener

    def _accept(self, listener: socket.socket, resources: contextlib.ExitStack) -> socket.socket:
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if self._qemu.poll() is not None:
                    raise self.death() from None
            else:
                connection.setblocking(True)
                return resources.enter_context(connection)

    def _expire(self) -> None:
        self._expired = True
        self._qemu.kill()

    def _console_paragraph(self) -> str:
        lines = self.console_tail(1000).splitlines()
        # The trace of a panic can be longer than what is shown: its beginning tells most.
        oops = next((n for n, line in enumerate(lines) if OOPS.search(line)), None)
        if oops is not None:
            return " Its console, from there on:\n" + "\n".join(lines[oops : oops + TAIL])
        return " The end of its console:\n" + "\n".join(lines[-TAIL:]) if lines else " Its console is empty."


@contextlib.contextmanager
def _runtime_directory() -> Iterator[Path]:
    """Make a directory for one guest's sockets; remove those whose kvirt has been killed."""
    with locked("guests"):
        for old in Path(tempfile.gettempdir()).glob(RUNTIME_PREFIX + "*"):
            with contextlib.suppress(OSError), (old / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=RUNTIME_PREFIX))
        lock = (path / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with lock:
            if len(os.fsencode(path / "kvirt-symbols.sock")) > 107:
                raise KvirtError(
                    f"The temporary directory {path.parent} has too long a path for sockets: "
                    "set TMPDIR to a shorter one, such as /tmp."
                )
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
