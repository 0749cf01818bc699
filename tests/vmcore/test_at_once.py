# SPDX-License-Identifier: GPL-2.0-only
"""What is read and judged for many structures at once is what comes of looking at each."""

import random

import drgn
import pytest

from kvirt.checks import forest
from kvirt.checks.process import ProcessChecker
from kvirt.lab.overlay import Overlay
from kvirt.layout import layout_of
from kvirt.mm import address_space, grove
from kvirt.mm.structs import Unclear
from kvirt.tasks import for_each_process
from tests.vmcore.hostile import Hostile, limited

# Thousands more were run by hand.
SEEDS = range(1000, 1120)
FAMILY_SEEDS = range(150)


@pytest.fixture(scope="module")
def hostile(dump):
    return Hostile(dump.open(), dump.processes().values())


def refuse(*arguments):
    raise Unclear


class BothWays:
    """Checks processes at once and one by one."""

    def __init__(self, monkeypatch):
        self.at_once = self.wrong = 0
        self._monkeypatch, self._read = monkeypatch, address_space._read_all

    def _counted(self, *arguments):
        self._read(*arguments)
        self.at_once += 1

    def compare(self, prog, layout, mms, what):
        self._monkeypatch.setattr(address_space, "_read_all", self._counted)
        together = found(prog, layout, mms)
        self._monkeypatch.setattr(address_space, "_read_all", refuse)
        each = found(prog, layout, mms)
        assert together == each, what
        self.wrong += any(isinstance(one, str) or one[0] for one in each)


def found(prog, layout, mms):
    """All that one checker says of some processes."""
    checker = ProcessChecker(prog, layout, moves=False)
    said = []
    for mm in mms:
        try:
            with limited():
                result = checker.check(mm)
            said.append((result.findings, result.incomplete, result.pages))
        except drgn.FaultError as error:
            said.append(str(error))
    return said


def test_any_damage_reads_the_same_both_ways(hostile, monkeypatch):
    ways = BothWays(monkeypatch)
    for seed in SEEDS:
        with hostile.damaged(seed) as (said, scene):
            ways.compare(hostile.prog, hostile.layout, [scene.space.address], (seed, said))
    # Else it would say little.
    assert min(ways.at_once, ways.wrong) > len(SEEDS) // 4


