# SPDX-License-Identifier: GPL-2.0-only
"""A QEMU guest with a kernel of your choice: commands run in it, and dumps taken of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

from kvirt.errors import KvirtError
from kvirt.lab import accel, agent, host, sparse
from kvirt.lab.cache import locked
from kvirt.lab.channel import Channel, GuestProcess, Sink
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, silent, step
from kvirt.lab.qmp import Qmp, QmpError
from kvirt.lab.root import get_root
from kvirt.lab.tree import TREE
from kvirt.lab.virtiofs import Share

# drgn needs about 1.5 GB for the debug information of a whole kernel.
DEFAULT_MEMORY = "2560M"
DEFAULT_TIMEOUT = 600.0
# Three seconds are usual without KVM; a busy host takes longer.
BOOT_SECONDS = 120.0
RUNTIME_PREFIX = "kvirt-guest-"
TAIL = 15
PIPE_SIZE = 1 << 20
DUMP_FORMATS = ("elf", "kdump-zlib", "kdump-lzo", "kdump-snappy")
# init.sh writes it to the console as soon as it can.
INIT_MARK = "kvirt: init"


class GuestError(KvirtError):
    """What went wrong with a guest: one sentence, then the end of its console."""


class Guest:
    """A running guest.

    :param kernel: What to boot.
    :param memory: Its memory, as QEMU writes it. Less than 512M turns transparent huge pages off.
    :param timeout: Seconds after which the guest is ended, whatever it does.
    :param append: Words to add to the kernel's command line.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        memory: str = DEFAULT_MEMORY,
        cpus: int = 2,
        timeout: float = DEFAULT_TIMEOUT,
        append: str = "",
        report: Report = silent,
    ) -> None:
        if re.fullmatch(r"\d+[MG]?", memory) is None:
            raise GuestError(f"{memory!r} is no size of memory: write 2560M or 4G, for example.")
        self.kernel = kernel
        self.accelerator = ""
        self._memory = memory if memory[-1] in "MG" else f"{memory}M"
        self._cpus = cpus
        self._timeout = timeout
        self._append = append
        self._report = report
        self._expired = False
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Guest:
        host.require_root("A guest")
        root = get_root(self._report)
        self.accelerator = accel.accelerator(self.kernel.image, self._report)
        for last in (False, True):
            try:
                self._boot(root)
                return self
            except GuestError as error:
                early = self._died_early()
                self._resources.close()
                if last or not early:
                    raise
                self._report(f"{str(error).splitlines()[0]} Trying once more.")
            except BaseException:
                self._resources.close()
                raise
        raise AssertionError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    @property
    def qmp_socket(self) -> Path:
        """A QMP socket that nobody else uses, for a debugger on the host."""
        return self._runtime / "qmp.sock"

    @property
    def console(self) -> Path:
        """The file that has all the guest's kernel has said."""
        return self._runtime / "console"

    def console_tail(self, lines: int = TAIL) -> str:
        """Return the last lines of the guest's console."""
        try:
            text = self.console.read_text(errors="replace")
        except OSError:
            return ""
        printable = re.sub(r"\x1b\[[\d;?=]*[A-Za-z]|[^\x20-\x7e\n\t]", "", text.replace("\r", ""))
        return "\n".join(printable.strip().splitlines()[-lines:])

    def run(
        self,
        argv: Sequence[str],
        timeout: float | None = None,
        check: bool = False,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the guest and return its output and exit status.

        :param check: Raise :class:`GuestError` if the status is not 0.
        """
        process = self.popen(argv)
        if input is not None:
            process.write(input.encode())
        process.close_stdin()
        try:
            status = process.wait(timeout)
        except TimeoutError:
            process.signal()
            raise GuestError(f"`{shlex.join(argv)}` did not end within {timeout:g} s in the guest.") from None
        done = subprocess.CompletedProcess(list(argv), status, process.stdout_text(), process.stderr_text())
        if check and status != 0:
            said = (done.stderr or done.stdout).strip().splitlines()[-TAIL:]
            raise GuestError(
                f"`{shlex.join(argv)}` failed in the guest with exit status {status}.\n" + "\n".join(said)
            )
        return done

    def popen(
        self,
        argv: Sequence[str],
        *,
        tty: bool = False,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> GuestProcess:
        """Start a command in the guest, and leave it running.

        :param stdout: Is given the output as it comes; without it the process keeps it.
        """
        return self._channel.start(argv, tty=tty, stdout=stdout, stderr=stderr)

    def dump(self, path: Path, format: str = "elf") -> Path:
        """Write the guest's memory to a file, while the guest stands still.

        :param format: One of :data:`DUMP_FORMATS`. The kdump ones come in the flattened form.
        """
        if not self._has_vmcoreinfo:
            raise GuestError(
                "The guest's kernel has not handed over its VMCOREINFO, without which a dump cannot "
                "be read: build it with CONFIG_FW_CFG_SYSFS=y and CONFIG_CRASH_DUMP=y."
            )
        try:
            target = path.open("wb")
        except OSError as error:
            raise GuestError(
                f"The dump {path} cannot be written ({error.strerror}): "
                "name a file in a directory that exists."
            ) from error
        with step(self._report, f"Dumping the guest's memory to {path}"), target:
            try:
                self._dump_to(target, format)
            except (QmpError, OSError) as error:
                path.unlink(missing_ok=True)
                raise GuestError(
                    f"The dump {path} could not be written ({error}): check the format and the free space."
                ) from error
        return path

    def _dump_to(self, target: IO[bytes], format: str) -> None:
        ours, theirs = os.pipe()
        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        with ThreadPoolExecutor(1) as pool, os.fdopen(ours, "rb", buffering=0) as source:
            try:
                self._qmp.execute("getfd", fd=theirs, fdname="dump")
            finally:
                os.close(theirs)
            copied = pool.submit(sparse.copy, source, target)
            try:
                self._qmp.execute("dump-guest-memory", paging=False, protocol="fd:dump", format=format)
            finally:
                # Once it writes, QEMU closes its end by itself. It may have refused before.
                with contextlib.suppress(QmpError):
                    self._qmp.execute("closefd", fdname="dump")
            copied.result()

    def _boot(self, root: Path) -> None:
        emulated = "" if self.accelerator == "kvm" else ", emulated"
        with step(self._report, f"Booting Linux {self.kernel.release}{emulated}"):
            self._runtime = self._resources.enter_context(_runtime_directory())
            agent_socket = self._listen("agent.sock")
            control_socket = self._listen("control.sock")
            shares = self._shares(root)
            self._qemu_log = self._runtime / "qemu.log"
            with self._qemu_log.open("wb") as log:
                self._qemu = host.start(self._qemu_arguments(shares), stdout=log, stderr=subprocess.STDOUT)
            self._resources.callback(host.end, self._qemu)
            timer = threading.Timer(self._timeout, self._expire)
            timer.daemon = True
            timer.start()
            self._resources.callback(timer.cancel)
            self._channel = Channel(self._accept(agent_socket), self._death)
            self._resources.callback(self._channel.close)
            self._qmp = Qmp(self._accept(control_socket))
            self._resources.callback(self._qmp.close)
            limit = min(BOOT_SECONDS, self._timeout)
            if not self._channel.wait_hello(limit):
                if self._channel.closed:
                    raise self._death()
                raise GuestError(
                    f"Linux {self.kernel.release} hangs: it has not come up within {limit:g} s "
                    f"with {self.accelerator}.{self._console_paragraph()}"
                )
            assert self._channel.hello is not None
            self._has_vmcoreinfo = bool(self._channel.hello["vmcoreinfo"])
            if not self._has_vmcoreinfo:
                self._report(
                    "The guest's kernel has no qemu_fw_cfg: dumps and debuggers outside the guest "
                    "will lack VMCOREINFO (build it in, CONFIG_FW_CFG_SYSFS=y)."
                )

    def _qemu_arguments(self, shares: list[Share]) -> list[str]:
        runtime = self._runtime
        argv = [host.program("qemu-system-x86_64"), *accel.arguments(self.accelerator)]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-m", self._memory, "-smp", str(self._cpus)]
        # virtiofsd reads and writes the guest's memory, which has to be shared for that.
        argv += ["-object", f"memory-backend-memfd,id=memory,size={self._memory},share=on"]
        argv += ["-machine", "q35,memory-backend=memory", "-device", "vmcoreinfo"]
        argv += ["-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"]
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
        return [*argv, "-kernel", str(self.kernel.image), "-append", self._command_line()]

    def _command_line(self) -> str:
        words = ["console=ttyS0", "root=kvirt-root", "rootfstype=virtiofs", "ro"]
        # A panic ends the guest, whose console has been kept.
        words += ["panic=-1", "init=/usr/sbin/kvirt-init"]
        if self.kernel.vmlinux is not None:
            words.append(f"kvirt.vmlinux={self.kernel.vmlinux.name}")
        if self.kernel.modules is not None:
            words.append("kvirt.modules=1")
        return " ".join([*words, self._append]).strip()

    def _shares(self, root: Path) -> list[Share]:
        directories = {"kvirt-root": root, "kvirt-tree": TREE}
        if self.kernel.vmlinux is not None:
            directories["kvirt-symbols"] = self.kernel.vmlinux.parent
        if self.kernel.modules is not None:
            directories["kvirt-modules"] = self.kernel.modules
        shares = []
        for tag, directory in directories.items():
            share = Share(tag, directory, self._runtime)
            self._resources.callback(share.close)
            shares.append(share)
        return shares

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        self._resources.callback(listener.close)
        listener.bind(str(self._runtime / name))
        listener.listen(1)
        listener.settimeout(0.1)
        return listener

    def _accept(self, listener: socket.socket) -> socket.socket:
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if self._qemu.poll() is not None:
                    raise self._death() from None
            else:
                connection.setblocking(True)
                return connection

    def _expire(self) -> None:
        self._expired = True
        self._qemu.kill()

    def _death(self) -> GuestError:
        """Return the error that says why the guest is gone."""
        # The agent's port closes a moment before QEMU ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._qemu.wait(5)
        release = self.kernel.release
        panic = re.search(r"Kernel panic - not syncing: (.+)", self.console_tail(1000))
        if self._expired:
            what = f"The guest was ended after {self._timeout:g} s, its time limit (--timeout)."
        elif panic is not None:
            what = f"The guest's kernel {release} panicked: {panic[1].strip()}."
        elif self._qemu.poll() is None:
            what = "The guest's agent has hung up, though the guest still runs."
        elif self._qemu.returncode != 0:
            said = self._qemu_log.read_text(errors="replace").strip().splitlines()
            last = said[-1] if said else f"exit status {self._qemu.returncode}"
            what = f"QEMU could not run the guest: {last}."
        elif self._died_early():
            what = f"Linux {release} died while it booted, before it had started its init."
        else:
            what = f"The guest with Linux {release} ended by itself: it was shut down, or it crashed."
        return GuestError(what + self._console_paragraph())

    def _died_early(self) -> bool:
        qemu = getattr(self, "_qemu", None)
        return (
            qemu is not None
            and qemu.poll() == 0
            and not self._expired
            and INIT_MARK not in self.console_tail(1000)
        )

    def _console_paragraph(self) -> str:
        tail = self.console_tail()
        return f" The end of its console:\n{tail}" if tail else " Its console is empty."


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
