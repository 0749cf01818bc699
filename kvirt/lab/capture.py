# SPDX-License-Identifier: GPL-2.0-only
"""Guests that really crash: a capture kernel saves their memory, as on machines in production."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvirt.lab import defaults
from kvirt.lab.progress import Report, silent, step

if TYPE_CHECKING:
    from kvirt.lab.guest import Guest

# What the root of such a guest has beside the usual packages.
PACKAGES = ("kexec-tools", "makedumpfile")
# Memory that the capture kernel gets, which boots with half of it.
RESERVED = "crashkernel=320M"
# Words of the kernel's command line that the capture kernel does without. The symbols are of no use to it.
DROPPED = ("crashkernel=", "kvirt.")
# Seconds for loading it, without KVM on a busy machine.
LOAD_SECONDS = 120.0
IMAGE, INITRAMFS = "vmlinuz", "initramfs"
TAG = "kvirt-output"

LOAD = f"""\
mkdir /run/output && mount -t virtiofs {TAG} /run/output || exit
exec kexec -s -p /run/output/{IMAGE} "$@"
"""
# Says that all has been saved; the last line of capture.sh.
SAVED = "kvirt: saved all"


def what(level: int, compression: str) -> str:
    """Name what to save: kdump-compressed, without what a dump level leaves out (makedumpfile(8))."""
    return f"{defaults.COMPRESSIONS[compression]}{level}"


# And this names /proc/vmcore as it is.
ELF = "elf"


def crash(guest: Guest, saves: Sequence[str], report: Report = silent) -> list[Path]:
    """Crash a guest, and return the files in its output directory in which its memory was saved.

    The guest has ended then. What makedumpfile said lies beside each file, as ``NAME.log``.

    :param guest: one with an output directory
    :param saves: any of :func:`what` and :data:`ELF`
    :raises GuestError: if it cannot be done, with the end of the console
    """
    output = guest.output
    assert output is not None
    with step(report, "Loading the capture kernel", "capture kernel"):
        shutil.copyfile(guest.kernel.image, output / IMAGE)
        words = guest.run(["cat", "/proc/cmdline"], check=True).stdout.split()
        words = [word for word in words if not word.startswith(DROPPED)]
        words += ["nr_cpus=1", "reset_devices", f"kvirt.capture={','.join(saves)}"]
        arguments = [f"--append={' '.join(words)}"]
        if guest.kernel.initramfs is not None:
            shutil.copyfile(guest.kernel.initramfs, output / INITRAMFS)
            arguments.append(f"--initrd=/run/output/{INITRAMFS}")
        guest.run(["sh", "-c", LOAD, "sh", *arguments], LOAD_SECONDS, check=True)
    with step(report, "Crashing it, and saving its memory", "crash"):
        guest.popen(["sh", "-c", "echo c >/proc/sysrq-trigger"])
        guest.wait_end(SAVED)
    logs = [output / f"{save}.log" for save in saves]
    said = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
    # Of kernels newer than it, as Debian's newest are: what it leaves out then is a guess.
    for line in dict.fromkeys(line.strip() for line in said if "not supported" in line):
        report(f"makedumpfile says: {line}")
    return [output / save for save in saves]
