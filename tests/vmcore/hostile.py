# SPDX-License-Identifier: GPL-2.0-only
"""Random damage to the structures of a dump: a seed says what is damaged and how."""

from __future__ import annotations

import random
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field

import drgn
from drgn.helpers.linux.pid import find_task

from kvirt.checks.machine import MachineChecker
from kvirt.findings import Report
from kvirt.lab.overlay import Overlay
from kvirt.layout import layout_of
from kvirt.mm.address_space import read_address_space
from kvirt.mm.pagetable import WalkTroubles, for_each_leaf, leaf_pfn, leaf_present
from kvirt.tasks import for_each_process

MASK = (1 << 64) - 1
# Seconds for one machine of twenty processes, which takes two when it is sound.
PATIENCE = 60


class Hung(Exception):
    """A check did not come to its end."""


@contextmanager
def limited(seconds=PATIENCE):
    """Ends what takes longer."""

    def stop(number, frame):
        raise Hung(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Outcome:
    """What was damaged, and what check-all made of it."""

    damaged: list[str] = field(default_factory=list)
    report: Report | None = None
    pids: set[int] = field(default_factory=set)


class Hostile:
    """A dump whose memory is damaged, checked and mended again, as often as wanted."""

    def __init__(self, target, pids):
        self.prog = target.prog
        self.layout = layout_of(self.prog)
        self.overlay = Overlay(self.prog)
        self.pids = sorted(pids)
        self.all = {process.pid for process in for_each_process(self.prog, moves=False).found}
        # What random pointers may lead to: memory that is there and is something else.
        self.direct_map = self.prog["page_offset_base"].value_()

    @contextmanager
    def damaged(self, seed):
        """The dump as it is damaged by a seed: gives what was damaged, and the process that is."""
        chance = random.Random(seed)
        scene = Scenery(self, chance)
        said = []
        try:
            for _ in range(chance.choice((1, 1, 2, 4, 8, 16))):
                kind = chance.choice(KINDS)
                try:
                    said.append(f"{kind.__name__}: {kind(scene)}")
                except (drgn.FaultError, IndexError, OverflowError) as error:
                    # What was damaged before may have taken it away.
                    said.append(f"{kind.__name__}: not there ({error})")
            yield said, scene
        finally:
            self.overlay.undo()

    def run(self, seed):
        """Damage, check, mend."""
        with self.damaged(seed) as (said, _):
            outcome = Outcome(said)
            outcome.report = self.check(outcome.pids)
        return outcome

    def check(self, pids=None):
        """Check the whole machine; *pids* gets those of the processes."""
        report = Report()
        with limited():
            for task in MachineChecker(self.prog, self.layout, moves=False).tasks(report, rows=True):
                if pids is not None:
                    pids.add(task.pid)
        return report

    def write(self, address, value, size=8, *, physical=False):
        """Damage that :meth:`run` mends."""
        value &= (1 << 8 * size) - 1
        if physical:
            self.overlay.write_physical(address, value.to_bytes(size, "little"))
        else:
            self.overlay.write(address, value.to_bytes(size, "little"))


class Scenery:
    """One process of the dump, and values that do not belong where they are put."""

    def __init__(self, hostile, chance):
        self.hostile = hostile
        self.layout = hostile.layout
        self.prog = hostile.prog
        self.chance = chance
        self.pid = chance.choice(hostile.pids)
        self.task = find_task(self.prog, self.pid)
        self.space = read_address_space(self.prog, self.layout, self.task.mm.value_())
        self.vmas = list(self.space.vmas())

    def value(self, *alike):
        """Something to find in a pointer or number.

        :param alike: what stands in such members elsewhere
        """
        chance = self.chance
        kind = chance.randrange(9)
        if kind == 0:
            return 0
        if kind == 1:
            return chance.choice((1, 2, 6, MASK, MASK - 4095, 1 << 63))
        if kind == 2:
            return 0xDEAD000000000100 + chance.choice((0, 0x22, 0x300))
        if kind == 3:
            return chance.getrandbits(64)
        if kind == 4:
            return self.hostile.direct_map + chance.randrange(1 << 30) & ~7
        if kind == 5 and alike:
            return chance.choice(alike) + chance.choice((1, 4, 8, -8, 64, 4096))
        if kind == 6:
            return chance.getrandbits(16)
        if alike:
            return chance.choice(alike)
        return chance.choice(self.vmas).address

    def member(self, layout, address, *alike):
        """Damage one member of a structure."""
        name = self.chance.choice(sorted(layout.members))
        member = layout.members[name]
        value = self.value(address, *alike)
        self.hostile.write(address + member.offset, value, member.size)
        return f"{name} of the {layout.type_name} at {address:#x} is {value:#x}"


def vma(scene):
    alike = [v.address for v in scene.vmas] + [v.vm_start for v in scene.vmas]
    return scene.member(scene.layout.vma, scene.chance.choice(scene.vmas).address, *alike)


def vma_tree_node(scene):
    victim = scene.chance.choice(scene.vmas)
    words = range(victim.address, victim.address + scene.layout.vma.size - 8, 8)
    at = scene.chance.choice(words)
    value = scene.value(at, *(v.address for v in scene.vmas))
    scene.hostile.write(at, value)
    return f"the word at {at:#x} of the VMA at {victim.address:#x} is {value:#x}"


def link(scene):
    links = [link for chain in scene.space.chains.values() for link in chain.links]
    alike = [link.address for link in links] + [v.address for v in scene.vmas]
    return scene.member(scene.layout.avc, scene.chance.choice(links).address, *alike)


def link_tree_node(scene):
    links = [link for chain in scene.space.chains.values() for link in chain.links]
    victim = scene.chance.choice(links).address
    at = victim + scene.layout.anon_tree.rb + scene.chance.choice((0, 8, 16, 24))
    value = scene.value(at, *(link.address + scene.layout.anon_tree.rb for link in links))
    scene.hostile.write(at, value)
    return f"the word at {at:#x} of the tree node of the link at {victim:#x} is {value:#x}"


def anon_vma(scene):
    alike = sorted(scene.space.anon_vmas)
    return scene.member(scene.layout.anon_vma, scene.chance.choice(alike), *alike)


def maple_nodes(scene):
    root = scene.layout.mm.read(scene.prog, scene.space.address)["ma_root"]
    nodes = [root]
    for node in nodes:
        # Leaves hold VMAs; the others hold nodes, which are aligned and typed.
        if node >> 3 & 0xF in (2, 3) and len(nodes) < 64:
            data = scene.prog.read(node & ~255, 256)
            words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, 256, 8)]
            nodes += [word for word in words[1:] if word & 3 == 2 and word >> 63]
    return nodes


