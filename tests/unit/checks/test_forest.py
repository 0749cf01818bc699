# SPDX-License-Identifier: GPL-2.0-only
"""How families of anon_vmas are judged: on a dump, and while they change."""

from array import array

import pytest

from kvirt.checks import forest, patience, process
from kvirt.checks.process import ProcessChecker
from kvirt.findings import Severity
from kvirt.mm.forest import FamilyReader, read_family
from kvirt.tasks import Processes
from tests.unit.checks.test_process import (
    ANON_VMA,
    AVC,
    LAYOUT,
    LEAF,
    MAX,
    MM,
    PAGES,
    START,
    VMA,
    Process,
    index_at,
    leaf,
    word,
)

TREE = LAYOUT.anon_tree
CHILDREN = ANON_VMA + LAYOUT.anon_vma.offset("num_children")
REFCOUNT = ANON_VMA + LAYOUT.anon_vma.offset("refcount")
SUBTREE_LAST = AVC + TREE.subtree_last


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE", 0)


def ids(result):
    return [(finding.id, finding.severity) for finding in result.findings]


def detached(made_up, mm):
    """A second node in the tree, with a VMA that no maple tree has."""
    vma, avc = 0xFFFF888000900000, 0xFFFF888000910000
    head = vma + LAYOUT.vma.offset("chain_next")
    link = avc + LAYOUT.avc.offset("same_vma_next")
    made_up.memory.put_struct(
        LAYOUT.vma, vma, {**made_up.vma, "vm_mm": mm, "chain_next": link, "chain_prev": link}
    )
    made_up.memory.put_struct(
        LAYOUT.avc,
        avc,
        {"vma": vma, "anon_vma": ANON_VMA, "same_vma_next": head, "same_vma_prev": head},
    )
    made_up.memory.put_words(avc + TREE.rb, [AVC + TREE.rb, 0, 0, made_up.vma["vm_pgoff"] + 3])
    made_up.memory.put(AVC + TREE.rb + TREE.right, word(avc + TREE.rb))
    made_up.memory.put(ANON_VMA + LAYOUT.anon_vma.offset("num_active_vmas"), word(2))


@pytest.mark.parametrize("moves", [False, True])
def test_lasting_damage_is_an_error(moves):
    made_up = Process()
    made_up.memory.put(CHILDREN, word(5))
    result = made_up.check(moves)
    assert ids(result) == [("ANON-VMA-CHILDREN", Severity.ERROR)]
    assert (result.findings[0].expected, result.findings[0].actual) == (1, 5)
    assert result.incomplete == []


def test_damage_is_told_with_the_first_process_that_shows_it():
    made_up = Process()
    made_up.memory.put(SUBTREE_LAST, word(made_up.vma["vm_pgoff"]))
    checker = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False)
    tree, pages = ("AVC-TREE-SUBTREE-LAST", Severity.ERROR), ("FOLIO-RMAP-REACH", Severity.ERROR)
    assert ids(checker.check(MM)) == [tree, pages]
    # What it hides is each process's own.
    assert ids(checker.check(MM)) == [pages]
    made_up = Process()
    made_up.memory.put(CHILDREN, word(5))
    checker = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False)
    first = ids(checker.check(MM))
    # That process turns out to be gone.
    checker.forget_latest()
    assert ids(checker.check(MM)) == first == [("ANON-VMA-CHILDREN", Severity.ERROR)]


@pytest.fixture
def looks(monkeypatch):
    """One element for each look at a family by itself, as at all of them here."""
    seen = []
    monkeypatch.setattr(forest, "read_groves", lambda *arguments: ())
    read = FamilyReader.read
    monkeypatch.setattr(FamilyReader, "read", lambda *arguments: seen.append(1) or read(*arguments))
    return seen


@pytest.mark.parametrize(("mm", "number"), [(MM, 2), (0xFFFF888000920000, 1)])
def test_family_of_several_processes_is_looked_at_once(monkeypatch, looks, mm, number):
    made_up = Process()
    detached(made_up, mm)
    monkeypatch.setattr(process, "for_each_process", lambda prog, moves: Processes())
    checker = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False)
    checker.check(MM)
    checker.check(MM)
    assert len(looks) == number


@pytest.mark.parametrize(
    ("known", "number"),
    [([VMA], 0), ([VMA - 8, VMA, VMA + 8], 0), ([VMA + 8], 1), ([VMA - 8], 1), ([VMA - 8, VMA + 8], 1)],
)
def test_family_is_looked_at_again_with_a_vma_that_was_not_in_it(looks, known, number):
    made_up = Process()
    checker = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False)
    checker._forest._done[ANON_VMA] = array("Q", known)
    checker.check(MM)
    assert len(looks) == number


