# SPDX-License-Identifier: GPL-2.0-only
"""A guest with a kernel of your choice: commands run in it, and dumps taken of it."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kvirt.lab import accel, capture, defaults, host, vmcore
from kvirt.lab.channel import Channel, GuestProcess, Sink
from kvirt.lab.kernels import Kernel
from kvirt.lab.machine import TAIL, GuestError, Machine, Specification
from kvirt.lab.progress import Report, silent, step
from kvirt.lab.qmp import Qmp, QmpError
from kvirt.lab.root import get_root

__all__ = ["Guest", "GuestError", "GuestProcess"]

# Ten seconds are usual without KVM; a busy host takes longer.
BOOT_SECONDS = 120.0
# An emulated processor now and then dies over code that another one is patching (docs/decisions.md).
BOOT_ATTEMPTS = 3


class Guest:
    """A guest that runs while its context is entered.

    :param kernel: What to boot.
    :param memory: Its memory, as QEMU writes it. Less than 512M turns transparent huge pages off.
    :param timeout: Seconds after which the guest is ended, whatever it does.
    :param append: Words to add to the kernel's command line.
    :param suite: The Debian that its user space is from.
    :param output: A directory for what :func:`kvirt.lab.capture.crash` saves. With it the guest sets memory
        aside for a capture kernel.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        memory: str = defaults.MEMORY,
        cpus: int = defaults.CPUS,
        timeout: float = defaults.TIMEOUT,
        append: str = "",
        suite: str = defaults.SUITE,
        output: Path | None = None,
        report: Report = silent,
    ) -> None:
        if re.fullmatch(r"\d+[MG]", memory) is None:
            raise GuestError(f"{memory!r} is no size of memory: write 2560M or 4G, for example.")
        self.kernel = kernel
        self.accelerator = ""
        self._memory = memory
        self._cpus = cpus
        self._timeout = timeout
        self._suite = suite
        self.output = output
        self._append = append if output is None else f"{capture.RESERVED} {append}"
        self.report = report

    def __enter__(self) -> Guest:
        host.require_root("A guest")
        root = get_root(self.report, () if self.output is None else capture.PACKAGES, self._suite)
        self.accelerator = accel.accelerator(self.kernel.image, self.report)
        spec = Specification(
            self.kernel,
            root,
            self.accelerator,
            self._memory,
            self._cpus,
            self._timeout,
            self._append,
            self.output,
        )
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            if self._boot(spec, last=attempt == BOOT_ATTEMPTS):
                break
        if not self._has_vmcoreinfo:
            self.report(
                "The guest's kernel has no qemu_fw_cfg: dumps and debuggers outside the guest will lack "
                "VMCOREINFO (build it in, CONFIG_FW_CFG_SYSFS=y)."
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._machine.close()

    @property
    def qmp_socket(self) -> Path:
        """A QMP socket that nobody else uses, for a debugger on the host."""
        return self._machine.qmp_socket

    def console_tail(self, lines: int = TAIL) -> str:
        """Return the last lines of the guest's console."""
        return self._machine.console_tail(lines)

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
                f"`{shlex.join(argv)}` failed in the guest with exit status {status}.",
                "\n" + "\n".join(said),
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

        :param format: One of :data:`kvirt.lab.defaults.DUMP_FORMATS`. The kdump ones come flattened.
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
        with step(self.report, f"Dumping the guest's memory to {path}", "dump"), target:
            try:
                vmcore.write(self._qmp, target, format)
            except (QmpError, OSError) as error:
                path.unlink(missing_ok=True)
                raise GuestError(
                    f"The dump {path} could not be written ({error}): check the format and the free space."
                ) from error
        return path

    def stop(self) -> None:
        """Have the guest stand still from now on, so that all dumps of it are of the same moment.

        Commands in it get no further.
        """
        self._qmp.execute("stop")

    def wait_end(self, mark: str) -> None:
        """Wait until the guest has ended by itself.

        :param mark: What its console must have said last.
        :raises GuestError: if it has not, or if the guest's time is over
        """
        self._machine.wait_end(mark)

    def _boot(self, spec: Specification, *, last: bool) -> bool:
        """Boot; False means that the guest died of what another try may be spared."""
        emulated = "" if spec.accelerator == "kvm" else ", emulated"
        with step(self.report, f"Booting Linux {self.kernel.release}{emulated}", "boot"):
            self._machine = Machine(spec)
            try:
                self._channel = Channel(self._machine.agent, self._machine.death)
                if self._channel.wait_hello(BOOT_SECONDS):
                    assert self._channel.hello is not None
                    self._has_vmcoreinfo = bool(self._channel.hello["vmcoreinfo"])
                    self._qmp = Qmp(self._machine.control)
                    return True
                if not self._channel.closed:
                    raise self._machine.hang(BOOT_SECONDS)
                error = self._machine.death()
                if last or not self._machine.crashed():
                    raise error
            except BaseException:
                self._machine.close()
                raise
            self._machine.close()
        self.report(f"{error.sentence} Trying again.")
        return False