def maple(scene):
    node = scene.chance.choice(maple_nodes(scene))
    address = node & ~255
    if scene.chance.random() < 0.2:
        garbage = scene.chance.randbytes(256)
        for i in range(0, 256, 8):
            scene.hostile.write(address + i, int.from_bytes(garbage[i : i + 8], "little"))
        return f"the maple node {address:#x} is garbage"
    at = address + 8 * scene.chance.randrange(32)
    value = scene.value(node, address, *maple_nodes(scene))
    scene.hostile.write(at, value)
    return f"the word at {at:#x} of a maple node is {value:#x}"


def mm(scene):
    return scene.member(scene.layout.mm, scene.space.address, *(v.address for v in scene.vmas))


def tables(scene):
    """Physical addresses of the process's page tables."""
    pgtable = scene.layout.pgtable
    found = []
    data = scene.prog.read(scene.space.pgd, 2048)
    level = [int.from_bytes(data[i : i + 8], "little") for i in range(0, 2048, 8)]
    for _ in range(pgtable.levels - 1):
        below = []
        for entry in level:
            if entry & 0x81 == 1 and len(found) < 400:
                found.append(pgtable.physical(entry))
                data = scene.prog.read(found[-1], 4096, True)
                below += [int.from_bytes(data[i : i + 8], "little") for i in range(0, 4096, 8)]
        level = below
    return found


