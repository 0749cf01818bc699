# SPDX-License-Identifier: GPL-2.0-only
"""Memory in blocks larger than pages, of made-up cores. scripts/arm64.py has real ones."""

import struct
import zlib
from functools import partial

import drgn
import pytest

from kvirt.blocks import needs_blocks, open_blocks
from kvirt.errors import KvirtError
from kvirt.filtered import is_filtered
from kvirt.kdump import Kdump, read_kdump
from kvirt.target import open_target
from tests.unit.test_kdump import flattened

BLOCK = 65536
PAGE = 4096
BASE = 0x40000000
# Of kernel images, whose addresses are larger by that than where they are (kimage_voffset).
OFFSET = 0xFFFF800000000000 - BASE
TABLES = BASE + 2 * BLOCK
VMCOREINFO = (
    "OSRELEASE=7.3.4\nPAGESIZE=4096\nNUMBER(VA_BITS)=48\nNUMBER(TCR_EL1_T1SZ)=0x10\nKERNELOFFSET=0\n"
    f"NUMBER(PHYS_OFFSET)={BASE:#x}\nNUMBER(kimage_voffset)={OFFSET:#x}\n"
    f"SYMBOL(swapper_pg_dir)={TABLES + OFFSET:x}\n"
).encode()
ZERO, ONE, MAPPED = bytes(BLOCK), bytes(range(256)) * 256, 0xFFFF900000000000


def tables():
    """Four pages of tables, by which a page of the second block is at MAPPED."""
    out = bytearray(BLOCK)
    for level, shift in enumerate((39, 30, 21, 12)):
        entry = (TABLES + (level + 1) * PAGE | 3) if level < 3 else (BASE + BLOCK + 2 * PAGE | 3 | 1 << 10)
        struct.pack_into("<Q", out, level * PAGE + (MAPPED >> shift & 511) * 8, entry)
    return bytes(out)


