# SPDX-License-Identifier: GPL-2.0-only
"""An overlay: what is written last is read, and all of it can be taken back."""

import drgn
import pytest

from kvirt.lab.overlay import Overlay

MEMORY = bytes(range(64))
AT = 0x1000


@pytest.fixture
def prog():
    prog = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))

    def read(address, count, offset, physical):
        return MEMORY[offset : offset + count]

    prog.add_memory_segment(AT, len(MEMORY), read, True)
    return prog


def memory(prog):
    return prog.read(AT, len(MEMORY), True)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 4), (4, 8), (8, 1, 4, 8)])
def test_the_last_write_is_read(prog, sizes):
    overlay = Overlay(prog)
    expected = bytearray(MEMORY)
    for number, size in enumerate(sizes):
        data = bytes([0xA0 + number]) * size
        overlay.write_physical(AT + 16, data)
        expected[16 : 16 + size] = data
        assert memory(prog) == expected


def test_writes_that_overlap_are_taken_back(prog):
    overlay = Overlay(prog)
    for offset, size in ((8, 8), (12, 8), (10, 2), (8, 8)):
        overlay.write_physical(AT + offset, bytes([0xFF]) * size)
    assert memory(prog) != MEMORY
    overlay.undo()
    assert memory(prog) == MEMORY
    overlay.write_physical(AT + 10, b"again")
    assert memory(prog)[10:15] == b"again"
    overlay.undo()
    assert memory(prog) == MEMORY


def test_what_is_not_there_cannot_be_overlaid(prog):
    with pytest.raises(drgn.FaultError):
        Overlay(prog).write_physical(AT + len(MEMORY), b"data")
