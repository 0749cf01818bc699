# SPDX-License-Identifier: GPL-2.0-only
"""One process's struct mm_struct with its VMAs, their chains and anon_vmas, as one snapshot has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import drgn
import numpy as np

from kvirt.filtered import damage_only
from kvirt.layout import MMF_UNSTABLE, RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.columns import Columns, read_columns
from kvirt.mm.file import File, read_file
from kvirt.mm.kernel import snapshot_of
from kvirt.mm.maple import MapleError, MapleTree, mt_for_each
from kvirt.mm.rmap import AnonVma, Chain, Records
from kvirt.mm.structs import Unclear, all_of, require
from kvirt.mm.vma import Vma, read_vmas, vmas_of
from kvirt.snapshot import Readable, Snapshot


class MmEntry(NamedTuple):
    """One entry of ``mm->mm_mt``."""

    first: int
    last: int
    vma: Vma


@dataclass
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
    columns: Columns | None = None
    """The same as arrays, if nothing was in the way of reading all of its VMAs, chains and anon_vmas."""
    files: dict[int, File | None] = field(default_factory=dict)
    """Each file that is mapped, by the address of its ``struct file``; None if it cannot be read."""
    broken_tree: str | None = None
    """Why the maple tree could not be followed to its end, if it could not."""

    @cached_property
    def chains(self) -> dict[int, Chain]:
        """Chain of each VMA, by the VMA's address."""
        return {vma.address: self.chain(vma) for vma in self.vmas()}

    def chain(self, vma: Vma) -> Chain:
        """Chain of one VMA."""
        return self.records.chains[vma.address]

    @cached_property
    def anon_vmas(self) -> dict[int, AnonVma]:
        """Each anon_vma in the chains that can be read, and what it points to, by address."""
        return self.read_anon_vmas()

    def read_anon_vmas(self) -> dict[int, AnonVma]:
        """What :attr:`anon_vmas` is, read now."""
        leads_to: list[int] = []
        for vma in self.vmas():
            leads_to.append(vma.anon_vma)
            leads_to += [link.anon_vma for link in self.chain(vma).links]
        known = dict(self._readable(leads_to))
        # A root that is not in any chain is damage, and a check wants to look at it.
        known.update(self._readable([at for one in known.values() for at in (one.root, one.parent)]))
        return known

    def _readable(self, addresses: Iterable[int]) -> Iterator[tuple[int, AnonVma]]:
        # Each once, in this order.
        for address in dict.fromkeys(addresses):
            if address:
                try:
                    yield address, self.records.anon_vmas[address]
                except drgn.FaultError as error:
                    damage_only(error)

    def file(self, vma: Vma) -> File | None:
        """The file that a VMA maps; None if it maps none, or if it cannot be read."""
        return self.files.get(vma.vm_file)

    def vmas(self) -> Iterator[Vma]:
        """The VMAs in order of their addresses."""
        return (entry.vma for entry in self.entries)


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
    prog: drgn.Program,
    layout: Layout,
    mm: int,
    *,
    at: frozenset[int] | None = None,
    memory: Snapshot | None = None,
) -> AddressSpace:
    """Read a process's VMAs, their chains and anon_vmas.

    :param mm: address of the ``struct mm_struct``
    :param at: if given, only the VMAs at these addresses
    :param memory: what may be read from, rather than anew
    :raises drgn.FaultError: if the mm_struct itself cannot be read, or if something was left out of the dump;
        everything else that cannot be read or followed is recorded
    """
    memory = memory or snapshot_of(prog, layout)
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
    ma_root = m["ma_root"]
    entries = mt_for_each(memory, layout, ma_root) if at is None else _entries_at(memory, layout, ma_root, at)
    found: list[tuple[int, int, int]] = []
    try:
        # Until it is broken off.
        for entry in entries:
            found.append(entry)
    except MapleError as error:
        space.broken_tree = str(error)
    try:
        _read_all(space, memory, found)
    except Unclear:
        _read_each(space, found)
    for vma in space.vmas():
        if vma.vm_file and vma.vm_file not in space.files:
            _add_file(space, vma.vm_file)
    return space


def _read_all(space: AddressSpace, memory: Snapshot, found: list[tuple[int, int, int]]) -> None:
    """Read all VMAs at once, with what they are tied to.

    :param found: first and last address of each entry of the maple tree, and what it points to
    :raises Unclear: if anything is in the way
    """
    require(found and space.at is None and space.broken_tree is None)
    first, last, address = (np.array(column, dtype=np.uint64) for column in zip(*found, strict=True))
    vmas = read_vmas(memory, space.layout, address)
    # While a fork copies the tree, entries that it did not come to yet are the parent's.
    require(all_of(vmas["vm_mm"] == np.uint64(space.address)) and len(set(address.tolist())) == len(address))
    space.columns = read_columns(memory, space.layout, first, last, address, vmas)
    made = vmas_of(space.layout, address, vmas)
    space.records.vmas.update((vma.address, vma) for vma in made)
    space.entries = [MmEntry(first, last, vma) for (first, last, _), vma in zip(found, made, strict=True)]


def _read_each(space: AddressSpace, found: list[tuple[int, int, int]]) -> None:
    """Read one VMA after the other, with what it is tied to."""
    for first, last, entry in found:
        try:
            space.entries.append(MmEntry(first, last, space.records.vmas[entry]))
        except drgn.FaultError as error:
            damage_only(error)
            space.broken_tree = f"the entry for {first:#x} points to {entry:#x}, which cannot be read"
    # Now, and not when somebody asks for them: it is known then whether the dump has them.
    space.anon_vmas = space.read_anon_vmas()
