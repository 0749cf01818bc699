# SPDX-License-Identifier: GPL-2.0-only
"""struct vm_area_struct: read whole, and the kernel's own arithmetic on it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter
from typing import NamedTuple

import drgn
import numpy as np

from kvirt.layout import Layout, StructLayout, layout_of
from kvirt.mm.pagetable import U64
from kvirt.mm.structs import Structs, read_structs
from kvirt.snapshot import Readable, Snapshot

_ULONG_MAX = (1 << 64) - 1


class VmaKind(enum.StrEnum):
    """What a VMA maps."""

    ANON = "anon"
    SHMEM = "shmem"
    DEVZERO = "devzero"
    FILE_PRIVATE = "file-private"
    FILE_SHARED = "file-shared"
    HUGETLB = "hugetlb"
    STACK = "stack"
    SPECIAL = "special"


# What there are many of are tuples, which are made several times as fast as dataclasses.
class Vma(NamedTuple):
    """A ``struct vm_area_struct`` as it was in one read. Page offsets count base pages."""

    layout: Layout
    address: int
    vm_start: int
    vm_end: int
    vm_mm: int
    vm_flags: int
    vm_pgoff: int
    anon_pgoff: int
    """``vma_start_anon_pgoff()``; on a legacy kernel ``vm_pgoff``, which indexed folios there."""
    anon_vma: int
    vm_ops: int
    vm_file: int
    chain_next: int
    chain_prev: int
    anon_name: int

    def flag(self, name: str) -> bool:
        """Whether ``VM_<name>`` is set."""
        return bool(self.vm_flags & self.layout.vm[name])


# What _make() of a NamedTuple does, without a look at its length.
_make = tuple.__new__
_MEMBERS = (
    "vm_start",
    "vm_end",
    "vm_mm",
    "vm_flags",
    "vm_pgoff",
    "anon_vma",
    "vm_ops",
    "vm_file",
    "chain_next",
    "chain_prev",
)


_Make = Callable[[Layout, int, tuple[int, ...]], Vma]


@lru_cache(maxsize=4)
def _decoder(how: StructLayout) -> tuple[tuple[str, ...], _Make]:
    """How to take a VMA apart, found once a kernel.

    :return: members to take out of it, in order of their offsets, so that they need no sorting; and a
        function that makes a :class:`Vma` of them
    """
    halves = ("anon_pgoff_lo", "anon_pgoff_hi") if "anon_pgoff_lo" in how else ("vm_pgoff", "vm_pgoff")
    members = [name for name in {*_MEMBERS, *halves, "anon_name"} if name in how]
    members.sort(key=how.offset)
    at = {name: 3 + index for index, name in enumerate(members)}
    # A VMA that cannot have a name has 0.
    places = {"layout": 0, "address": 1, "anon_name": 2, **at, "anon_pgoff": 3 + len(members)}
    if "anon_pgoff_lo" not in how:
        places["anon_pgoff"] = at["vm_pgoff"]
    low, high = (members.index(name) for name in halves)
    pick = itemgetter(*(places[name] for name in Vma._fields))

    def make(layout: Layout, address: int, values: tuple[int, ...]) -> Vma:
        # include/linux/mm.h: vma_start_anon_pgoff()
        return _make(Vma, pick((layout, address, 0, *values, values[high] << 32 | values[low])))

    return tuple(members), make


def vma_reader(memory: Readable, layout: Layout) -> Callable[[int], Vma]:
    """A function that reads the VMA at an address, with one read, so that as little as possible is torn.

    It raises :class:`drgn.FaultError` if the ``struct vm_area_struct`` cannot be read.
    """
    size, (members, make) = layout.vma.size, _decoder(layout.vma)
    get = layout.vma.getter(members)
    return lambda address: make(layout, address, get(memory.read(address, size)))


def read_vmas(memory: Snapshot, layout: Layout, addresses: U64) -> Structs:
    """Read VMAs, with the members that :class:`Vma` has.

    :raises Unclear: if one cannot be read
    """
    return read_structs(memory, layout.vma.dtype(_decoder(layout.vma)[0]), addresses)


def vmas_of(layout: Layout, addresses: U64, records: Structs) -> list[Vma]:
    """Each of some VMAs by itself.

    :param records: from :func:`read_vmas`
    """
    make = partial(_decoder(layout.vma)[1], layout)
    return list(map(make, addresses.tolist(), records.tolist()))


def start_anon_pgoffs(layout: Layout, records: Structs) -> U64:
    """``vma_start_anon_pgoff()`` of each of some VMAs (include/linux/mm.h).

    :param records: from :func:`read_vmas`
    """
    pgoffs: U64
    if "anon_pgoff_lo" in layout.vma:
        pgoffs = records["anon_pgoff_hi"].astype(np.uint64) << np.uint64(32) | records["anon_pgoff_lo"]
    else:
        pgoffs = records["vm_pgoff"]
    return pgoffs


def vma_snapshot(vma: drgn.Object) -> Vma:
    """The :class:`Vma` of a drgn object.

    :param vma: ``struct vm_area_struct *``
    """
    return vma_reader(vma.prog_, layout_of(vma.prog_))(vma.value_())


def vma_pages(vma: Vma) -> int:
    """Pages that a VMA spans (include/linux/mm.h)."""
    # As unsigned as the kernel's: a damaged VMA may end before it starts.
    return ((vma.vm_end - vma.vm_start) & _ULONG_MAX) >> vma.layout.page_shift


def vma_start_pgoff(vma: Vma) -> int:
    """Offset of the first page in the file (include/linux/mm.h)."""
    return vma.vm_pgoff


def vma_start_anon_pgoff(vma: Vma) -> int:
    """Offset by which anonymous folios of the first page are indexed (include/linux/mm.h)."""
    return vma.anon_pgoff


def vma_last_pgoff(vma: Vma) -> int:
    """Offset of the last page in the file (include/linux/mm.h)."""
    return (vma.vm_pgoff + vma_pages(vma) - 1) & _ULONG_MAX


def vma_last_anon_pgoff(vma: Vma) -> int:
    """Offset by which anonymous folios of the last page are indexed (include/linux/mm.h)."""
    return (vma.anon_pgoff + vma_pages(vma) - 1) & _ULONG_MAX


def linear_page_index(vma: Vma, address: int) -> int:
    """Index in the file of the page at an address (include/linux/pagemap.h)."""
    return vma.vm_pgoff + ((address - vma.vm_start) >> vma.layout.page_shift)


def linear_anon_page_index(vma: Vma, address: int) -> int:
    """Index that an anonymous page at an address has (include/linux/pagemap.h).

    On a legacy kernel this is :func:`linear_page_index`.
    """
    return vma.anon_pgoff + ((address - vma.vm_start) >> vma.layout.page_shift)


def vma_is_anonymous(vma: Vma) -> bool:
    """Whether the VMA has no operations of its own; true for private /dev/zero (include/linux/mm.h)."""
    return vma.vm_ops == 0


def vma_is_pure_anon(vma: Vma) -> bool:
    """Anonymous, and without a file too."""
    return vma.vm_ops == 0 and vma.vm_file == 0


def vma_is_cow_mapping(vma: Vma) -> bool:
    """Whether a write may make an anonymous copy (``is_cow_mapping()``, include/linux/mm.h)."""
    shared, maywrite = vma.layout.vm["SHARED"], vma.layout.vm["MAYWRITE"]
    return vma.vm_flags & (shared | maywrite) == maywrite


def vma_is_temporary_stack(vma: Vma) -> bool:
    """Whether an exec still builds its stack here (include/linux/mm.h)."""
    incomplete = vma.layout.vm["RAND_READ"] | vma.layout.vm["SEQ_READ"]
    return vma.flag("GROWSDOWN") and vma.vm_flags & incomplete == incomplete


def displacement(vma: Vma) -> int:
    """Pages by which the anonymous offset differs from the address; 0 is "in place"."""
    return vma.anon_pgoff - (vma.vm_start >> vma.layout.page_shift)


def permissions(vma: Vma) -> str:
    """The permissions as in ``/proc/PID/maps`` ("rw-p")."""
    letters = [c if vma.flag(n) else "-" for c, n in (("r", "READ"), ("w", "WRITE"), ("x", "EXEC"))]
    return "".join(letters) + ("s" if vma.flag("MAYSHARE") else "p")


def vma_kind(vma: Vma, start_stack: int = 0) -> VmaKind:
    """Sort a VMA into the kinds of "anonymous", and the rest.

    :param start_stack: ``mm->start_stack``, 0 if not known
    """
    flags, vm = vma.vm_flags, vma.layout.vm
    # The order matters: a hugetlb mapping has a file, a stack has none.
    if flags & vm["HUGETLB"]:
        return VmaKind.HUGETLB
    if vma_is_pure_anon(vma):
        if flags & vm["GROWSDOWN"] or vma.vm_start <= start_stack < vma.vm_end:
            return VmaKind.STACK
        return VmaKind.ANON
    if flags & (vm["PFNMAP"] | vm["IO"]) or vma.vm_file == 0:
        return VmaKind.SPECIAL
    if vma_is_anonymous(vma):
        return VmaKind.DEVZERO
    if not flags & vm["MAYSHARE"]:
        return VmaKind.FILE_PRIVATE
    return VmaKind.SHMEM if vma.vm_ops in vma.layout.shmem_ops else VmaKind.FILE_SHARED
