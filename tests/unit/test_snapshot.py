# SPDX-License-Identifier: GPL-2.0-only
"""What one pass sees of memory, and what it costs it."""

import drgn
import pytest

from kvirt import snapshot
from kvirt.snapshot import Snapshot, Table
from tests.unit.fake import Memory

AT = 0xFFFF888000001000


class Counted:
    """Pages whose bytes are the number of times that something of them was read."""

    def __init__(self, pages, first=AT):
        self.memory = Memory()
        self.reads = []
        self.memory.prog.add_memory_segment(first, pages * 4096, self._read, False)

    def _read(self, address, count, offset, physical):
        self.reads.append((address, count))
        return bytes([len(self.reads)]) * count


def test_a_page_is_read_once():
    counted = Counted(2)
    seen = Snapshot(counted.memory.prog)
    assert [seen.read(AT + at, 8) for at in (0, 4088, 64)] == [b"\1" * 8] * 3
    assert seen.read(AT + 4096, 1) == b"\2"
    assert counted.reads == [(AT, 4096), (AT + 4096, 4096)]


def test_another_snapshot_reads_again():
    counted = Counted(1)
    first, second = Snapshot(counted.memory.prog), Snapshot(counted.memory.prog)
    assert (first.read(AT, 1), second.read(AT, 1), first.read(AT + 1, 1)) == (b"\1", b"\2", b"\1")


def test_what_reaches_into_the_next_page():
    counted = Counted(2)
    assert len(Snapshot(counted.memory.prog).read(AT + 4092, 8)) == 8


def test_a_part_of_a_page():
    memory = Memory()
    memory.put(AT + 100, b"kernel")
    seen = Snapshot(memory.prog)
    assert seen.read(AT + 100, 6) == b"kernel"
    with pytest.raises(drgn.FaultError):
        seen.read(AT + 100, 7)
    # Where no address is.
    with pytest.raises((drgn.FaultError, OverflowError)):
        seen.read(-8, 8)


def test_pages_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(snapshot, "_PAGES_MAX", 2)
    counted = Counted(3)
    seen = Snapshot(counted.memory.prog)
    assert [seen.read(AT + page * 4096, 1) for page in (0, 1, 0, 2, 0)] == [b"\1", b"\2", b"\1", b"\3", b"\4"]


def test_table_reads_each_once():
    reads = []

    def read(address):
        reads.append(address)
        return f"read {address}"

    table = Table(read)
    assert (table[1], table[2], table[1]) == ("read 1", "read 2", "read 1")
    assert reads == [1, 2]
