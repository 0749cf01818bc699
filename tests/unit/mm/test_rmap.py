# SPDX-License-Identifier: GPL-2.0-only
import pytest

from kvirt.mm.rmap import Records
from tests.unit.fake import Memory, make_layout

LAYOUT = make_layout()
VMA = 0xFFFF888000001000
HEAD = VMA + LAYOUT.vma.offset("chain_next")
NEXT = LAYOUT.avc.offset("same_vma_next")
FIRST, SECOND = 0xFFFF888000002000, 0xFFFF888000003000


def records(first_next, second_prev=FIRST + NEXT, tail=SECOND + NEXT, head=FIRST + NEXT):
    memory = Memory()
    memory.put_struct(LAYOUT.vma, VMA, {"chain_next": head, "chain_prev": tail})
    memory.put_struct(
        LAYOUT.avc,
        FIRST,
        {"vma": VMA, "anon_vma": 0xA0, "same_vma_next": first_next, "same_vma_prev": HEAD},
    )
    memory.put_struct(
        LAYOUT.avc,
        SECOND,
        {"vma": VMA, "anon_vma": 0xB0, "same_vma_next": HEAD, "same_vma_prev": second_prev},
    )
    return Records(memory.prog, LAYOUT)


def chain(*arguments, **more):
    return records(*arguments, **more).chains[VMA]


def test_sound_chain():
    found = chain(SECOND + NEXT)
    assert [(link.address, link.vma, link.anon_vma) for link in found.links] == [
        (FIRST, VMA, 0xA0),
        (SECOND, VMA, 0xB0),
    ]
    assert found.broken is None


def test_empty_chain():
    found = chain(SECOND + NEXT, head=HEAD, tail=HEAD)
    assert found.links == ()
    assert found.broken is None


@pytest.mark.parametrize(
    ("arguments", "words", "links"),
    [
        ({"first_next": FIRST + NEXT}, "comes back", 1),
        ({"first_next": 0xDEAD000000000100}, "cannot be read", 1),
        ({"first_next": SECOND + NEXT, "second_prev": HEAD}, "points back", 1),
        ({"first_next": SECOND + NEXT, "tail": FIRST + NEXT}, "last link", 2),
        ({"first_next": SECOND + NEXT, "head": 0}, "cannot be read", 0),
    ],
)
def test_damaged_chain_ends_with_a_reason(arguments, words, links):
    found = chain(**arguments)
    assert words in found.broken
    assert len(found.links) == links


def test_what_was_read_since_a_mark_can_be_dropped():
    known = records(SECOND + NEXT)
    vma = known.vmas[VMA]
    mark = known.mark()
    before = known.chains[VMA]
    assert set(known.avcs) == {FIRST, SECOND}
    known.release(mark)
    assert (known.vmas, known.avcs, known.chains, known.anon_vmas) == ({VMA: vma}, {}, {}, {})
    assert known.chains[VMA] == before
