# SPDX-License-Identifier: GPL-2.0-only
"""What the headers of a kdump-compressed core say, flattened or not, that libkdumpfile does not pass on."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import drgn

_SIGNATURE = b"KDUMP   "
# struct disk_dump_header, struct kdump_sub_header, struct makedumpfile_header and struct
# makedumpfile_data_header (makedumpfile: IMPLEMENTATION, diskdump_mod.h, makedumpfile.h).
_BLOCK_SIZE_AT = 428
_DUMP_LEVEL_AT = 8
# offset_vmcoreinfo and size_vmcoreinfo
_VMCOREINFO_AT = 32
_VMCOREINFO = struct.Struct("<qQ")
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

    @property
    def architecture(self) -> drgn.Architecture | None:
        """By what the kernel tells of itself; None if that is not known here."""
        return next((arch for words, arch in _ONLY.items() if words in self.vmcoreinfo), None)


class _Flattened:
    """The beginning of a flattened dump, as it will be when it has been reassembled."""

    def __init__(self, file: BinaryIO) -> None:
        self._parts: list[tuple[int, bytes]] = []
        file.seek(_FLATTENED_HEADER)
        for _ in range(_RECORDS_MAX):
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                break
            offset, size = _RECORD.unpack(head)
            if offset < 0 or size < 0:
                break
            self._parts.append((offset, file.read(min(size, _BLOCK_MAX))))

    def read(self, at: int, size: int) -> bytes:
        for offset, data in reversed(self._parts):
            if offset <= at and at + size <= offset + len(data):
                return data[at - offset : at - offset + size]
        return b""


class _Plain:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)


def read_kdump(path: Path) -> Kdump | None:
    """Read the headers of a kdump-compressed core; None if it is no such core."""
    with path.open("rb") as file:
        flattened = file.read(len(_FLATTENED)) == _FLATTENED
        core = _Flattened(file) if flattened else _Plain(file)
        if core.read(0, len(_SIGNATURE)) != _SIGNATURE:
            return None
        block = int.from_bytes(core.read(_BLOCK_SIZE_AT, 4), "little")
        if not 0 < block <= _BLOCK_MAX:
            return Kdump(None, b"")
        level = core.read(block + _DUMP_LEVEL_AT, 4)
        place = core.read(block + _VMCOREINFO_AT, _VMCOREINFO.size)
        offset, size = _VMCOREINFO.unpack(place) if len(place) == _VMCOREINFO.size else (0, 0)
        told = core.read(offset, size) if 0 < offset < _FILE_MAX and size <= _BLOCK_MAX else b""
    return Kdump(int.from_bytes(level, "little") if len(level) == 4 else None, told)
