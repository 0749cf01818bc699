# SPDX-License-Identifier: GPL-2.0-only
"""The rules by which a VMA gets its page offsets, and a model of one VMA that follows them.

A :class:`Region` is what the kernel must have after the system calls that were made; it is worked
out from the calls alone. Tests hold the kernel, and kvirt's reading of it, against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from kvirt.lab.procfs import PAGE_SHIFT, PAGE_SIZE

# vma->vm_ops is NULL ...
ANON_OPS = {"anon", "devzero", "stack"}
# ... and there is no vm_file either: both offsets are the same number, always.
PURE_ANON = {"anon", "stack"}
# Private and writable in principle: a write makes an anonymous page.
COW = ANON_OPS | {"file-private", "hugetlb", "special"}
# /proc/PID/maps shows 0 for the others, having no file to show the offset of.
FILE_BACKED = {"devzero", "shmem", "file-private", "file-shared", "hugetlb"}
KINDS = ANON_OPS | FILE_BACKED | {"special"}


class Region:
    """One VMA as it must be: its offsets in pages, and which of its pages are there.

    ``vm_pgoff`` is None where user space cannot know it, ``legacy_vm_pgoff`` (kernels without an
    anon pgoff) also where those kernels differ among themselves. ``faulted`` says that the VMA has
    an anon_vma; None if kernels differ.
    """

    def __init__(
        self,
        kind: str,
        start: int,
        size: int,
        *,
        vm_pgoff: int | None,
        anon_pgoff: int | None,
        legacy_vm_pgoff: int | None,
        prot: str = "rw",
        shared: bool = False,
    ) -> None:
        self.kind = kind
        self.start = start
        self.size = size
        self.vm_pgoff = vm_pgoff
        self.anon_pgoff = anon_pgoff
        self.legacy_vm_pgoff = legacy_vm_pgoff
        self.prot = prot
        self.shared = shared
        self.faulted: bool | None = False
        self.wipe_on_fork = False
        self.note = ""
        # Addresses of pages, each in one of these sets: anonymous pages made here; anonymous pages
        # a fork brought; file pages; the zero page; anonymous pages in swap.
        self.written: set[int] = set()
        self.inherited: set[int] = set()
        self.read: set[int] = set()
        self.zero: set[int] = set()
        self.swapped: set[int] = set()

    @classmethod
    def mapped(
        cls,
        kind: str,
        start: int,
        size: int,
        pgoff: int | None = None,
        prot: str = "rw",
        shared: bool = False,
    ) -> Region:
        """Mmap, of whatever kind: the anon pgoff is the address; so is the pgoff of pure anon."""
        natural = start >> PAGE_SHIFT
        vm_pgoff = natural if kind in PURE_ANON else pgoff
        return cls(
            kind,
            start,
            size,
            vm_pgoff=vm_pgoff,
            anon_pgoff=natural,
            legacy_vm_pgoff=vm_pgoff,
            prot=prot,
            shared=shared,
        )

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.start + self.size

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return self.size >> PAGE_SHIFT

    def address(self, page: int) -> int:
        """Return the address of its page number ``page``."""
        return self.start + (page << PAGE_SHIFT)

    def _piece(self, start: int, end: int, to: int) -> Region:
        """Copy [start, end) of it to ``to``: the offsets of its first page, and its pages."""
        delta = start - self.start >> PAGE_SHIFT
        piece = Region(
            self.kind,
            to,
            end - start,
            vm_pgoff=_add(self.vm_pgoff, delta),
            anon_pgoff=_add(self.anon_pgoff, delta),
            legacy_vm_pgoff=_add(self.legacy_vm_pgoff, delta),
            prot=self.prot,
            shared=self.shared,
        )
        piece.faulted = self.faulted
        piece.wipe_on_fork = self.wipe_on_fork
        piece.note = self.note
        for mine, its in zip(self._pages(), piece._pages(), strict=True):
            its.update(a - start + to for a in mine if start <= a < end)
        return piece

    def _pages(self) -> tuple[set[int], ...]:
        return self.written, self.inherited, self.read, self.zero, self.swapped

    def split(self, *cuts: int) -> list[Region]:
        """Split at page numbers: the lower part keeps its offsets, the upper adds the distance."""
        at = [self.start, *(self.address(cut) for cut in cuts), self.end]
        return [self._piece(low, high, low) for low, high in pairwise(at) if low < high]

    def moved(self, to: int, size: int | None = None) -> Region:
        """Mremap to another address, without a merge.

        A faulted VMA takes its offsets along, for its pages are indexed by them. An unfaulted one
        gets the anon pgoff of its new address, and if it has no vm_ops the same vm_pgoff.
        """
        piece = self._piece(self.start, self.end, to)
        if not self.faulted and to != self.start:
            piece.anon_pgoff = to >> PAGE_SHIFT
            if self.kind in ANON_OPS:
                piece.vm_pgoff = piece.legacy_vm_pgoff = to >> PAGE_SHIFT
        return piece if size is None else piece.resized(size)

    def resized(self, size: int) -> Region:
        """Mremap in place: neither offset changes; what is cut off takes its pages along."""
        piece = self._piece(self.start, self.start + min(size, self.size), self.start)
        piece.size = size
        return piece

    def left_behind(self) -> Region:
        """Return what remains of it at its place when MREMAP_DONTUNMAP has moved all its pages.

        It is unfaulted again, so its anon pgoff is reset to its address. Linux 6.12 leaves the
        vm_pgoff of displaced anonymous memory as it was, 7.2 resets it.
        """
        piece = Region.mapped(self.kind, self.start, self.size, self.vm_pgoff, self.prot, self.shared)
        if self.kind in PURE_ANON and self.anon_pgoff != piece.anon_pgoff:
            piece.legacy_vm_pgoff = None
        elif self.kind not in PURE_ANON:
            piece.legacy_vm_pgoff = self.legacy_vm_pgoff
        piece.note = self.note
        return piece

    def forked(self) -> Region:
        """Return it as a child has it: both offsets copied, even if MADV_WIPEONFORK empties it."""
        piece = self._piece(self.start, self.end, self.start)
        if self.wipe_on_fork:
            piece.faulted = False
            for pages in piece._pages():
                pages.clear()
        else:
            piece.inherited |= piece.written
            piece.written.clear()
            # Without an anon_vma fork copies no page tables; with one it does, but whether these
            # pages are there says nothing about offsets.
            piece.read.clear()
            piece.zero.clear()
        return piece

    def as_json(self, name: str, pid: int) -> dict[str, object]:
        """Return what the workload prints about it."""
        result: dict[str, object] = {
            "name": name,
            "pid": pid,
            "start": hex(self.start),
            "end": hex(self.end),
            "kind": self.kind,
            "prot": self.prot,
            "shared": self.shared,
            "vm_pgoff": _hex(self.vm_pgoff),
            "anon_pgoff": _hex(self.anon_pgoff),
            "faulted": self.faulted,
            "written": compress(self.written),
            "read": compress(self.read),
            "note": self.note,
        }
        if self.inherited:
            result["inherited"] = compress(self.inherited)
        if self.zero:
            result["zero"] = compress(self.zero)
        if self.swapped:
            result["swapped"] = compress(self.swapped)
        if self.legacy_vm_pgoff != self.vm_pgoff:
            result["legacy_vm_pgoff"] = _hex(self.legacy_vm_pgoff)
        return result


def join(*parts: Region) -> Region:
    """Return the merge of adjacent regions: the lowest's offsets, from which the others' follow.

    It raises ValueError if a 7.3 kernel must not merge them.
    """
    first, last = parts[0], parts[-1]
    for low, high in pairwise(parts):
        if low.end != high.start or (low.kind, low.prot) != (high.kind, high.prot):
            raise ValueError("These regions are not adjacent or not of one sort.")
        if _add(low.vm_pgoff, low.pages) != high.vm_pgoff:
            raise ValueError("The page offsets of these regions are not adjacent.")
        if low.kind not in PURE_ANON and _add(low.anon_pgoff, low.pages) != high.anon_pgoff:
            raise ValueError("The anon page offsets of these regions are not adjacent.")
    whole = first._piece(first.start, first.end, first.start)
    whole.size = last.end - first.start
    whole.faulted = any(part.faulted for part in parts)
    for part in parts[1:]:
        for mine, its in zip(whole._pages(), part._pages(), strict=True):
            mine.update(its)
    return whole


def compress(addresses: Iterable[int]) -> list[str | list[str]]:
    """Write addresses of pages as hex numbers; three and more evenly spaced as [start, end, step].

    The end is not included.
    """
    rest = sorted(addresses)
    result: list[str | list[str]] = []
    while rest:
        count = 1
        if len(rest) > 1:
            step = rest[1] - rest[0]
            while count < len(rest) and rest[count] == rest[0] + count * step:
                count += 1
        if count > 2:
            result.append([hex(rest[0]), hex(rest[0] + count * step), hex(step)])
            del rest[:count]
        else:
            result.append(hex(rest.pop(0)))
    return result


def expand(items: Iterable[str | Sequence[str]]) -> list[int]:
    """Return the addresses that :func:`compress` wrote."""
    result: list[int] = []
    for item in items:
        if isinstance(item, str):
            result.append(int(item, 16))
        else:
            start, end, step = (int(number, 16) for number in item)
            result.extend(range(start, end, step))
    return result


def page_range(start: int, end: int) -> range:
    """Return the addresses of the pages in [start, end)."""
    return range(start, end, PAGE_SIZE)


def _add(pgoff: int | None, pages: int) -> int | None:
    return None if pgoff is None else pgoff + pages


def _hex(number: int | None) -> str | None:
    return None if number is None else hex(number)