# Else what was read with the process would be told: as transient, or for information, or as hidden pages.
@pytest.mark.parametrize(
    ("address", "torn", "sound"),
    [(CHILDREN, 5, 1), (REFCOUNT, 2, 1), (SUBTREE_LAST, START >> 12, (START >> 12) + PAGES - 1)],
    ids=["transient", "info", "hidden"],
)
def test_what_only_the_reading_of_the_process_shows_is_not_told(address, torn, sound):
    made_up = Process()
    made_up.changing(address, [word(torn), word(sound)])
    result = made_up.check()
    assert (result.findings, result.incomplete) == ([], [])


def test_sound_family_is_not_read_again():
    made_up = Process()
    # Whatever else is read of it comes later.
    made_up.changing(CHILDREN, [word(1), word(5)])
    assert made_up.check().findings == []


@pytest.mark.parametrize("moves", [False, True])
def test_more_references_are_told_for_information(moves):
    made_up = Process()
    made_up.memory.put(REFCOUNT, word(2))
    assert ids(made_up.check(moves)) == [("ANON-VMA-REF", Severity.INFO)]


def test_family_is_counted_though_a_chain_was_torn_when_the_process_was_read():
    made_up = Process()
    made_up.changing(VMA + LAYOUT.vma.offset("chain_prev"), [word(0), word(made_up.vma["chain_prev"])])
    made_up.memory.put(CHILDREN, word(5))
    assert sorted(ids(made_up.check())) == [
        ("ANON-VMA-CHILDREN", Severity.ERROR),
        ("AVC-SELF", Severity.TRANSIENT),
    ]


def test_vma_is_missed_though_the_maple_tree_of_its_mm_was_torn_when_the_process_was_read(monkeypatch):
    monkeypatch.setattr(process, "for_each_process", lambda prog, moves: Processes())
    made_up = Process()
    other, node = 0xFFFF888000920000, 0xFFFF888000930000
    made_up.memory.put(node, bytes(4096))
    made_up.memory.put_struct(LAYOUT.mm, other, {**made_up.mm, "ma_root": node | 1 << 3 | 6})
    # Dead, and then empty.
    made_up.changing(node, [word(node), word(1)])
    made_up.memory.put(node + 8, word(MAX))
    detached(made_up, other)
    result = made_up.check()
    assert ids(result) == [("AVC-IN-TREE", Severity.ERROR)]
    assert "nobody is at work" in result.findings[0].message


# The first reading is that of the process.
@pytest.mark.parametrize("readings", [2, 3, 4])
def test_what_does_not_last_is_transient(readings):
    made_up = Process()
    made_up.changing(CHILDREN, [word(5)] * readings + [word(1)])
    assert ids(made_up.check()) == [("ANON-VMA-CHILDREN", Severity.TRANSIENT)]


def test_family_that_never_stands_still_is_not_accused():
    made_up = Process()
    made_up.changing(CHILDREN, [word(5 + n) for n in range(1000)])
    result = made_up.check()
    assert ids(result) == [("ANON-VMA-CHILDREN", Severity.TRANSIENT)]
    assert any("being changed all the time" in sentence for sentence in result.incomplete)


def test_family_lock_held_for_write_on_a_dump():
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.anon_vma, ANON_VMA, {**made_up.anon_vma, "rwsem_count": 1})
    made_up.memory.put(CHILDREN, word(5))
    result = made_up.check(moves=False)
    assert ids(result) == [("ANON-VMA-CHILDREN", Severity.TRANSIENT)]
    assert result.incomplete


def test_mmap_lock_of_a_member_held_for_write_on_a_dump():
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "mmap_lock_count": 1})
    made_up.memory.put(CHILDREN, word(5))
    result = made_up.check(moves=False)
    assert ids(result) == [("ANON-VMA-CHILDREN", Severity.TRANSIENT)]
    assert result.incomplete


def test_key_of_a_single_node_that_is_stale():
    made_up = Process()
    last = made_up.vma["vm_pgoff"] + 3
    made_up.memory.put(SUBTREE_LAST, word(last + 1))
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.address) == ("AVC-TREE-SUBTREE-LAST", AVC)
    assert (finding.expected, finding.actual) == (last, last + 1)


