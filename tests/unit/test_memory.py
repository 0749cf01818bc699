# SPDX-License-Identifier: GPL-2.0-only
"""Reading a core's memory from its file."""

import os
import struct
from array import array
from types import SimpleNamespace

import drgn
import numpy as np
import pytest

from kvirt import memory
from kvirt.elfcore import PT_LOAD
from kvirt.errors import KvirtError
from kvirt.memory import Runs, core_of, map_core, runs_of, unmap_core
from kvirt.mm import kernel as kernel_memory
from kvirt.mm import memmap
from kvirt.mm.arrays import is_constant
from kvirt.mm.kernel import snapshot_of
from kvirt.mm.memmap import read_struct_pages, read_uniform
from tests.unit.fake import VMEMMAP, Memory, make_layout

# As in QEMU's dumps: behind notes of any length.
OFFSET = 0x14A4


def write_core(path, segments, *, order="<"):
    """Segments as (physical address, bytes, where in the file or None for behind the last)."""
    header = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    header += struct.pack(order + "HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    at, body = OFFSET, b""
    for physical, data, gap in segments:
        at, body = at + gap, body + bytes(gap) + data
        header += struct.pack(order + "IIQQQQQQ", PT_LOAD, 0, at, 0, physical, len(data), len(data), 0)
        at += len(data)
    path.write_bytes(header.ljust(OFFSET, b"\0") + body)
    return path


def pages(*numbers):
    """Pages of which every word is a number."""
    return b"".join(struct.pack("<Q", number) * 512 for number in numbers)


def opened(path):
    # Its cache is all that is used of a program here.
    prog = SimpleNamespace(cache={}, flags=drgn.ProgramFlags(0))
    map_core(prog, path)
    return core_of(prog)


def read(core, *frames):
    at = core.find(np.array(frames, dtype=np.uint64))
    found = core.gather(at[at >= 0], 4096).view("<u8").reshape(-1, 512)
    assert (found == found[:, :1]).all()
    words = iter(found[:, 0].tolist())
    return [next(words) if place >= 0 else None for place in at]


KERNEL = 0xFFFF888000000000


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A core with three pages, in the kernel's direct map; and the pages that drgn was asked for."""
    path = write_core(tmp_path / "core", [(0x10000, pages(1, 2, 3), 0)])
    asked = []

    def look_up(prog, tables, address):
        asked.append(("table", address))
        if address != KERNEL:
            raise drgn.FaultError("no table", address)
        # One of them is not mapped.
        return array("q", [-1 if number == 0x13 else number << 12 for number in range(512)])

    class Program:
        cache, flags = {}, drgn.ProgramFlags(0)

        def read(self, address, size):
            asked.append(address)
            return pages(9)

    monkeypatch.setattr(kernel_memory, "kernel_pages", look_up)
    prog = Program()
    prog.cache = {}
    map_core(prog, path)
    return SimpleNamespace(prog=prog, path=path, asked=asked)


def word(seen, address):
    return seen.read(address, 8)[0]


def test_kernel_memory_is_read_from_the_file(kernel):
    seen = snapshot_of(kernel.prog, make_layout())
    assert [word(seen, KERNEL + at) for at in (0x10000, 0x11000, 0x12FF8, 0x13000, 0x14000)] == [
        1,
        2,
        3,
        9,
        9,
    ]
    # The table is read once, and what the kernel does not map and what the core lacks is drgn's.
    assert kernel.asked == [("table", KERNEL), KERNEL + 0x13000, KERNEL + 0x14000]
    kernel.asked.clear()
    # Where the kernel has no table; where no address of its can be, none is looked for.
    others = (KERNEL + (2 << 20) + 0x10000, 0xDEAD888000010000, 0x10000)
    assert [word(seen, address) for address in others] == [9, 9, 9]
    assert kernel.asked == [("table", KERNEL + (2 << 20)), *others]


def test_what_an_overlay_changes_is_not_read_from_the_file(kernel):
    core_of(kernel.prog).hide(0x11008, 8)
    seen = snapshot_of(kernel.prog, make_layout())
    assert [word(seen, KERNEL + at) for at in (0x10000, 0x11000)] == [1, 9]
    # Page tables may have been changed, too: they are looked up again.
    core_of(kernel.prog).hide(0x12000, 8)
    kernel.asked.clear()
    assert word(snapshot_of(kernel.prog, make_layout()), KERNEL + 0x10000) == 1
    assert kernel.asked == [("table", KERNEL)]


def test_kernel_memory_of_a_file_that_became_shorter(kernel):
    os.truncate(kernel.path, OFFSET + 4096 + 8)
    seen = snapshot_of(kernel.prog, make_layout())
    # drgn says what is wrong.
    assert [word(seen, KERNEL + at) for at in (0x10000, 0x11000, 0x12000)] == [1, 9, 9]


def test_kernel_memory_on_a_disk_that_fails(kernel, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(memory.os, "pread", fail)
    with pytest.raises(KvirtError, match="does its disk or file server fail"):
        word(snapshot_of(kernel.prog, make_layout()), KERNEL + 0x10000)


@pytest.mark.parametrize("left", [0, OFFSET + 4096, OFFSET + 3 * 4096 - 8])
def test_file_that_becomes_shorter(tmp_path, left):
    path = write_core(tmp_path / "core", [(0x10000, pages(1, 2, 3), 0)])
    core, other = opened(path), opened(write_core(tmp_path / "other", [(0x10000, pages(1, 2, 3), 0)]))
    os.truncate(path, left)
    with pytest.raises(KvirtError, match="became shorter while it was read"):
        core.gather(core.find(np.arange(0x10, 0x13, dtype=np.uint64)), 4096)
        core.ensure_whole()
    assert read(other, 0x10, 0x12) == [1, 3]
    other.ensure_whole()


def test_pages_of_several_segments_in_any_order(tmp_path):
    core = opened(write_core(tmp_path / "core", [(0x10000, pages(1, 2, 3), 0), (0x40000, pages(4), 0)]))
    assert read(core, 0x12, 0x40, 0x10, 0x10) == [3, 4, 1, 1]
    assert read(core, 0x13, 0x11, 0xF, 0x41, 1 << 51) == [None, 2, None, None, None]
    assert core.end == 0x41


def test_pages_that_a_segment_has_in_part_are_for_drgn(tmp_path):
    core = opened(write_core(tmp_path / "core", [(0x10800, pages(1, 2)[0x800:] + b"x", 0)]))
    assert read(core, 0x10, 0x11, 0x12) == [None, 2, None]


def test_a_segment_off_the_grid_of_the_others_is_for_drgn(tmp_path):
    core = opened(write_core(tmp_path / "core", [(0x10000, pages(1), 0), (0x40000, pages(2, 3), 40)]))
    assert read(core, 0x10, 0x40, 0x41) == [None, 2, 3]


def test_hidden_pages_are_for_drgn(tmp_path):
    core = opened(write_core(tmp_path / "core", [(0x10000, pages(1, 2, 3, 4), 0)]))
    version = core.version
    core.hide(0x11FFF, 2)
    assert read(core, 0x10, 0x11, 0x12, 0x13) == [1, None, None, 4]
    assert core.version != version


def test_what_was_looked_at_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_WINDOWS_MAX", 2)
    core = opened(write_core(tmp_path / "core", [(0, pages(*range(128)), 0)]))
    order = [n * 37 % 128 for n in range(128)]
    assert read(core, *order) == order
    assert np.count_nonzero(core._mapped) <= 2


@pytest.mark.parametrize(
    "segments",
    [[], [(0x10000, pages(1, 2), 0), (0x11000, pages(3), 0)], [(0x10000, b"", 0)]],
)
def test_cores_that_are_left_to_drgn(tmp_path, segments):
    assert opened(write_core(tmp_path / "core", segments)) is None


def test_other_files_are_left_to_drgn(tmp_path):
    assert opened(write_core(tmp_path / "core", [(0, pages(1), 0)], order=">")) is None
    (tmp_path / "kdump").write_bytes(b"KDUMP   " + bytes(8192))
    assert opened(tmp_path / "kdump") is None
    assert opened(tmp_path) is None


# Two sections of the memmap, 32768 page frames each; the first is at 0x200000 and the second nowhere.
SECTION = 2 << 20


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Struct pages in a core, whose index is their page frame; in drgn's memory it is one more."""
    words = np.zeros((SECTION // 64, 8), dtype="<u8")
    words[:, 4] = np.arange(len(words))
    physical = [(0x200000, words.tobytes(), 0), (0x10000000, pages(0), 0)]
    made_up = Memory()
    map_core(made_up.prog, write_core(tmp_path / "core", physical))
    for pfn in (5, 0x8001, 0x10001):
        made_up.put_words(VMEMMAP + 64 * pfn, [0, 0, 0, 0, pfn + 1, 0, 0, 0])
    places = {VMEMMAP: 0x200000}
    monkeypatch.setattr(memmap, "kernel_huge_page", lambda prog, layout, address: places.get(address))
    return made_up.prog


def indexes(prog, *pfns):
    found, good = read_struct_pages(prog, make_layout(), np.array(pfns, dtype=np.uint64), ["index"])
    return [index if ok else None for index, ok in zip(found["index"].tolist(), good.tolist(), strict=True)]


def test_struct_pages_come_from_the_file_or_else_through_drgn(made_up):
    assert indexes(made_up, 7, 5, 0x7FFF, 5) == [7, 5, 0x7FFF, 5]
    # 0x8001 is in no huge page; 0x10001 is beyond the core's memory; the last are nowhere.
    assert indexes(made_up, 6, 0x10001, 0x8001, 0x8002, 1 << 51) == [6, 0x10002, 0x8002, None, None]


def test_struct_pages_that_are_hidden_come_through_drgn(made_up):
    assert indexes(made_up, 5) == [5]
    core_of(made_up).hide(0x200000 + 5 * 64 + 32, 8)
    # The whole section of them: it is not in one piece any more.
    assert indexes(made_up, 5, 7) == [6, None]


def test_without_the_file_everything_comes_through_drgn(made_up):
    unmap_core(made_up)
    assert indexes(made_up, 5, 7) == [6, None]


@pytest.mark.parametrize("pool", [1, 300, 1 << 18])
def test_struct_pages_in_no_order_however_much_is_held(made_up, monkeypatch, pool):
    unmap_core(made_up)
    monkeypatch.setattr(memmap, "_POOL_PAGES", pool)
    assert indexes(made_up, 0x10001, 5, 1 << 51, 7, 0x8001, 5) == [0x10002, 6, None, None, 0x8002, 6]
    assert indexes(made_up) == []


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """Two sections of struct pages, of which the second comes first in the core; and their words."""
    words = np.random.default_rng(1).integers(0, 1 << 63, (2 * SECTION // 64, 8), dtype=np.uint64)
    # Whatever these hold, nobody is a tail page of a folio: all of page->compound_info but its lowest bit.
    words[:, 1] &= ~np.uint64(1)
    words[:, [0, 3, 6]] = 0x1234, 0x8888, 0xFFFFFFFF
    half = SECTION // 64
    data = np.concatenate((words[half:], words[:half])).tobytes()
    made_up = Memory()
    segments = [(0x200000, data, 0), (0x10000000, pages(0), 0)]
    map_core(made_up.prog, write_core(tmp_path / "core", segments))
    places = {VMEMMAP: 0x200000 + SECTION, VMEMMAP + SECTION: 0x200000}
    monkeypatch.setattr(memmap, "kernel_huge_page", lambda prog, layout, address: places.get(address))
    return made_up, words


RUNS = {
    "one": np.arange(3, 700),
    "across sections": np.arange(0x7F00, 0x8100),
    "all": np.arange(0x10000),
    "several, in no order": np.concatenate([np.arange(n, n + 300) for n in (900, 0x7FF0, 100, 0x8800, 100)]),
    "short": np.array([5]),
}


@pytest.mark.parametrize("block", [100, 1 << 13])
@pytest.mark.parametrize("spoilt", [None, 0, 150, -1])
@pytest.mark.parametrize("pfns", RUNS.values(), ids=RUNS)
def test_runs_of_struct_pages(sections, monkeypatch, pfns, spoilt, block):
    made_up, words = sections
    monkeypatch.setattr(memmap, "_BLOCK_PAGES", block)
    if spoilt is not None and len(pfns) > 150:
        # One page is unlike the others in all members but one.
        words = words.copy()
        words[pfns[spoilt]] = 0x4321, 1, 2, 0x8888, 5, 6, 7, 8
        at = 0x200000 + (words.nbytes // 2 + 64 * int(pfns[spoilt])) % words.nbytes
        core = core_of(made_up.prog)
        with core._path.open("r+b") as file:
            file.seek(OFFSET + at - 0x200000)
            file.write(words[pfns[spoilt]].tobytes())
    names = ["flags", "compound", "mapping", "index", "mapcount"]
    found, good = read_struct_pages(
        made_up.prog, make_layout(), pfns.astype(np.uint64), names, unless={"compound": 1}
    )
    assert good.all()
    expected = words[pfns]
    for name, word in (("flags", 0), ("mapping", 3), ("index", 4)):
        assert (found[name] == expected[:, word]).all()
    assert (found["mapcount"] == expected[:, 6].astype(np.uint32).view(np.int32)).all()
    tails = (expected[:, 1] & np.uint64(1)) != 0
    assert ((found["compound"] & np.uint64(1)) == tails).all()
    assert (found["compound"][tails] == expected[tails, 1]).all()
    # What all agree in takes no room.
    assert is_constant(found["mapping"]) and is_constant(found["flags"]) == (
        spoilt is None or len(pfns) < 150
    )


@pytest.mark.parametrize("pool", [200, 1 << 18])
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("pfns", RUNS.values(), ids=RUNS)
def test_runs_of_struct_pages_through_drgn(sections, monkeypatch, pfns, lost, pool):
    made_up, words = sections
    unmap_core(made_up.prog)
    monkeypatch.setattr(memmap, "_POOL_PAGES", pool)
    # Those behind the last are nowhere.
    there = len(words) - (0x7800 if lost else 0)
    made_up.put(VMEMMAP, words[:there].tobytes())
    found, good = read_struct_pages(made_up.prog, make_layout(), pfns.astype(np.uint64), ["index", "mapping"])
    assert (good == (pfns < there)).all()
    for name, word in (("mapping", 3), ("index", 4)):
        assert (found[name] == np.where(good, words[pfns, word], 0)).all()


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("pfns", RUNS.values(), ids=RUNS)
def test_bits_that_are_not_asked_for(sections, pfns, core):
    made_up, words = sections
    if not core:
        unmap_core(made_up.prog)
        made_up.put(VMEMMAP, words.tobytes())
    names, mask = ["flags", "index"], 0xFF << 8
    masks = {"flags": 0x30, "index": mask}
    found, good = read_struct_pages(made_up.prog, make_layout(), pfns.astype(np.uint64), names, masks)
    assert good.all()
    assert (found["flags"] == 0x1234 & 0x30).all()
    assert (found["index"] == words[pfns, 4] & np.uint64(mask)).all()


ORDERS = {
    "one run": np.arange(3, 700),
    "across sections": np.arange(0x7F00, 0x8100),
    "the last first": np.concatenate([np.arange(n, n + 1024) for n in (0x8400, 0x8000, 0x7C00, 0x7800)]),
    "long, and short between": np.concatenate(
        [
            np.arange(n, n + length)
            for n, length in ((9000, 5000), (100, 3), (200, 1), (0x8000, 9000), (50, 2))
        ]
    ),
    "scattered": np.random.default_rng(3).permutation(0x10000)[:3000],
    "alone": np.array([0x7FFF]),
}
# One alone is like itself.
SEVERAL = {name: pfns for name, pfns in ORDERS.items() if len(pfns) > 1}
# What is looked at, with the bits of it: nobody asks for others.
ASKED = {"flags": (0, 0x3000), "compound": (1, 1), "mapping": (3, -1), "mapcount": (6, -1)}


def uniform(made_up, pfns):
    frames = runs_of(pfns.astype(np.int64), 1) or Runs(pfns, np.ones_like(pfns))
    masks = {name: mask for name, (_, mask) in ASKED.items() if mask != -1}
    return read_uniform(made_up.prog, make_layout(), frames, list(ASKED), masks)


def put_words(made_up, words, core):
    """Have struct pages be read, from a core or through drgn."""
    if core:
        with core_of(made_up.prog)._path.open("r+b") as file:
            file.seek(OFFSET)
            half = len(words) // 2
            file.write(np.concatenate((words[half:], words[:half])).tobytes())
    else:
        unmap_core(made_up.prog)
        made_up.put(VMEMMAP, words.tobytes())


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("pfns", ORDERS.values(), ids=ORDERS)
def test_struct_pages_that_differ_in_their_index_alone(sections, pfns, core):
    made_up, words = sections
    words = words.copy()
    # It wraps on the way.
    words[pfns, 4] = np.arange(len(pfns), dtype=np.uint64) - np.uint64(len(pfns) // 2)
    # Bits that nobody asks for are not the same.
    words[:, 0] |= np.arange(len(words), dtype=np.uint64) << np.uint64(20)
    put_words(made_up, words, core)
    first = int(words[pfns[0], 4])
    expected = {"flags": 0x1000, "compound": 0, "mapping": 0x8888, "mapcount": -1, "index": first}
    # Through drgn nothing is said of many runs, in whatever order.
    given_up = not core and np.count_nonzero(np.diff(np.sort(pfns)) != 1) * 256 > len(pfns)
    assert uniform(made_up, pfns) == (None if given_up else expected)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("pfns", SEVERAL.values(), ids=SEVERAL)
def test_one_struct_page_that_differs_is_seen(sections, pfns, core):
    made_up, words = sections
    words = words.copy()
    words[pfns, 4] = np.arange(len(pfns), dtype=np.uint64) + np.uint64(77)
    rng = np.random.default_rng(len(pfns))
    places = {0, 1, len(pfns) - 1, len(pfns) // 2, *rng.integers(0, len(pfns), 4).tolist()}
    for at in sorted(places):
        pfn, bit = pfns[at], int(rng.integers(0, 64))
        for word, change in ((0, 0x1000), (1, 1), (3, 1 << bit), (4, 1 << bit), (6, 1 << bit % 32)):
            spoilt = words.copy()
            spoilt[pfn, word] ^= np.uint64(change)
            put_words(made_up, spoilt, core)
            assert uniform(made_up, pfns) is None, (at, word, bit)


@pytest.mark.parametrize("core", [False, True])
def test_struct_pages_that_differ_from_a_block_on(sections, monkeypatch, core):
    monkeypatch.setattr(memmap, "_BLOCK_PAGES", 100)
    made_up, words = sections
    for word, change in ((0, 0x1000), (1, 1), (3, 1), (4, 1), (6, 1)):
        spoilt, pfns = words.copy(), np.arange(300)
        spoilt[pfns, 4] = pfns
        spoilt[100:, word] ^= np.uint64(change)
        put_words(made_up, spoilt, core)
        assert uniform(made_up, pfns) is None, word
        assert uniform(made_up, pfns[:100]) is not None


def test_struct_pages_that_cannot_be_read_are_not_said_to_be_alike(sections):
    made_up, words = sections
    put_words(made_up, words[:600], core=False)
    assert uniform(made_up, np.arange(500, 700)) is None
    assert uniform(made_up, np.arange(1 << 51, (1 << 51) + 200)) is None
