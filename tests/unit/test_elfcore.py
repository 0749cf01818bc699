# SPDX-License-Identifier: GPL-2.0-only
import struct

import pytest

from kvirt.elfcore import PT_LOAD, ProgramHeader, read_elf_core


def elf(headers, *, order="<", phentsize=56, phnum=None):
    data = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    count = len(headers) if phnum is None else phnum
    data += struct.pack(order + "HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, phentsize, count, 0, 0, 0)
    # The address in the kernel is another, and memory may be larger than what the file has of it.
    return data + b"".join(
        struct.pack(order + "IIQQQQQQ", type_, 0, offset, 0xBAD, physical, size, size + 4096, 0)
        for type_, offset, physical, size in headers
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_where_memory_is(tmp_path, order):
    path = tmp_path / "core"
    path.write_bytes(elf([(4, 0x158, 0, 20), (PT_LOAD, 0x14A4, 0x100000, 0x5000)], order=order))
    core = read_elf_core(path)
    assert core.headers == [
        ProgramHeader(4, 0x158, 0xBAD, 0, 20, 20 + 4096),
        ProgramHeader(PT_LOAD, 0x14A4, 0xBAD, 0x100000, 0x5000, 0x6000),
    ]
    assert core.needed == 0x14A4 + 0x5000
    assert core.little_endian == (order == "<")


def test_headers_that_are_cut_off(tmp_path):
    path = tmp_path / "core"
    path.write_bytes(elf([(PT_LOAD, 0x1000, 0, 0x1000)], phnum=3))
    core = read_elf_core(path)
    assert (core.headers, core.needed) == ([], 64 + 3 * 56)


@pytest.mark.parametrize(
    "content", [b"", b"KDUMP   " + bytes(100), elf([])[:40], elf([], phentsize=8, phnum=2)]
)
def test_what_is_no_elf_core(tmp_path, content):
    path = tmp_path / "core"
    path.write_bytes(content)
    assert read_elf_core(path) is None


def test_more_headers_than_the_header_can_count(tmp_path):
    path = tmp_path / "core"
    path.write_bytes(elf([(PT_LOAD, 0x1000, 0, 0x1000)] * 0xFFFF))
    assert read_elf_core(path).headers == []
