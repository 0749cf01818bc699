# SPDX-License-Identifier: GPL-2.0-only
"""One process's struct mm_struct with its VMAs, their chains and anon_vmas, as read in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import MMF_UNSTABLE, RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.file import File, read_file
from kvirt.mm.maple import MapleError, MapleTree, mt_for_each
from kvirt.mm.rmap import AnonVma, Chain, Records
from kvirt.mm.vma import Vma
from kvirt.snapshot import Readable, Snapshot


class MmEntry(NamedTuple):
    """One entry of ``mm->mm_mt``."""

    first: int
    last: int
    vma: Vma


@dataclass(slots=True)
class AddressSpace:
    """A ``struct mm_struct`` and what hangs on it."""

    layout: Layout
    records: Records
    """Its VMAs and what hangs on them, as they were read."""
    address: int
    pgd: int
    map_count: int
    mm_users: int
    unstable: bool
    """MMF_UNSTABLE: the OOM reaper has been here, contents may be gone."""
    write_locked: bool | None
    """Whether somebody held mmap_lock for write; None where the kernel does not tell."""
    lock_seq: int | None
    """``mm->mm_lock_seq``: changes whenever mmap_lock is held for write; None where there is none."""
    start_stack: int
    start_brk: int
    brk: int
    at: frozenset[int] | None = None
    """If not None, only the VMAs at these addresses were read."""
    entries: list[MmEntry] = field(default_factory=list)
    chains: dict[int, Chain] = field(default_factory=dict)
    """Chain of each VMA, by the VMA's address."""
    anon_vmas: dict[int, AnonVma] = field(default_factory=dict)
    """Each anon_vma in the chains, and what it points to, by address."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """anon_vmas that could not be read, and why."""
    files: dict[int, File | None] = field(default_factory=dict)
    """Each file that is mapped, by the address of its ``struct file``; None if it cannot be read."""
    broken_tree: str | None = None
    """Why the maple tree could not be followed to its end, if it could not."""

    def file(self, vma: Vma) -> File | None:
        """The file that a VMA maps; None if it maps none, or if it cannot be read."""
        return self.files.get(vma.vm_file)

    def vmas(self) -> Iterator[Vma]:
        """The VMAs in order of their addresses."""
        return (entry.vma for entry in self.entries)


def _add_anon_vmas(space: AddressSpace, addresses: Iterable[int]) -> None:
    known, records = space.anon_vmas, space.records.anon_vmas
    # Each once, in this order.
    for address in dict.fromkeys(addresses):
        if address in known or address == 0 or address in space.unreadable:
            continue
        try:
            known[address] = records[address]
        except drgn.FaultError as error:
            damage_only(error)
            space.unreadable[address] = str(error)


def _add_file(space: AddressSpace, address: int) -> None:
    try:
        space.files[address] = read_file(space.records.memory, space.layout, address)
    except drgn.FaultError:
        space.files[address] = None


def _write_locked(m: dict[str, int]) -> bool | None:
    count = m.get("mmap_lock_count")
    return None if count is None else bool(count & RWSEM_WRITER_LOCKED)


def mm_unchanged(prog: drgn.Program, space: AddressSpace) -> bool:
    """Whether nobody has changed the mappings since an address space began to be read.

    :raises drgn.FaultError: if the mm_struct cannot be read any more
    """
    m = space.layout.mm.read(prog, space.address)
    if _write_locked(m):
        return False
    if space.lock_seq is not None:
        return m["mm_lock_seq"] == space.lock_seq
    # Kernels that do not count: what was read must read the same again.
    again = read_address_space(prog, space.layout, space.address, at=space.at)
    return again.entries == space.entries and again.chains == space.chains


def _entries_at(
    memory: Readable, layout: Layout, ma_root: int, at: frozenset[int]
) -> Iterator[tuple[int, int, int]]:
    tree, last = MapleTree(memory, layout, ma_root), -1
    for address in sorted(at):
        if address > last:
            first, last, entry = tree.mas_walk(address)
            if entry:
                yield first, last, entry


def read_address_space(
    prog: drgn.Program, layout: Layout, mm: int, *, at: frozenset[int] | None = None
) -> AddressSpace:
    """Read a process's VMAs, their chains and anon_vmas.

    :param mm: address of the ``struct mm_struct``
    :param at: if given, only the VMAs at these addresses
    :raises drgn.FaultError: if the mm_struct itself cannot be read, or if something was left out of the dump;
        everything else that cannot be read or followed is recorded
    """
    memory = Snapshot(prog)
    m = layout.mm.read(memory, mm)
    space = AddressSpace(
        layout=layout,
        records=Records(memory, layout),
        address=mm,
        pgd=m["pgd"],
        map_count=m["map_count"],
        mm_users=m["mm_users"],
        unstable=bool(m["flags"] & MMF_UNSTABLE),
        write_locked=_write_locked(m),
        lock_seq=m.get("mm_lock_seq"),
        start_stack=m["start_stack"],
        start_brk=m["start_brk"],
        brk=m["brk"],
        at=at,
    )
    ma_root, vmas = m["ma_root"], space.records.vmas
    entries = mt_for_each(memory, layout, ma_root) if at is None else _entries_at(memory, layout, ma_root, at)
    try:
        for first, last, entry in entries:
            try:
                vma = vmas[entry]
            except drgn.FaultError as error:
                damage_only(error)
                space.broken_tree = f"the entry for {first:#x} points to {entry:#x}, which cannot be read"
                continue
            space.entries.append(MmEntry(first, last, vma))
    except MapleError as error:
        space.broken_tree = str(error)
    chains, files, read = space.chains, space.files, space.records.chains
    leads_to: list[int] = []
    for vma in space.vmas():
        chain = chains[vma.address] = read[vma.address]
        if vma.vm_file and vma.vm_file not in files:
            _add_file(space, vma.vm_file)
        leads_to.append(vma.anon_vma)
        leads_to += [link.anon_vma for link in chain.links]
    _add_anon_vmas(space, leads_to)
    # A root that is not in any chain is damage, and a check wants to look at it.
    _add_anon_vmas(space, [at for one in space.anon_vmas.values() for at in (one.root, one.parent)])
    return space
