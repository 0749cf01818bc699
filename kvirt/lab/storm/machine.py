# SPDX-License-Identifier: GPL-2.0-only
"""What the storm needs of the machine: swap, huge pages, KSM, compaction; and the kernel's own counters."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kvirt.lab.procfs import setting_in_force

ZRAM = "/dev/zram0"
ZRAM_SIZE = "256M"
KSM = Path("/sys/kernel/mm/ksm")
HUGEPAGE = Path("/sys/kernel/mm/transparent_hugepage")
VM = Path("/proc/sys/vm")
COMPACT = VM / "compact_memory"

# What is written for the time of the storm. Gentle enough that processes come to run between.
SETTINGS = (
    (HUGEPAGE / "enabled", "madvise"),
    (HUGEPAGE / "khugepaged" / "scan_sleep_millisecs", "500"),
    (HUGEPAGE / "khugepaged" / "pages_to_scan", "1024"),
    (VM / "nr_hugepages", "8"),
    (KSM / "pages_to_scan", "200"),
    (KSM / "sleep_millisecs", "50"),
    (KSM / "run", "1"),
)

# Counters of /proc/vmstat that are printed; those of the storm's own doing have to grow.
COUNTERS = (
    "pgfault",
    "pswpout",
    "pswpin",
    "pgmigrate_success",
    "compact_stall",
    "compact_success",
    "compact_migrate_scanned",
    "thp_fault_alloc",
    "thp_collapse_alloc",
    "thp_split_page",
    "thp_split_pmd",
    "ksm_swpin_copy",
    "cow_ksm",
)
MUST_GROW = (
    "pswpout",
    "pswpin",
    "pgmigrate_success",
    "compact_migrate_scanned",
    "thp_fault_alloc",
    "thp_collapse_alloc",
    "thp_split_pmd",
    "cow_ksm",
)
KSM_PEAKS = ("pages_shared", "pages_sharing")


@contextlib.contextmanager
def prepared() -> Iterator[list[str]]:
    """Swap and settings, as long as the block lasts; gives sentences on what this machine lacks."""
    lacks: list[str] = []
    with contextlib.ExitStack() as undo:
        if len(Path("/proc/swaps").read_text().splitlines()) < 2:
            _swap_on(undo, lacks)
        for path, value in SETTINGS:
            try:
                before = setting_in_force(path.read_text())
                path.write_text(value)
            except OSError as error:
                lacks.append(f"{path} cannot be set to {value}: {error.strerror}.")
                continue
            undo.callback(path.write_text, before)
        yield lacks


def _swap_on(undo: contextlib.ExitStack, lacks: list[str]) -> None:
    def run(*argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True, text=True)

    try:
        run("modprobe", "zram")
        undo.callback(run, "modprobe", "-r", "zram")
        Path("/sys/block/zram0/disksize").write_text(ZRAM_SIZE)
        run("mkswap", ZRAM)
        run("swapon", ZRAM)
        undo.callback(run, "swapoff", ZRAM)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        lacks.append(f"There is no swap, and zram cannot be had: {said}.")


def compact() -> None:
    """Have the kernel move pages together."""
    COMPACT.write_text("1")


def vmstat() -> dict[str, int]:
    """The counters of /proc/vmstat."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(number) for name, number in lines}


class Counters:
    """How far the kernel's counters have grown since this was made."""

    def __init__(self) -> None:
        self._before = vmstat()
        self._peaks: dict[str, int] = {}

    def sample(self) -> None:
        """Look at what KSM shares now, of which the peak is kept."""
        for name in KSM_PEAKS:
            with contextlib.suppress(OSError):
                now = int((KSM / name).read_text())
                self._peaks[f"ksm_{name}_peak"] = max(now, self._peaks.get(f"ksm_{name}_peak", 0))

    def grown(self) -> dict[str, int]:
        """The counters that this kernel has."""
        now = vmstat()
        grown = {name: now[name] - self._before[name] for name in COUNTERS if name in now}
        return grown | self._peaks