def page_table(scene):
    all_tables = tables(scene)
    at = scene.chance.choice(all_tables) + 8 * scene.chance.randrange(512)
    old = scene.prog.read_u64(at, True)
    value = scene.chance.choice(
        (
            scene.value(),
            scene.chance.choice(all_tables) | 0x67,
            scene.chance.choice(all_tables) | 0xE7,
            old ^ 1 << scene.chance.randrange(64),
            scene.chance.getrandbits(64) | 1,
            scene.chance.getrandbits(40) << 12 | 0x67,
        )
    )
    scene.hostile.write(at, value, physical=True)
    return f"the page-table entry at {at:#x} is {value:#x}"


def struct_page(scene):
    leaves = scene.chance.choice(
        list(for_each_leaf(scene.prog, scene.layout, scene.space.pgd, WalkTroubles()))
    )
    leaves = leaves.take(leaf_present(leaves))
    pfn = int(scene.chance.choice(leaf_pfn(leaves).tolist()))
    address = scene.layout.vmemmap + pfn * scene.layout.page.size
    return scene.member(
        scene.layout.page, address, address | 1, *(a | 1 for a in scene.space.anon_vmas), address + 64 | 1
    )


def struct_page_words(scene):
    leaves = scene.chance.choice(
        list(for_each_leaf(scene.prog, scene.layout, scene.space.pgd, WalkTroubles()))
    )
    leaves = leaves.take(leaf_present(leaves))
    pfn = int(scene.chance.choice(leaf_pfn(leaves).tolist()))
    page = scene.layout.vmemmap + (pfn + scene.chance.randrange(3)) * scene.layout.page.size
    at = page + 8 * scene.chance.randrange(8)
    value = scene.value()
    scene.hostile.write(at, value)
    return f"the word at {at:#x} of a struct page is {value:#x}"


def file(scene):
    files = [v.vm_file for v in scene.vmas if v.vm_file]
    address = scene.chance.choice(files)
    if scene.chance.random() < 0.5:
        return scene.member(scene.layout.file, address, *files)
    mapping = scene.layout.file.read_member(scene.prog, address, "f_mapping")
    return scene.member(scene.layout.mapping, mapping, *files)


def family(scene):
    roots = {a.root for a in scene.space.anon_vmas.values()}
    root = scene.chance.choice(sorted(roots)) + scene.layout.anon_vma.offset("rb_root")
    at = root + scene.chance.choice((0, 8))
    value = scene.value(root)
    scene.hostile.write(at, value)
    return f"the word at {at:#x} at the top of an anon_vma's tree is {value:#x}"


def task(scene):
    name = scene.chance.choice(("mm", "pid", "tgid", "flags", "comm", "thread_pid"))
    member = getattr(scene.task, name)
    value = scene.value(scene.task.value_())
    scene.hostile.write(member.address_, value, min(8, drgn.sizeof(member)))
    return f"{name} of task {scene.pid} is {value:#x}"


def pid_table(scene):
    head = scene.prog["init_pid_ns"].idr.idr_rt.xa_head.value_() & ~3
    node = drgn.Object(scene.prog, "struct xa_node", address=head)
    slots = [int(slot) for slot in node.slots.read_().value_() if slot]
    if scene.chance.random() < 0.7:
        inner = [s for s in slots if s & 3 == 2 and s > 4096]
        if inner:
            node = drgn.Object(scene.prog, "struct xa_node", address=scene.chance.choice(inner) & ~3)
    at = node.slots[scene.chance.randrange(64)].address_
    value = scene.value(head | 2, *slots)
    scene.hostile.write(at, value)
    return f"the slot at {at:#x} of the table of PIDs is {value:#x}"


KINDS = (
    vma,
    vma_tree_node,
    link,
    link_tree_node,
    anon_vma,
    maple,
    maple,
    mm,
    page_table,
    page_table,
    struct_page,
    struct_page_words,
    file,
    family,
    task,
    pid_table,
)
