# SPDX-License-Identifier: GPL-2.0-only
"""What a glance at a whole process passes over, and what it does not."""

import pytest

from kvirt.checks import forest, process
from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import CHECKS, every_check
from kvirt.mm.forest import FamilyReader
from tests.unit.checks.test_process import (
    ANON_VMA,
    AVC,
    LAYOUT,
    MM,
    START,
    VMA,
    Process,
    word,
)

TREE = LAYOUT.anon_tree


def at(layout, address, name):
    return address + layout.offset(name)


def columns(made_up):
    return ProcessChecker(made_up.memory.prog, LAYOUT, moves=False).read(MM).columns


def test_sound_process():
    found = columns(Process())
    assert found.address.tolist() == [VMA]
    assert (found.first.tolist(), found.last.tolist()) == ([START], [START + 4 * 4096 - 1])
    assert found.anon_pgoff.tolist() == [START >> 12]
    assert found.anon_vmas[found.anon_vma].tolist() == found.links.anon_vma.tolist() == [ANON_VMA]
    assert found.links.avc.tolist() == [AVC]
    assert found.in_chain(found.links.vma, found.link_anon_vma).all()


def test_nothing_is_looked_at_by_itself_in_a_sound_process(monkeypatch):
    looks = []
    read, context = FamilyReader.read, process.VmaContext
    monkeypatch.setattr(FamilyReader, "read", lambda *a: looks.append("family") or read(*a))
    monkeypatch.setattr(process, "VmaContext", lambda *a: looks.append("VMA") or context(*a))
    assert Process().check(False).findings == []
    assert looks == []
    # As without them.
    monkeypatch.setattr(forest, "read_groves", lambda *a: ())
    assert Process().check(False).findings == []
    assert looks == ["family"]


@pytest.mark.parametrize(
    ("address", "value"),
    [
        (at(LAYOUT.avc, AVC, "vma"), VMA + 8),
        (at(LAYOUT.avc, AVC, "anon_vma"), 0),
        (at(LAYOUT.avc, AVC, "anon_vma"), 0xDEAD000000000100),
        (at(LAYOUT.avc, AVC, "same_vma_next"), AVC + LAYOUT.avc.offset("same_vma_next")),
        (at(LAYOUT.avc, AVC, "same_vma_prev"), AVC),
        (at(LAYOUT.vma, VMA, "chain_prev"), VMA),
        (at(LAYOUT.vma, VMA, "vm_mm"), MM + 8),
        (at(LAYOUT.anon_vma, ANON_VMA, "root"), 0),
        (at(LAYOUT.anon_vma, ANON_VMA, "parent"), VMA + 1),
    ],
)
def test_what_is_not_sound_is_not_read_at_once(address, value):
    made_up = Process()
    made_up.memory.put(address, word(value))
    assert columns(made_up) is None


@pytest.mark.parametrize(
    ("address", "value"),
    [
        (AVC + TREE.rb + TREE.parent, AVC + 8),
        (AVC + TREE.rb + TREE.left, AVC + TREE.rb),
        (AVC + TREE.rb + TREE.right, 0xDEAD000000000100),
        (ANON_VMA + LAYOUT.anon_vma.offset("rb_root"), 0),
        (at(LAYOUT.mm, MM, "mm_users"), 0),
    ],
)
def test_grove_is_of_sound_trees(address, value):
    made_up = Process()
    space = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False).read(MM)
    made_up.memory.put(address, word(value))
    again = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False).read(MM)
    reader = FamilyReader(LAYOUT, again.records, {VMA})

    def grove(space, reader):
        roots = space.columns.finder.find(space.columns.anon_vmas)
        return list(forest.read_groves(space.records.memory, space.columns, roots, reader.has_attached))

    [sound] = grove(space, FamilyReader(LAYOUT, space.records, {VMA}))
    assert sound.vma.tolist() == [VMA]
    assert grove(again, reader) == []


def test_every_invariant_of_vmas_and_families_has_its_glance():
    every_check()
    for check in CHECKS.values():
        assert check.vma is None or check.vma_glance is not None, check.id
        assert check.family is None or check.family_glance is not None, check.id


def test_a_check_without_glance_looks_at_each(monkeypatch):
    seen = []

    def look(contexts):
        seen.extend(context.vma.address for context in contexts)
        return iter(())

    made_up = Process()
    checker = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False)
    plain = next(check for check, _ in checker._vma_checks)
    monkeypatch.setattr(checker, "_vma_checks", [(process.replace(plain, vma=look, vma_glance=None), look)])
    assert checker.check(MM).findings == []
    assert seen == [VMA]
