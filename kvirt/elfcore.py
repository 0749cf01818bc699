# SPDX-License-Identifier: GPL-2.0-only
"""Where an ELF core keeps which memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

PT_LOAD = 1
# More program headers than the header can count: their number is elsewhere (elf(5)).
PN_XNUM = 0xFFFF
# Its first members, up to p_memsz; in the file's byte order.
_PHDR = "=IIQQQQQ"


@dataclass(frozen=True, slots=True)
class ProgramHeader:
    """What one ``Elf64_Phdr`` says, as far as it matters here; in bytes."""

    type: int
    offset: int
    """Of its bytes in the file."""
    virtual: int
    """Address of them for the kernel (``p_vaddr``); whoever wrote the core may not have known it."""
    physical: int
    """Address of them in memory (``p_paddr``)."""
    size: int
    """Bytes in the file (``p_filesz``)."""
    memory: int
    """Bytes in memory (``p_memsz``)."""


@dataclass(frozen=True, slots=True)
class ElfCore:
    """The program headers of an ELF file."""

    headers: list[ProgramHeader]
    needed: int
    """Bytes that the file must have to hold all that they promise, and themselves."""
    little_endian: bool


def read_elf_core(path: Path) -> ElfCore | None:
    """Read the program headers of a 64-bit ELF file; None if it is no such file."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:4] != b"\x7fELF" or header[4] != 2:
            return None
        order = "<" if header[5] == 1 else ">"
        (phoff,) = struct.unpack_from(order + "Q", header, 32)
        phentsize, phnum = struct.unpack_from(order + "HH", header, 54)
        if phnum and phentsize < struct.calcsize(_PHDR):
            return None
        file.seek(phoff)
        table = file.read(phentsize * phnum)
    headers = []
    needed = 0
    if len(table) < phentsize * phnum:
        needed = phoff + phentsize * phnum
    else:
        for at in range(0, len(table), phentsize):
            type_, _, *members = struct.unpack_from(order + _PHDR[1:], table, at)
            program_header = ProgramHeader(type_, *members)
            headers.append(program_header)
            needed = max(needed, program_header.offset + program_header.size)
    return ElfCore(headers if phnum != PN_XNUM else [], needed, order == "<")
