# SPDX-License-Identifier: GPL-2.0-only
"""Headers of made-up cores. Real ones are read in tests/vmcore."""

import struct

import drgn
import pytest

from kvirt.kdump import Kdump, read_kdump

BLOCK = 4096


def kdump(level, block=BLOCK, vmcoreinfo=b""):
    header = bytearray(BLOCK)
    header[:8] = b"KDUMP   "
    struct.pack_into("<i", header, 428, block)
    sub = struct.pack("<QiiQQqQ", 0, level, 0, 0, 0, 3 * BLOCK if vmcoreinfo else 0, len(vmcoreinfo))
    return bytes(header) + sub.ljust(2 * BLOCK, b"\0") + vmcoreinfo


def flattened(data, cut=BLOCK):
    """Records as makedumpfile -F and QEMU write them, the last ones first."""
    out = (b"makedumpfile" + bytes(4) + struct.pack(">qq", 1, 1)).ljust(4096, b"\0")
    for at in reversed(range(0, len(data), cut)):
        piece = data[at : at + cut]
        out += struct.pack(">qq", at, len(piece)) + piece
    return out + struct.pack(">qq", -1, -1)


@pytest.mark.parametrize("level", [0, 1, 31])
def test_level_of_a_kdump(tmp_path, level):
    path = tmp_path / "vmcore"
    path.write_bytes(kdump(level))
    assert read_kdump(path).level == level
    path.write_bytes(flattened(kdump(level)))
    assert read_kdump(path).level == level


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF" + bytes(100),
        kdump(31)[:BLOCK],
        kdump(31)[: BLOCK + 10],
        kdump(31, block=0),
        kdump(31, block=-1),
        kdump(31, block=1 << 30),
        flattened(kdump(31))[:6000],
        flattened(b"\x7fELF" + bytes(9000)),
    ],
)
def test_what_does_not_say_its_level(tmp_path, content):
    path = tmp_path / "vmcore"
    path.write_bytes(content)
    kdump = read_kdump(path)
    assert kdump is None or (kdump.level, kdump.vmcoreinfo) == (None, b"")


@pytest.mark.parametrize(
    ("vmcoreinfo", "architecture"),
    [
        (b"OSRELEASE=7.3\nNUMBER(VA_BITS)=52\nNUMBER(TCR_EL1_T1SZ)=0xc\n", drgn.Architecture.AARCH64),
        (b"OSRELEASE=7.3\nSYMBOL(init_top_pgt)=ffffffff82a00000\n", drgn.Architecture.X86_64),
        # riscv
        (b"OSRELEASE=7.3\nNUMBER(VA_BITS)=57\n", None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("pack", [bytes, flattened])
def test_architecture_by_what_the_kernel_tells(tmp_path, pack, vmcoreinfo, architecture):
    path = tmp_path / "vmcore"
    path.write_bytes(pack(kdump(1, vmcoreinfo=vmcoreinfo)))
    told = read_kdump(path)
    assert (told, told.architecture) == (Kdump(1, vmcoreinfo, BLOCK), architecture)
    # Of what is cut off nothing is known.
    path.write_bytes(pack(kdump(1, vmcoreinfo=vmcoreinfo)[: 3 * BLOCK]))
    assert read_kdump(path) == Kdump(1, b"", BLOCK)


@pytest.mark.parametrize(
    ("vmcoreinfo", "size"),
    [(b"OSRELEASE=7.3\nPAGESIZE=16384\nA=1\n", 16384), (b"A=1\nPAGESIZE=x\n", None), (b"", None)],
)
def test_page_size_by_what_the_kernel_tells(vmcoreinfo, size):
    assert Kdump(1, vmcoreinfo).page_size == size


def test_records_that_are_written_again(tmp_path):
    path = tmp_path / "vmcore"
    end = struct.pack(">qq", -1, -1)
    path.write_bytes(flattened(kdump(1)).removesuffix(end) + flattened(kdump(31))[4096:])
    assert read_kdump(path).level == 31
