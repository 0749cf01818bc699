# SPDX-License-Identifier: GPL-2.0-only
"""What the headers of a kdump-compressed core say, flattened or not, that libkdumpfile does not pass on."""

from __future__ import annotations

import bisect
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import drgn

# What libkdumpfile says of a page that a kdump-compressed dump does not have (KDUMP_ERR_NODATA); kvirt says
# it of those that other dumps do not have, too.
EXCLUDED = "Excluded page"
_SIGNATURE = b"KDUMP   "
# struct disk_dump_header, struct kdump_sub_header, struct makedumpfile_header and struct
# makedumpfile_data_header (makedumpfile: IMPLEMENTATION, diskdump_mod.h, makedumpfile.h).
_BLOCK_SIZE_AT = 428
_DUMP_LEVEL_AT = 8
# offset_vmcoreinfo and size_vmcoreinfo
_VMCOREINFO_AT = 32
_PLACE = struct.Struct("<qQ")
_FLATTENED = b"makedumpfile\0"
_FLATTENED_HEADER = 4096
_RECORD = struct.Struct(">qq")
# The headers are in the first of them.
_RECORDS_MAX = 16
_BLOCK_MAX = 1 << 20
# Longer than any file can be.
_FILE_MAX = 1 << 60
# arch/arm64/kernel/vmcore_info.c, arch/x86/kernel/vmcore_info_64.c: what the others do not tell.
_ONLY = {
    b"\nNUMBER(TCR_EL1_T1SZ)=": drgn.Architecture.AARCH64,
    b"\nSYMBOL(init_top_pgt)=": drgn.Architecture.X86_64,
}


@dataclass(frozen=True)
class Kdump:
    """The headers of a core."""

    level: int | None
    """makedumpfile's dump level."""
    vmcoreinfo: bytes
    """Empty if there is none."""
    block_size: int = 0
    """Bytes of memory that are compressed together; 0 if that is not known."""

    @property
    def architecture(self) -> drgn.Architecture | None:
        """By what the kernel tells of itself; None if that is not known here."""
        return next((arch for words, arch in _ONLY.items() if words in self.vmcoreinfo), None)

    @property
    def page_size(self) -> int | None:
        """The kernel's, in bytes, as it tells it; None if it does not."""
        told = re.search(rb"^PAGESIZE=(\d+)$", self.vmcoreinfo, re.MULTILINE)
        return None if told is None else int(told[1])


def _offset(record: tuple[int, int, int]) -> int:
    return record[0]


class Image:
    """The bytes of a core, where they are once a flattened one has been reassembled."""

    def __init__(self, file: BinaryIO, records: int = _RECORDS_MAX) -> None:
        """Find out where they are in the file.

        :param file: has to stay open
        :param records: so many of a flattened core are looked for
        """
        self._fd = file.fileno()
        self._records: list[tuple[int, int, int]] | None = None
        if os.pread(self._fd, len(_FLATTENED), 0) == _FLATTENED:
            # What is written again comes later, and stays behind what it replaces.
            self._records = sorted(self._find(records), key=_offset)

    def _find(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Of each record, where its bytes belong, how many they are, and where they are in the file."""
        at = _FLATTENED_HEADER
        for _ in range(most):
            head = os.pread(self._fd, _RECORD.size, at)
            if len(head) < _RECORD.size:
                break
            offset, size = _RECORD.unpack(head)
            at += _RECORD.size
            if offset < 0 or not 0 <= size < _FILE_MAX - at:
                break
            yield offset, size, at
            at += size

    def read(self, at: int, size: int) -> bytes:
        """Read bytes; fewer than *size* if some are not there."""
        if self._records is None:
            return os.pread(self._fd, size, at)
        data = b""
        while len(data) < size:
            record = bisect.bisect_right(self._records, at, key=_offset) - 1
            if record < 0:
                break
            offset, length, place = self._records[record]
            left = min(offset + length - at, size - len(data))
            piece = os.pread(self._fd, left, place + at - offset) if left > 0 else b""
            if not piece:
                break
            data += piece
            at += len(piece)
        return data

    def read_stored(self, at: int) -> bytes:
        """Read what an ``off_t`` and an ``unsigned long`` give the place and size of; empty if nothing."""
        place = self.read(at, _PLACE.size)
        offset, size = _PLACE.unpack(place) if len(place) == _PLACE.size else (0, 0)
        return self.read(offset, size) if 0 < offset < _FILE_MAX and size <= _BLOCK_MAX else b""


def read_kdump(path: Path) -> Kdump | None:
    """Read the headers of a kdump-compressed core; None if it is no such core."""
    with path.open("rb") as file:
        core = Image(file)
        if core.read(0, len(_SIGNATURE)) != _SIGNATURE:
            return None
        block = int.from_bytes(core.read(_BLOCK_SIZE_AT, 4), "little")
        if not 0 < block <= _BLOCK_MAX:
            return Kdump(None, b"")
        level = core.read(block + _DUMP_LEVEL_AT, 4)
        told = core.read_stored(block + _VMCOREINFO_AT)
    return Kdump(int.from_bytes(level, "little") if len(level) == 4 else None, told, block)