class Families:
    """The anon_vmas of a dump, to be tied together otherwise, so that all their counts are right again."""

    def __init__(self, dump):
        target = dump.open()
        self.prog, self.layout = target.prog, layout_of(target.prog)
        self.mms = [process.mm for process in for_each_process(self.prog, moves=False).found]
        checker = ProcessChecker(self.prog, self.layout, moves=False)
        self.spaces = {mm: checker.read(mm) for mm in self.mms}
        self.vmas = {vma.address: vma for space in self.spaces.values() for vma in space.vmas()}
        self.known = sorted({address for space in self.spaces.values() for address in space.anon_vmas})
        # With one VMA, and no relatives.
        self.alone = [
            one.address
            for space in self.spaces.values()
            for one in space.anon_vmas.values()
            if one.root == one.address and one.refcount == one.num_active_vmas == 1
        ]
        self.overlay = Overlay(self.prog)

    def set(self, how, address, name, value):
        member = how.members[name]
        self.overlay.write(address + member.offset, value.to_bytes(member.size, "little"))

    def tie(self, chance, mm):
        """Tie something of a process to something else; say what."""
        space, anon_vma, avc, vma = self.spaces[mm], self.layout.anon_vma, self.layout.avc, self.layout.vma
        some = chance.choice([one for one in space.vmas() if one.anon_vma])
        link = chance.choice(space.chain(some).links)
        others = chance.choice((sorted(space.anon_vmas), self.known))
        how, address, name = chance.choice(
            (
                (anon_vma, link.anon_vma, "parent"),
                (anon_vma, some.anon_vma, "parent"),
                (anon_vma, link.anon_vma, "root"),
                (vma, some.address, "anon_vma"),
                (avc, link.address, "anon_vma"),
            )
        )
        value = chance.choice((chance.choice(others), link.anon_vma, some.anon_vma))
        self.set(how, address, name, value)
        return f"{name} of the {how.type_name} at {address:#x} is {value:#x}"

    def adopt(self, chance, mm):
        """Have an anon_vma of anybody be of a process's family, by a pointer alone."""
        space, how = self.spaces[mm], self.layout.anon_vma
        some = chance.choice([one for one in space.vmas() if one.anon_vma])
        root, other = space.anon_vmas[some.anon_vma].root, chance.choice(self.alone)
        self.set(how, other, "root", root)
        self.set(how, other, "parent", chance.choice((root, other, some.anon_vma)))
        if chance.random() < 0.7:
            self.set(how, some.anon_vma, "parent", other)
        else:
            self.set(self.layout.vma, some.address, "anon_vma", other)
        return f"{other:#x} is of the family of {root:#x}"

    def uproot(self, mm, leftmost):
        """Have a process's families of one VMA with another root, whose own tree is empty."""
        how, tree = self.layout.anon_vma, self.layout.anon_tree
        other = min(set(self.alone) - self.spaces[mm].anon_vmas.keys())
        at = other + how.offset("rb_root")
        self.overlay.write(at + tree.root_node, bytes(8))
        self.overlay.write(at + tree.root_leftmost, leftmost.to_bytes(8, "little"))
        for address in self.spaces[mm].anon_vmas.keys() & self.alone:
            self.set(how, address, "root", other)
        self.recount()
        # The VMA that has it is nowhere to be found.
        self.set(how, other, "num_active_vmas", 0)

    def recount(self):
        how, memory = self.layout.anon_vma, self.prog
        counts = {address: {"num_active_vmas": 0, "num_children": 0, "refcount": 1} for address in self.known}
        for address in self.vmas:
            own = self.layout.vma.read_member(memory, address, "anon_vma")
            if own in counts:
                counts[own]["num_active_vmas"] += 1
        for address in self.known:
            values = {name: how.read_member(memory, address, name) for name in ("root", "parent")}
            node = memory.read_u64(address + how.offset("rb_root") + self.layout.anon_tree.root_node)
            if node and values["parent"] in counts:
                counts[values["parent"]]["num_children"] += 1
            if values["root"] != address and values["root"] in counts:
                counts[values["root"]]["refcount"] += 1
        for address, members in counts.items():
            for name, value in members.items():
                if name in how and how.read_member(memory, address, name) != value:
                    self.set(how, address, name, value)


def test_families_that_are_tied_together_otherwise_read_the_same_both_ways(dump, monkeypatch):
    families, ways = Families(dump), BothWays(monkeypatch)
    forked = [
        mm for mm, space in families.spaces.items() if any(len(c.links) > 1 for c in space.chains.values())
    ]
    for seed in FAMILY_SEEDS:
        chance = random.Random(seed)
        mm = chance.choice(forked)
        ways_to = chance.choices((families.tie, families.adopt), (2, 1), k=chance.choice((1, 1, 2)))
        said = [tie(chance, mm) for tie in ways_to]
        if chance.random() < 0.9:
            families.recount()
        # What was found with one process is not told again with another.
        mms = [mm, *chance.sample(families.mms, 2)]
        chance.shuffle(mms)
        ways.compare(families.prog, families.layout, dict.fromkeys(mms), (seed, said))
        families.overlay.undo()
    assert min(ways.at_once, ways.wrong) > len(FAMILY_SEEDS) // 2


@pytest.mark.parametrize("leftmost", [0, "rb", 1 << 62])
def test_root_without_vmas_reads_the_same_both_ways(dump, monkeypatch, leftmost):
    families, ways = Families(dump), BothWays(monkeypatch)
    mm = next(mm for mm, space in families.spaces.items() if space.anon_vmas.keys() & families.alone)
    # A pointer to a node that would be in a structure at address 0.
    families.uproot(mm, families.layout.anon_tree.rb if leftmost == "rb" else leftmost)
    ways.compare(families.prog, families.layout, [mm], leftmost)
    assert (ways.at_once, ways.wrong) == (1, 1)


