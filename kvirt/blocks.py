# SPDX-License-Identifier: GPL-2.0-only
"""Memory of kdump-compressed cores with blocks that are larger than the kernel's pages.

QEMU compresses 64 KiB of any arm64 guest together (target/arm/arch_dump.c, cpu_get_dump_info()). libkdumpfile
takes the page size in VMCOREINFO for that of blocks, and looks for memory where other memory is, or none. So
drgn is given the notes of such a core as an ELF core without memory, and asks for memory here.
"""

from __future__ import annotations

import functools
import itertools
import os
import struct
import zlib
from pathlib import Path

import drgn

from kvirt.errors import KvirtError
from kvirt.kdump import EXCLUDED, Image, Kdump

# Of struct disk_dump_header status, block_size, sub_hdr_size, bitmap_blocks and max_mapnr, of struct
# kdump_sub_header offset_note and size_note, and struct page_desc (makedumpfile: diskdump_mod.h).
_SIZES_AT = 424
_SIZES = struct.Struct("<IiiII")
_NOTES_AT = 48
_DESCRIPTOR = struct.Struct("<qIIQ")
# DUMP_DH_COMPRESSED_*
_ZLIB = 0x1
_OTHERS = {0x2: "lzo", 0x4: "snappy", 0x20: "zstd"}
# Of the bitmap, that many bytes are counted at a time.
_STRIDE = 64
_CACHE_BYTES = 64 << 20
# elf(5)
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01"
_ET_CORE = 4
_EM_AARCH64 = 183
_PT_NOTE = 4


class Blocks:
    """The memory in a core."""

    def __init__(self, path: Path) -> None:
        """Find out which blocks there are.

        :raises KvirtError: if they cannot be decompressed
        :raises ValueError: if the headers are damaged
        """
        self._file = path.open("rb")
        file_size = path.stat().st_size
        # Of a flattened core all records: it has fewer than that.
        self._image = Image(self._file, file_size // 16)
        sizes = self._image.read(_SIZES_AT, _SIZES.size)
        if len(sizes) < _SIZES.size:
            raise ValueError("its header is not complete")
        status, self.size, sub_blocks, bitmap_blocks, blocks = _SIZES.unpack(sizes)
        self.end: int = blocks * self.size
        """The physical address behind the last block, in bytes."""
        other = next((name for flag, name in _OTHERS.items() if status & flag), None)
        if other is not None:
            raise KvirtError(
                f"{path} is compressed with {other} in blocks of {self.size >> 10} KiB, as QEMU's dumps of "
                "arm64 guests are: kvirt reads blocks that are larger than the kernel's pages if they are "
                "compressed with zlib; take an ELF dump, or a kdump-zlib one."
            )
        self.notes = self._image.read_stored(self.size + _NOTES_AT)
        # One bit for each block that there is in memory, and then one for each that is in the core.
        half = bitmap_blocks // 2 * self.size
        first = (1 + sub_blocks) * self.size
        if not self.size or first < 0 or not 0 <= half <= file_size:
            raise ValueError("its header is damaged")
        self._bitmap = self._image.read(first + half, half)
        if len(self._bitmap) < half:
            raise ValueError("it ends before its memory begins")
        self._descriptors = first + 2 * half
        counts = (
            int.from_bytes(self._bitmap[at : at + _STRIDE], "little").bit_count()
            for at in range(0, len(self._bitmap), _STRIDE)
        )
        self._before = list(itertools.accumulate(counts, initial=0))
        self._unpack = functools.lru_cache(_CACHE_BYTES // self.size)(self._read_block)

    def read(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        """Read physical memory, as :meth:`drgn.Program.add_memory_segment` wants it.

        :raises drgn.FaultError: if it is not in the core
        """
        data = b""
        while len(data) < count:
            number, at = divmod(address + len(data), self.size)
            try:
                data += self._unpack(*self._find(number))[at : at + count - len(data)]
            except (ValueError, OSError, zlib.error) as error:
                raise drgn.FaultError(str(error), address + len(data)) from None
        return data

    def _find(self, number: int) -> tuple[int, int, int]:
        """Where a block is in the core: its offset, size and flags."""
        group, bit = divmod(number, _STRIDE * 8)
        bits = int.from_bytes(self._bitmap[group * _STRIDE : (group + 1) * _STRIDE], "little")
        if not bits >> bit & 1:
            raise ValueError(EXCLUDED)
        before = self._before[group] + (bits & (1 << bit) - 1).bit_count()
        descriptor = self._image.read(self._descriptors + before * _DESCRIPTOR.size, _DESCRIPTOR.size)
        if len(descriptor) < _DESCRIPTOR.size:
            raise ValueError("the core ends before it says where this is")
        offset, size, flags, _ = _DESCRIPTOR.unpack(descriptor)
        if offset < 0 or size > self.size:
            raise ValueError("the core is damaged where it says where this is")
        return offset, size, flags

    def _read_block(self, offset: int, size: int, flags: int) -> bytes:
        data = self._image.read(offset, size)
        if len(data) < size:
            raise ValueError("the core ends before this")
        if flags & _ZLIB:
            data = zlib.decompressobj().decompress(data, self.size)
        if len(data) != self.size:
            raise ValueError("the core is damaged where this is")
        return data


def needs_blocks(kdump: Kdump | None) -> bool:
    """Whether a core has to be read here."""
    if kdump is None or kdump.architecture is not drgn.Architecture.AARCH64:
        return False
    return kdump.page_size is not None and kdump.block_size > kdump.page_size


def open_blocks(path: Path) -> drgn.Program:
    """Open a core of an arm64 kernel; drgn translates addresses itself.

    :raises KvirtError: if its blocks cannot be decompressed
    """
    blocks = Blocks(path)
    at = _EHDR.size + _PHDR.size
    header = _EHDR.pack(
        *(_IDENT, _ET_CORE, _EM_AARCH64, 1, 0, _EHDR.size, 0, 0),
        *(_EHDR.size, _PHDR.size, 1, 0, 0, 0),
    )
    notes = _PHDR.pack(_PT_NOTE, 0, at, 0, 0, len(blocks.notes), 0, 0) + blocks.notes
    prog = drgn.Program()
    with os.fdopen(os.memfd_create("kvirt-notes"), "wb") as file:
        file.write(header + notes)
        file.flush()
        prog.set_core_dump(f"/proc/self/fd/{file.fileno()}")
    prog.add_memory_segment(0, blocks.end, blocks.read, physical=True)
    return prog
