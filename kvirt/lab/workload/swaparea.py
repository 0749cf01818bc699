# SPDX-License-Identifier: GPL-2.0-only
"""A swap area in compressed memory (zram), for a machine that has none."""

from __future__ import annotations

import os
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.process import Skip

CONTROL = Path("/sys/class/zram-control")
SIZE = 64 << 20


class SwapArea:
    """A zram device of its own, with swap on it while it is open."""

    def __init__(self) -> None:
        """Make the device.

        :raises Skip: if the kernel has no zram
        """
        if not CONTROL.exists():
            with suppress(FileNotFoundError):
                subprocess.run(["modprobe", "-q", "zram"], check=False)
        if not CONTROL.exists():
            raise Skip("This kernel has no zram to swap to: it needs CONFIG_ZRAM, or its module zram.ko.")
        self._number = int((CONTROL / "hot_add").read_text())
        self._device = Path(f"/sys/block/zram{self._number}")
        self._on = False
        self.path = f"/dev/zram{self._number}"

    def open(self) -> None:
        """Give it a size and a header, and begin to swap to it."""
        (self._device / "disksize").write_text(str(SIZE))
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, swap_header(SIZE // PAGE_SIZE))
            os.fsync(fd)
        finally:
            os.close(fd)
        sc.swapon(self.path)
        self._on = True

    def close(self) -> None:
        """Take everything back, and remove the device."""
        if self._on:
            sc.swapoff(self.path)
        (self._device / "reset").write_text("1")
        (CONTROL / "hot_remove").write_text(str(self._number))


def swap_header(pages: int) -> bytes:
    """The first page of a swap area: ``union swap_header``, include/linux/swap.h."""
    header = bytearray(PAGE_SIZE)
    # Version, last page, number of bad pages; the boot block before them is left alone.
    struct.pack_into("=III", header, 1024, 1, pages - 1, 0)
    header[-10:] = b"SWAPSPACE2"
    return bytes(header)
