# SPDX-License-Identifier: GPL-2.0-only
"""Reading many structures at once."""

import numpy as np
import pytest

from kvirt.layout import Member, StructLayout
from kvirt.mm import structs
from kvirt.mm.structs import Finder, Unclear, read_structs
from kvirt.snapshot import Snapshot
from tests.unit.fake import Memory

AT = 0xFFFF888000001000
HOW = StructLayout(
    "struct made_up",
    64,
    {"byte": Member(1, 1), "short": Member(2, 2), "int": Member(4, 4), "long": Member(8, 8)},
)
DTYPE = HOW.dtype(("byte", "short", "int", "long"), {"last": 56})


def memory(pages=3):
    """Pages of words, each with its own address."""
    made_up = Memory()
    made_up.put_words(AT, list(range(AT, AT + pages * 4096, 8)))
    return Snapshot(made_up.prog)


def addresses(*at):
    return np.array([AT + one for one in at], dtype=np.uint64)


@pytest.mark.parametrize("at_once", [1, 2, 4096])
def test_members_wherever_they_are(monkeypatch, at_once):
    monkeypatch.setattr(structs, "_AT_ONCE", at_once)
    # In any order, twice, and across the end of a page.
    places = (8192, 0, 4096 - 8, 4032, 0, 3 * 4096 - 64)
    found = read_structs(memory(), DTYPE, addresses(*places))
    assert [(r["long"], r["last"]) for r in found] == [(AT + p + 8, AT + p + 56) for p in places]
    assert [(r["int"], r["short"], r["byte"]) for r in found] == [
        ((AT + p) >> 32, (AT + p) >> 16 & 0xFFFF, (AT + p) >> 8 & 0xFF) for p in places
    ]


def test_none():
    assert len(read_structs(memory(), DTYPE, addresses())) == 0


@pytest.mark.parametrize("place", [4, 3 * 4096 - 56, 3 * 4096, -4096, -(1 << 47)])
def test_one_that_cannot_be_read(place):
    with pytest.raises(Unclear):
        read_structs(memory(), DTYPE, addresses(0, place, 64))


def test_what_is_read_at_once_is_read_once():
    made_up, reads = Memory(), []

    def read(address, count, offset, physical):
        reads.append(address)
        return bytes(count)

    made_up.prog.add_memory_segment(AT, 8192, read, False)
    seen = Snapshot(made_up.prog)
    read_structs(seen, DTYPE, addresses(0, 64, 4096, 128))
    read_structs(seen, DTYPE, addresses(192, 4032))
    assert reads == [AT, AT + 4096]


@pytest.mark.parametrize(
    ("known", "wanted", "rows"),
    [((), (1,), [-1]), ((5, 3, 9), (9, 5, 4, 3, 10, 0), [2, 0, -1, 1, -1, -1]), ((5,), (), [])],
)
def test_finder(known, wanted, rows):
    finder = Finder(np.array(known, dtype=np.uint64))
    assert finder.find(np.array(wanted, dtype=np.uint64)).tolist() == rows
