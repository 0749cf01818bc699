# SPDX-License-Identifier: GPL-2.0-only
"""What user space is told about a process's memory, /proc/PID/maps, smaps and pagemap, and of settings.

The tests hold kvirt's answers against these files, so nothing here may use drgn or the rest of
kvirt.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
PAGE_SHIFT = PAGE_SIZE.bit_length() - 1

# Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
PM_PRESENT = 1 << 63
PM_SWAPPED = 1 << 62
PM_FILE = 1 << 61
PM_EXCLUSIVE = 1 << 56


class Mapping(NamedTuple):
    """One line of /proc/PID/maps."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str


def parse_maps(text: str) -> list[Mapping]:
    """Parse the text of /proc/PID/maps."""
    mappings = []
    for line in text.splitlines():
        # The path is last and may hold blanks; it is missing for anonymous memory.
        addresses, perms, offset, device, inode, *path = line.split(maxsplit=5)
        start, _, end = addresses.partition("-")
        mappings.append(
            Mapping(
                int(start, 16),
                int(end, 16),
                perms,
                int(offset, 16),
                device,
                int(inode),
                path[0] if path else "",
            )
        )
    return mappings


def setting_in_force(text: str) -> str:
    """Return the value of a setting, as it can be written: of a choice, the kernel has it in brackets."""
    _, _, chosen = text.partition("[")
    return chosen.partition("]")[0] or text.strip()


def read_maps(pid: int | str = "self") -> list[Mapping]:
    """Return the mappings of a process, in order of their addresses."""
    return parse_maps(Path(f"/proc/{pid}/maps").read_text())


def find_mapping(mappings: list[Mapping], address: int) -> Mapping | None:
    """Return the mapping that holds an address, or None."""
    return next((m for m in mappings if m.start <= address < m.end), None)


def read_pagemap(pid: int | str, start: int, end: int) -> list[int]:
    """Return the pagemap entries of the pages in [start, end)."""
    size = (end - start >> PAGE_SHIFT) * 8
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        data = os.pread(fd, size, (start >> PAGE_SHIFT) * 8)
    finally:
        os.close(fd)
    return list(memoryview(data).cast("Q"))


def parse_smaps_field(text: str, start: int, field: str) -> int | None:
    """Return a field, in kB, of the mapping that begins at ``start`` in the text of smaps."""
    inside = False
    for line in text.splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            inside = int(first.partition("-")[0], 16) == start
        elif inside and first == field + ":":
            return int(rest.split()[0])
    return None


def smaps_field(pid: int | str, start: int, field: str) -> int | None:
    """Return a field, in kB, of the mapping of a process that begins at ``start``."""
    return parse_smaps_field(Path(f"/proc/{pid}/smaps").read_text(), start, field)
