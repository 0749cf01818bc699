# SPDX-License-Identifier: GPL-2.0-only
"""XArrays, sound and damaged: made up word by word."""

import drgn
import pytest

from kvirt.mm.xarray import xa_for_each
from tests.unit.fake import Memory

XA, NODES = 0xFFFF888000001000, 0xFFFF888000010000
RETRY = 256 << 2 | 2
SLOTS = 64


class Tree:
    """Nodes of 64 slots at consecutive addresses, and a drgn program that has their types."""

    def __init__(self):
        self.memory = Memory()
        prog = self.memory.prog
        word = prog.int_type("unsigned long", 8, False)
        pointer = prog.pointer_type(prog.void_type())
        byte = prog.int_type("unsigned char", 1, False)
        members = [
            drgn.TypeMember(byte, "shift", 0),
            drgn.TypeMember(prog.array_type(pointer, SLOTS), "slots", 64),
        ]
        node = prog.struct_type("xa_node", 8 + SLOTS * 8, members)
        self.xarray = prog.struct_type(
            "xarray", 16, [drgn.TypeMember(word, "flags", 0), drgn.TypeMember(pointer, "xa_head", 64)]
        )
        prog.register_type_finder(
            "fake", lambda p, kinds, name, file: node if name == "xa_node" else None, enable_index=0
        )

    def node(self, number, shift, slots):
        """Lay a node; returns the pointer to it."""
        words = [slots.get(i, 0) for i in range(SLOTS)]
        address = NODES + number * 0x1000
        self.memory.put_words(address, [shift, *words])
        return address | 2

    def walk(self, head):
        self.memory.put_words(XA, [0, head])
        troubles = []
        xa = drgn.Object(self.memory.prog, self.xarray, address=XA)
        return list(xa_for_each(xa, troubles)), troubles


def test_sound_tree():
    tree = Tree()
    low = tree.node(1, 0, {1: 0x1000, 63: 0x2000})
    high = tree.node(2, 0, {0: 0x3000, 5: RETRY})
    top = tree.node(0, 6, {0: low, 3: high, 7: RETRY})
    assert tree.walk(top) == ([(1, 0x1000), (63, 0x2000), (192, 0x3000)], [])


@pytest.mark.parametrize(("head", "entries"), [(0, []), (0x1000, [(0, 0x1000)]), (RETRY, [])])
def test_tree_without_nodes(head, entries):
    assert Tree().walk(head) == (entries, [])


def test_what_cannot_be_followed_is_left_out_and_told():
    tree = Tree()
    sound = tree.node(1, 0, {4: 0x1000})
    upward = tree.node(2, 6, {0: sound})
    top = tree.node(
        0,
        6,
        {
            0: sound,
            1: NODES | 2,  # the top itself
            2: upward,
            3: 0xDEAD0000 | 2,
            4: sound,  # met already
        },
    )
    entries, troubles = tree.walk(top)
    assert entries == [(4, 0x1000)]
    assert [trouble.split(" and above")[0].split()[-1] for trouble in troubles] == ["64", "128", "192", "256"]
    assert "cannot be read" in troubles[2]
    assert all("belongs elsewhere" in trouble for i, trouble in enumerate(troubles) if i != 2)


def test_upper_node_full_of_garbage():
    tree = Tree()
    entries, troubles = tree.walk(tree.node(0, 12, dict.fromkeys(range(SLOTS), 0x1234560)))
    assert entries == []
    assert len(troubles) == 1
    assert "holds no nodes" in troubles[0]