def test_a_vma_in_a_family_that_was_looked_at_with_another_process(dump, monkeypatch):
    families, ways = Families(dump), BothWays(monkeypatch)
    layout, avc, tree = families.layout, families.layout.avc, families.layout.anon_tree
    to_link, head = avc.offset("same_vma_next"), layout.vma.offset("chain_next")

    def ends(space, number):
        """VMAs of families that the process is alone in, by their anon_vmas: those with so many."""
        found = {}
        for vma in space.vmas():
            own = space.anon_vmas.get(vma.anon_vma)
            if own is not None and own.root == own.address and own.refcount == 1:
                found.setdefault(own, []).append(vma)
        return [(own, vmas) for own, vmas in found.items() if own.num_active_vmas == len(vmas) >= number]

    mm, (_, vmas) = next((mm, some[0]) for mm, s in families.spaces.items() if (some := ends(s, 2)))
    others = {m: s for m, s in families.spaces.items() if m != mm}
    other_mm, (other, (neighbour, *_)) = next(
        (m, one) for m, s in others.items() for one in ends(s, 1) if len(one[1]) == 1
    )
    # A link more of one of the VMAs, and in the other tree: sound, but for its being there.
    spare = next(
        link.address
        for m, s in others.items()
        if m != other_mm
        for chain in s.chains.values()
        for link in chain.links
    )
    vma, last = vmas[0], families.spaces[mm].chain(vmas[0]).links[-1].address
    families.set(avc, spare, "vma", vma.address)
    families.set(avc, spare, "anon_vma", other.address)
    families.set(avc, last, "same_vma_next", spare + to_link)
    families.set(avc, spare, "same_vma_prev", last + to_link)
    families.set(avc, spare, "same_vma_next", vma.address + head)
    families.set(layout.vma, vma.address, "chain_prev", spare + to_link)
    (node,) = families.spaces[other_mm].chain(neighbour).links
    offset = vma.anon_pgoff + (vma.vm_end - vma.vm_start >> layout.page_shift) - 1
    side = tree.right if vma.anon_pgoff >= neighbour.anon_pgoff else tree.left
    words = {
        node.address + tree.rb + side: spare + tree.rb,
        node.address + tree.subtree_last: max(offset, node.rb.subtree_last),
        spare + tree.rb + tree.parent: node.address + tree.rb,
        spare + tree.rb + tree.left: 0,
        spare + tree.rb + tree.right: 0,
        spare + tree.subtree_last: offset,
    }
    if side == tree.left:
        words[other.address + layout.anon_vma.offset("rb_root") + tree.root_leftmost] = spare + tree.rb
    for address, word in words.items():
        families.overlay.write(address, word.to_bytes(8, "little"))
    for mms in ([mm], [other_mm, mm], [mm, other_mm]):
        ways.compare(families.prog, layout, mms, mms)
    assert ways.wrong == 3


@pytest.mark.parametrize("together", [0, 1, 100])
def test_families_are_read_in_parts(dump, monkeypatch, together):
    families = Families(dump)
    whole = found(families.prog, families.layout, families.mms)
    seen, read = [], forest.read_groves

    def counted(*arguments):
        groves = list(read(*arguments))
        # One large family is a part of its own.
        assert all(len(one.avc) <= together or len({*one.roots().tolist()}) == 1 for one in groves)
        seen.extend(groves)
        return groves

    monkeypatch.setattr(forest, "read_groves", counted)
    monkeypatch.setattr(grove, "_TOGETHER", together)
    assert found(families.prog, families.layout, families.mms) == whole
    assert len(seen) > 2 * len(families.mms)


def test_sound_processes_are_read_at_once(dump):
    prog = dump.open().prog
    checker = ProcessChecker(prog, layout_of(prog), moves=False)
    for process in for_each_process(prog, moves=False).found:
        assert checker.read(process.mm).columns is not None, process


def test_pages_from_the_file_are_those_that_drgn_reads(dump):
    prog = dump.open().prog
    layout = layout_of(prog)
    files = others = 0
    for process in for_each_process(prog, moves=False).found:
        columns = ProcessChecker(prog, layout, moves=False).read(process.mm).columns
        some = {*columns.address.tolist(), *columns.links.avc.tolist(), process.mm}
        # And what is nowhere, or not in the direct map.
        wild = {0, 1 << 47, (1 << 64) - 4096, prog.symbol("init_task").address, layout.vmemmap}
        wild |= {address ^ 1 << 62 for address in some}
        for address in some | wild:
            start = address & ~4095
            page = prog.cache["kvirt.kernel"].read(start)
            assert not page or page == prog.read(start, 4096)
            files, others = files + bool(page), others + (not page and address in some)
    assert files > 10 * others