def core(memory, status=1, vmcoreinfo=VMCOREINFO):
    """A core of blocks by their number: bytes to be compressed, or the tuple of a descriptor."""
    note = struct.pack("<III", 11, len(vmcoreinfo), 0) + b"VMCOREINFO\0\0" + vmcoreinfo
    note = note.ljust(-(-len(note) // 4) * 4, b"\0")
    header = b"KDUMP   ".ljust(424, b"\0") + struct.pack("<IiiII", status, BLOCK, 1, 2, max(memory) + 1)
    notes_at = BLOCK + 104
    told = notes_at + note.index(vmcoreinfo)
    sub = struct.pack("<QiiQQqQqQ", BASE, 1, 0, 0, 0, told, len(vmcoreinfo), notes_at, len(note))
    bitmap = sum(1 << number for number in memory).to_bytes(BLOCK, "little")
    out = header.ljust(BLOCK, b"\0") + (sub.ljust(104, b"\0") + note).ljust(BLOCK, b"\0") + 2 * bitmap
    at = 4 * BLOCK + 24 * len(memory)
    descriptors, pages = b"", b""
    for _, data in sorted(memory.items()):
        if isinstance(data, bytes):
            packed = zlib.compress(data)
            # Where it would not be smaller it is left as it is; here, by its kind.
            held, flags = (data, 0) if data == ONE else (packed, 1)
            descriptors += struct.pack("<qIIQ", at + len(pages), len(held), flags, 0)
            pages += held
        else:
            descriptors += struct.pack("<qIIQ", *data, 0)
    return out + descriptors + pages


FIRST = BASE // BLOCK
MEMORY = {FIRST: ZERO, FIRST + 1: ONE, FIRST + 2: tables(), FIRST + 600: ONE}


@pytest.fixture(params=["plain", "flattened"])
def pack(request):
    # In records that begin and end in the middle of blocks.
    return bytes if request.param == "plain" else partial(flattened, cut=40000)


def write(path, content):
    path.write_bytes(content)
    return path


def test_memory_by_physical_address(tmp_path, pack):
    prog = open_blocks(write(tmp_path / "vmcore", pack(core(MEMORY))))
    assert prog.platform.arch is drgn.Architecture.AARCH64
    assert prog["UTS_RELEASE"].string_() == b"7.3.4"
    assert prog.read(BASE + BLOCK - 10, 20, physical=True) == bytes(10) + bytes(range(10))
    assert prog.read(BASE, 2 * BLOCK, physical=True) == ZERO + ONE
    # Behind a gap.
    assert prog.read(BASE + 600 * BLOCK + 256 + 7, 3, physical=True) == bytes([7, 8, 9])


def test_memory_by_the_kernels_address(tmp_path, pack):
    prog = open_blocks(write(tmp_path / "vmcore", pack(core(MEMORY))))
    assert prog.read(MAPPED + 5, 6) == bytes(range(5, 11))
    with pytest.raises(drgn.FaultError):
        prog.read(MAPPED + PAGE, 8)


def test_blocks_that_are_not_there(tmp_path, pack):
    prog = open_blocks(write(tmp_path / "vmcore", pack(core(MEMORY))))
    for number in (0, FIRST - 1, FIRST + 3, FIRST + 599):
        with pytest.raises(drgn.FaultError) as caught:
            prog.read(number * BLOCK + 100, 8, physical=True)
        assert is_filtered(caught.value) and caught.value.address == number * BLOCK + 100
    with pytest.raises(drgn.FaultError) as caught:
        prog.read(BASE + 601 * BLOCK, 8, physical=True)
    assert not is_filtered(caught.value)


@pytest.mark.parametrize(
    ("descriptor", "words"),
    [
        ((4 * BLOCK, BLOCK + 1, 0), "is damaged"),
        ((-1, 100, 1), "is damaged"),
        ((0, 100, 0), "is damaged"),
        ((0, 100, 1), "incorrect header check"),
        ((1 << 40, 100, 1), "ends before this"),
    ],
)
def test_damaged_blocks(tmp_path, pack, descriptor, words):
    prog = open_blocks(write(tmp_path / "vmcore", pack(core({FIRST: descriptor, FIRST + 1: ONE}))))
    with pytest.raises(drgn.FaultError, match=words):
        prog.read(BASE, 8, physical=True)
    assert prog.read(BASE + BLOCK, 2, physical=True) == b"\0\1"


def test_core_that_was_cut_off(tmp_path):
    content = core(MEMORY)
    with pytest.raises(KvirtError, match="it ends before its memory begins"):
        open_target(core=write(tmp_path / "vmcore", content[: 4 * BLOCK - 1]))
    prog = open_blocks(write(tmp_path / "vmcore", content[: 4 * BLOCK + 24 + 10]))
    with pytest.raises(drgn.FaultError, match="ends before this"):
        prog.read(BASE, 8, physical=True)
    with pytest.raises(drgn.FaultError, match="ends before it says"):
        prog.read(BASE + BLOCK, 8, physical=True)


@pytest.mark.parametrize(("status", "name"), [(2, "lzo"), (4, "snappy"), (0x20, "zstd")])
def test_what_cannot_be_decompressed_is_said(tmp_path, status, name):
    path = write(tmp_path / "vmcore", core(MEMORY, status))
    with pytest.raises(KvirtError, match=f"with {name} in blocks of 64 KiB.* take an ELF dump, or a"):
        open_target(core=path)


@pytest.mark.parametrize(("at", "size"), [(432, -5), (436, (1 << 31) - 1)])
def test_damaged_headers(tmp_path, at, size):
    content = bytearray(core(MEMORY))
    struct.pack_into("<i", content, at, size)
    with pytest.raises(KvirtError, match=r"not a vmcore that drgn can read \(its header is damaged"):
        open_target(core=write(tmp_path / "vmcore", content))


def test_which_cores_are_read_so(tmp_path, pack):
    assert needs_blocks(read_kdump(write(tmp_path / "vmcore", pack(core(MEMORY)))))
    large = VMCOREINFO.replace(b"4096", b"65536")
    assert not needs_blocks(read_kdump(write(tmp_path / "vmcore", pack(core(MEMORY, vmcoreinfo=large)))))
    assert not needs_blocks(None)
    assert not needs_blocks(Kdump(1, b"\nSYMBOL(init_top_pgt)=1\nPAGESIZE=4096\n", 65536))
    assert not needs_blocks(Kdump(1, b"", 65536))