def test_pages_that_a_stale_key_hides_are_named_once():
    made_up = Process()
    made_up.memory.put(SUBTREE_LAST, word(made_up.vma["vm_pgoff"]))
    findings = {finding.id: finding for finding in made_up.check(moves=False).findings}
    assert set(findings) == {"AVC-TREE-SUBTREE-LAST", "FOLIO-RMAP-REACH"}
    # The first page is still found.
    assert findings["FOLIO-RMAP-REACH"].pages == 3
    assert findings["FOLIO-RMAP-REACH"].address == made_up.vma["vm_start"] + 4096


def test_lost_link_hides_all_pages():
    made_up = Process()
    root = ANON_VMA + LAYOUT.anon_vma.offset("rb_root")
    made_up.memory.put(root, bytes(16))
    findings = {finding.id: finding for finding in made_up.check(moves=False).findings}
    assert set(findings) == {"AVC-IN-TREE", "ANON-VMA-CHILDREN", "FOLIO-RMAP-REACH"}
    assert findings["AVC-IN-TREE"].address == AVC
    assert findings["FOLIO-RMAP-REACH"].pages == 4


# munmap() holds mmap_lock to read; exit() waits until an mm has no users.
@pytest.mark.parametrize(
    ("mm", "severity"),
    [
        ({"mmap_lock_count": 0x100}, Severity.TRANSIENT),
        ({"mmap_lock_count": 0x102}, Severity.TRANSIENT),
        # Somebody waits for it, and nobody has it.
        ({"mmap_lock_count": 2}, Severity.ERROR),
        ({}, Severity.ERROR),
    ],
)
def test_vma_that_its_mm_does_not_have_any_more(mm, severity):
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, **mm})
    detached(made_up, MM)
    result = made_up.check(moves=False)
    assert ids(result) == [("AVC-IN-TREE", severity)]
    work = "munmap or exit is at work" if severity is Severity.TRANSIENT else "nobody is at work"
    assert work in result.findings[0].message


def test_vma_that_the_maple_tree_has_elsewhere():
    made_up = Process()
    # The entry begins a page behind the VMA.
    made_up.memory.put(LEAF + 8, word(START + 4096 - 1))
    found = made_up.check(moves=False).findings
    assert {"VMA-TREE", "AVC-IN-TREE"} <= {finding.id for finding in found}
    assert "does not have, and nobody is at work" in " ".join(finding.message for finding in found)


def test_nothing_of_other_processes_is_kept_with_one():
    made_up = Process()
    detached(made_up, MM)
    records = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False).read(MM).records
    before = [dict(table) for table in (records.vmas, records.avcs, records.anon_vmas, records.chains)]
    family = FamilyReader(LAYOUT, records).read(ANON_VMA, [VMA])
    assert len(family.vmas) == len(family.chains) == len(family.trees[ANON_VMA].links) == 2
    assert [records.vmas, records.avcs, records.anon_vmas, records.chains] == before
    # It is the same by itself.
    assert family == read_family(made_up.memory.prog, LAYOUT, ANON_VMA, [VMA])


def test_tree_that_leads_nowhere_ends():
    for member, wild in (("left", 0xDEAD000000000100), ("right", AVC + TREE.rb), ("left", 7)):
        made_up = Process()
        made_up.memory.put(AVC + TREE.rb + getattr(TREE, member), word(wild))
        result = made_up.check(moves=False)
        assert ("ANON-VMA-TREE-KEY", Severity.ERROR) in ids(result)


def test_damaged_maple_tree_does_not_make_its_vmas_look_gone():
    made_up = Process()
    dead = [LEAF, *leaf()[1:]]
    made_up.memory.put_words(LEAF, dead)
    assert "AVC-IN-TREE" not in {finding.id for finding in made_up.check(moves=False).findings}


def test_offsets_at_the_end_of_all_numbers():
    made_up = Process()
    start = (1 << 64) - 2
    made_up.memory.put_struct(
        LAYOUT.vma,
        VMA,
        {**made_up.vma, "anon_pgoff_lo": start & 0xFFFFFFFF, "anon_pgoff_hi": start >> 32},
    )
    # Pages that are where such a VMA would have them, so that rmap is tried.
    made_up.changing(index_at(0), [word(start)])
    found = {finding.id: finding for finding in made_up.check(moves=False).findings}
    assert {"VMA-NO-WRAP", "AVC-TREE-SUBTREE-LAST", "FOLIO-RMAP-REACH"} <= found.keys()
    # As the kernel adds them up: four pages on.
    assert found["AVC-TREE-SUBTREE-LAST"].expected == 1
